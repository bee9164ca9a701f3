"""Tables of what bench.compare measured, and the chart of the README."""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from bench.servers import ALL, BY_NAME, OURS

Found = list[dict[str, Any]]
SHARE = 0.7  # of the highest rate that was measured


def report(found: Found, chart: Path | None = None) -> None:
    """Print a table for each thing that was measured: medians of the rounds, a column for each server."""
    closed, starts, fixed = (
        [each for each in found if each["kind"] == kind] for kind in ("closed", "start", "offered")
    )
    own, common = ([each for each in fixed if each["at"] == at] for at in ("own", "best"))
    case = ("model", "workers", "rows")
    ratio = "behind it, how many times as many this server answers (the median of the rounds' ratios)"
    table(f"Requests a second; {ratio}", closed, (*case, "connections"), rate_and_ratio, best=True)
    table("Processor time of a request, ms", closed, (*case, "connections"), lambda own, _: of(own, "cpu", 1e3, ".2f"))
    table("Seconds from the start to the first right answer", starts, case[:2], lambda own, _: of(own, "seconds"))
    table("Memory of all processes (PSS), MB", starts, case[:2], lambda own, _: of(own, "pss", 1, ".0f"))
    table("At 70 % of its own highest rate: p50, p99, ms", own, case, latency)
    table("At one rate for all, 70 % of the best peer's highest: p50, p99, ms", common, case, latency)
    if closed:
        others = [each["others"] for each in closed]
        print(f"\nOther processes took {median(others):.2f} cores meanwhile (median), {max(others):.2f} at most.")
        print(f"Answers other than 2xx: {sum(each['not_2xx'] for each in closed)}", end="; ")
        print(f"connections that broke or timed out: {sum(each['broken'] for each in closed)}.")
    if fixed:
        late = [each["late_p99"] * 1e3 for each in fixed]
        print(f"At fixed rates, 99 of 100 requests were sent within {median(late):.1f} ms of their time (median).")
    for each in found:
        if each["kind"] == "failed":
            where = f"{each['server']} with {each['model']} and {each['workers']} worker(s)"
            print(f"\nFAILED: {where}: {each['why']}; the end of its log: {each['log'].rpartition(chr(10))[2]}")
    if chart:
        chart.write_text(draw(closed))


def table(
    title: str, found: Found, keys: tuple[str, ...], cell: Callable[[Found, Found], str], best: bool = False
) -> None:
    """Print a line for each combination of the keys, and a column for each server."""
    if not found:
        return
    names = [server.name for server in ALL if any(each["server"] == server.name for each in found)]
    print(f"\n{title}\n")
    print("| " + " | ".join([*keys, *names, *["best of the others"] * best]) + " |")
    print("|" + "---|" * (len(keys) + len(names) + best))
    for values, here in grouped(found, *keys):
        by_server = {name: [each for each in here if each["server"] == name] for name in names}
        ours = by_server.get(OURS.name, [])
        cells = [cell(own, ours) if own else "" for own in by_server.values()]
        if best:
            peers = [name for name in names if BY_NAME[name].is_peer and by_server[name]]
            winner = max(peers, key=lambda name: middle(by_server[name], "rate"), default="")
            cells.append(f"{winner} {cell(by_server[winner], ours)}" if winner else "")
        print("| " + " | ".join([*map(str, values), *cells]) + " |")


def rate_and_ratio(own: Found, ours: Found) -> str:
    rates = {(each["run"], each["round"]): each["rate"] for each in ours}
    at = ((each, (each["run"], each["round"])) for each in own)
    ratios = [rates[where] / each["rate"] for each, where in at if where in rates and each["rate"]]
    refused = sum(each["not_2xx"] + each["broken"] for each in own)
    text = f"{middle(own, 'rate'):.0f}" + f" ({refused} refused)" * bool(refused)
    return f"{text} (×{median(ratios):.2f})" if ratios and own is not ours else text


def latency(own: Found, _: Found) -> str:
    lost = sum(each["failed"] + each["unfinished"] for each in own)
    text = f"{own[0]['rate']:.0f}/s: {of(own, 'p50', 1e3)}, {of(own, 'p99', 1e3)}"
    return f"{text} ({lost} of {sum(each['requests'] for each in own)} lost)" if lost else text


def of(own: Found, what: str, times: float = 1.0, form: str = ".1f") -> str:
    return format(middle(own, what) * times, form)


def middle(own: Found, what: str) -> float:
    return median(each[what] for each in own)


def grouped(found: Found, *keys: str) -> list[tuple[tuple[Any, ...], Found]]:
    """Return what was found by the values of these keys."""

    def by(each: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(each[key] for key in keys)

    return [(values, list(those)) for values, those in groupby(sorted(found, key=by), by)]


def offered(found: Found, name: str, model: str, workers: int) -> dict[int, dict[str, float]]:
    """Return the rates to ask a server at, for each number of rows: by its own highest, and by the best peer's."""
    here = [each for each in found if (each["kind"], each["model"], each["workers"]) == ("closed", model, workers)]
    rates: dict[int, dict[str, float]] = {}
    for (rows,), those in grouped(here, "rows"):
        by_server = {server: by for (server,), by in grouped(those, "server")}
        most = {
            server: max(middle(own, "rate") for _, own in grouped(by, "connections"))
            for server, by in by_server.items()
        }
        peers = [rate for server, rate in most.items() if BY_NAME[server].is_peer]
        if name in most:
            rates[rows] = {"own": SHARE * most[name]}
            if peers and BY_NAME[name].constant is None:
                rates[rows]["best"] = SHARE * max(peers)
    return rates


def draw(closed: Found) -> str:
    """Draw requests/s at 64 connections, a row a request and one worker: a bar for each server, by model, as SVG."""
    here = [each for each in closed if (each["workers"], each["rows"], each["connections"]) == (1, 1, 64)]
    left, width, step = 200, 400, 20  # pixels
    lines, y = [], 2 * step
    for (model,), those in grouped(here, "model"):
        rates = {name: middle(own, "rate") for (name,), own in grouped(those, "server") if not BY_NAME[name].constant}
        lines.append(f'<text x="0" y="{y}" class="model">{model}</text>')
        for name, rate in sorted(rates.items(), key=lambda each: -each[1]):
            y += step
            length = max(1, round(rate / max(rates.values()) * width))
            kind = ' class="ours"' if name == OURS.name else ""
            lines.append(f'<text x="{left - 8}" y="{y}" text-anchor="end">{BY_NAME[name].title}</text>')
            lines.append(f'<rect x="{left}" y="{y - 12}" width="{length}" height="15"{kind}/>')
            lines.append(f'<text x="{left + length + 6}" y="{y}">{rate:.0f}</text>')
        y += 2 * step
    style = "text{font:13px sans-serif;fill:#24292f}.model{font-weight:bold}rect{fill:#afb8c1}.ours{fill:#0969da}"
    style += "@media(prefers-color-scheme:dark){text{fill:#d1d7e0}rect{fill:#59636e}.ours{fill:#4493f8}}"
    title = "Requests a second: 64 connections, one row each, one worker on one core"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 {y - step}" role="img"><title>{title}</title>'
    return "\n".join([head, f"<style>{style}</style>", f'<text x="0" y="14">{title}</text>', *lines, "</svg>", ""])
