"""What does a part of this server cost a request: itself against itself without that part?

    python -m bench.cost                            without password, record and metrics
    python -m bench.cost --without record           without one of them, or an extension: speedups, telemetry …
    python -m bench.cost --hanging-sls              against one that ships to an SLS that never answers
    BENCH_BEFORE=DIRECTORY python -m bench.cost     another checkout of it, such as an earlier commit

Both run side by side on one core and are asked in turn, a second each, in changing order, from another. A ratio, of
processor time (user and system, of all processes of a server) or of p99, is that of two neighbouring turns.
"""

import socket
from contextlib import ExitStack
from dataclasses import replace
from statistics import median, quantiles

import click

from bench.running import running
from bench.servers import BY_NAME, OURS, Cases, Server, prepare

ALL_THREE = "password,record,metrics"
EXTENSIONS = {"metrics": "-telemetry", "record": "+without_records"}
SLS = {f"SLS_{name}": "cn-hangzhou" for name in ("PROJECT", "LOGSTORE", "REGION")}
SLS |= {f"ALIBABA_CLOUD_ACCESS_KEY_{name}": "none" for name in ("ID", "SECRET")}
SLS |= {"SLS_ENDPOINT": "http://cn-hangzhou.log.aliyuncs.com"}


@click.command(help=__doc__)
@click.option("--pairs", default=15, show_default=True, help="of turns")
@click.option("--model", default="iris.joblib", show_default=True)
@click.option("--connections", default="1,64", show_default=True)
@click.option("--without", metavar="PART,…", default=ALL_THREE, show_default=True)
@click.option("--hanging-sls", is_flag=True)
def main(pairs: int, model: str, connections: str, without: str, hanging_sls: bool) -> None:
    prepare(set())
    with ExitStack() as stack:
        other = BY_NAME["before"] if "before" in BY_NAME and without == ALL_THREE else without_parts(without.split(","))
        if hanging_sls:  # connections are accepted by the kernel, and nobody reads them
            port = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096)).getsockname()[1]
            variables = {**OURS.variables, **SLS, "http_proxy": f"http://127.0.0.1:{port}"}
            other = replace(OURS, name="with a hanging SLS", variables=variables)
        runs = [stack.enter_context(running(server, model)) for server in (OURS, other)]
        print(f"| {model}, 1 row | it, µs | {other.name}, µs | difference, µs | it / {other.name} | p99, the same |")
        print("|---|---|---|---|---|---|")
        for count in map(int, connections.split(",")):
            turns = []
            for number in range(pairs + 1):  # the first to warm up
                turn = {}
                for at in (0, 1) if number % 2 else (1, 0):
                    turn[at] = runs[at].closed_loop(Cases(model).bodies(1), count, 1)
                turns.append(turn)
            both = [(turn[0]["cpu"] * 1e6, turn[1]["cpu"] * 1e6) for turn in turns[1:]]
            cells = [median(it) for it in (*zip(*both, strict=True), [ours - theirs for ours, theirs in both])]
            ratios = [[turn[0][what] / turn[1][what] for turn in turns[1:]] for what in ("cpu", "p99")]
            shown = [f"{middle:.3f} ({low:.3f}–{high:.3f})" for low, middle, high in map(quantiles, ratios)]
            print(f"| {count} connections |", " | ".join([*(f"{cell:.1f}" for cell in cells), *shown]), "|", flush=True)


def without_parts(parts: list[str]) -> Server:
    """Return this server without some parts."""
    settings = {"EXTENSIONS": ",".join(EXTENSIONS.get(part, f"-{part}") for part in parts if part != "password")}
    if "password" not in parts:
        return replace(OURS, name=f"without {','.join(parts)}", variables={**OURS.variables, **settings})
    return replace(OURS, name="bare", variables={**OURS.variables, **settings, "AUTH": "off"}, user=lambda place: "")


if __name__ == "__main__":
    main()
