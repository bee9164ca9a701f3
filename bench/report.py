"""Tables of what bench.compare measured, and the chart of the README."""

from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from bench.servers import ALL, BY_NAME, OURS

Found = list[dict[str, Any]]
SHARE = 0.7  # of the highest rate that was measured


def report(found: Found, chart: Path | None = None) -> None:
    """Print the tables; draw the chart."""
    closed = [each for each in found if each["kind"] == "closed"]
    for (model, workers, rows), here in grouped(closed, "model", "workers", "rows"):
        print(f"\n### {named(model, workers)}, {rows} row{'s' * (rows > 1)} a request: requests/s\n")
        throughput(here)
    for (model, workers), here in grouped([each for each in found if each["kind"] == "start"], "model", "workers"):
        print(f"\n### {named(model, workers)}: start and memory\n")
        start(here)
    for (model, workers, rows), here in grouped(
        [each for each in found if each["kind"] == "offered"], "model", "workers", "rows"
    ):
        print(f"\n### {named(model, workers)}, {rows} row{'s' * (rows > 1)} a request: at a fixed rate\n")
        latencies(here)
    if closed:
        others = [each["others"] for each in closed]
        print(f"\nOther processes took {median(others):.2f} cores meanwhile (median), {max(others):.2f} at most.")
        print(f"Answers other than 2xx: {sum(each['not_2xx'] for each in closed)}", end="; ")
        print(f"connections that broke or timed out: {sum(each['broken'] for each in closed)}.")
    for each in found:
        if each["kind"] == "failed":
            where = f"{each['server']}, {named(each['model'], each['workers'])}"
            print(f"\nFAILED: {where}: {each['why']}; the end of its log: {each['log'].rpartition(chr(10))[2]}")
    if chart:
        chart.write_text(draw(closed))


def throughput(here: Found) -> None:
    """Print the median rates by connections; behind each, how many times as much this server answers.

    That is the median of the rounds' ratios: what drifts from round to round is not in it.
    """
    columns = sorted({each["connections"] for each in here})
    table(["connections", *columns])
    for name in present(here):
        table([BY_NAME[name].title, *(rate_and_ratio(here, name, count) for count in columns)])
    if peers(here):
        best = [max((rate(here, name, count), name) for name in peers(here))[1] for count in columns]
        cells = [f"{BY_NAME[best[at]].title}: {rate_and_ratio(here, best[at], columns[at])}" for at in range(len(best))]
        table(["**best of the others**", *cells])


def rate(here: Found, name: str, connections: int) -> float:
    rates = [each["rate"] for each in here if (each["server"], each["connections"]) == (name, connections)]
    return median(rates) if rates else 0.0


def rate_and_ratio(here: Found, name: str, connections: int) -> str:
    rates = {(each["server"], each["round"]): each["rate"] for each in here if each["connections"] == connections}
    ratios = [
        rates[OURS.name, number] / value
        for (server, number), value in rates.items()
        if server == name and (OURS.name, number) in rates
    ]
    text = f"{rate(here, name, connections):.0f}"
    return text if name == OURS.name or not ratios else f"{text} (×{median(ratios):.2f})"


def start(here: Found) -> None:
    """Print the seconds until the first right answer, and the most memory that was seen."""
    table(["", "first right answer", "PSS of all its processes"])
    for name in present(here):
        own = [each for each in here if each["server"] == name]
        seconds, size = (median(each[what] for each in own) for what in ("seconds", "pss"))
        table([BY_NAME[name].title, f"{seconds:.1f} s", f"{size:.0f} MB"])


def offered(found: Found, name: str, model: str, workers: int) -> dict[int, dict[str, float]]:
    """Return the rates to ask a server at, for each number of rows: by its own highest, and by the best peer's."""
    here = [each for each in found if (each["kind"], each["model"], each["workers"]) == ("closed", model, workers)]
    rates: dict[int, dict[str, float]] = {}
    for (rows,), those in grouped(here, "rows"):
        own, best = (highest(those, names) for names in ([name], peers(those)))
        if own:
            rates[rows] = {"own": SHARE * own} | ({"best": SHARE * best} if best and not BY_NAME[name].constant else {})
    return rates


def highest(here: Found, names: list[str]) -> float:
    connections = {each["connections"] for each in here}
    return max((rate(here, name, count) for name in names for count in connections), default=0.0)


def latencies(here: Found) -> None:
    """Print the latencies of each server at 70 % of what it answers at most, and at one rate for all."""
    common = [each["rate"] for each in here if each["at"] == "best"]
    at_common = f"at {common[0]:.0f}/s, 70 % of the best peer's" if common else ""
    table(["", "70 % of its own highest", "p50", "p99", at_common, "p99"])
    for name in present(here):
        cells: list[Any] = [BY_NAME[name].title]
        for at in ("own", "best"):
            those = [each for each in here if (each["server"], each["at"]) == (name, at)]
            cells += [f"{median(each['rate'] for each in those):.0f}/s"] if at == "own" and those else []
            cells += figures(those)
        table(cells)


def figures(those: Found) -> list[str]:
    if not those:
        return ["", ""]
    if any(each["failed"] or each["unfinished"] for each in those):
        return ["cannot keep up", f"{sum(each['failed'] for each in those)} failed"]
    return [f"{median(each[what] for each in those) * 1e3:.1f} ms" for what in ("p50", "p99")]


def table(cells: list[Any]) -> None:
    """Print a row of a Markdown table, and under the first the line that makes it one."""
    print("| " + " | ".join(map(str, cells)) + " |")
    if cells[0] in ("", "connections"):
        print("|" + "---|" * len(cells))


def grouped(found: Found, *keys: str) -> list[tuple[tuple[Any, ...], Found]]:
    def by(each: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(each[key] for key in keys)

    return [(key, list(those)) for key, those in groupby(sorted(found, key=by), by)]


def named(model: str, workers: int) -> str:
    return f"{model}, {workers} worker{'s' * (workers > 1)}"


def present(here: Found) -> list[str]:
    return [server.name for server in ALL if any(each["server"] == server.name for each in here)]


def peers(here: Found) -> list[str]:
    return [name for name in present(here) if BY_NAME[name].is_peer]


def draw(closed: Found) -> str:
    """Draw requests/s at 64 connections, a row a request and one worker: a bar for each server, by model, as SVG."""
    here = [each for each in closed if (each["workers"], each["rows"], each["connections"]) == (1, 1, 64)]
    lines, y, left, width, step = [], 30, 190, 420, 20  # pixels
    for (model,), those in grouped(here, "model"):
        rates = [(rate(those, name, 64), name) for name in present(those) if not BY_NAME[name].constant]
        lines.append(f'<text x="0" y="{y}" class="model">{model}</text>')
        for value, name in sorted(rates, reverse=True):
            y += step
            length = max(1, round(value / max(rates)[0] * width))
            kind = ' class="ours"' if name == OURS.name else ""
            lines.append(f'<text x="{left - 8}" y="{y}" text-anchor="end">{BY_NAME[name].title}</text>')
            lines.append(f'<rect x="{left}" y="{y - 12}" width="{length}" height="15"{kind}/>')
            lines.append(f'<text x="{left + length + 6}" y="{y}">{value:.0f}</text>')
        y += 2 * step
    style = "text{font:13px sans-serif;fill:#24292f}.model{font-weight:bold}rect{fill:#afb8c1}.ours{fill:#0969da}"
    style += "@media(prefers-color-scheme:dark){text{fill:#d1d7e0}rect{fill:#59636e}.ours{fill:#4493f8}}"
    title = "Requests a second: 64 connections, one row each, one worker on one core"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 {y - step}" role="img"><title>{title}</title>'
    return "\n".join([head, f"<style>{style}</style>", f'<text x="0" y="12">{title}</text>', *lines, "</svg>", ""])
