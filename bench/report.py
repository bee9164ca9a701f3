"""Tables of what bench.compare measured."""

from statistics import median
from typing import Any

from bench import servers

Found = list[dict[str, Any]]


def report(found: Found) -> None:
    """Print the tables."""
    closed = [each for each in found if each["kind"] == "closed"]
    for model, workers, rows in sorted({(each["model"], each["workers"], each["rows"]) for each in closed}):
        here = [each for each in closed if (each["model"], each["workers"], each["rows"]) == (model, workers, rows)]
        columns = sorted({each["connections"] for each in here})
        print(f"\n### {model}, {workers} worker(s), {rows} row(s) a request: requests/s (ours divided by it)\n")
        print("| connections |" + "".join(f" {count} |" for count in columns))
        print("|---|" + "---|" * len(columns))
        names = [name for name in servers.BY_NAME if any(each["server"] == name for each in here)]
        for name in names:
            cells = [cell(here, name, count) for count in columns]
            print(f"| {servers.BY_NAME[name].title} |" + "".join(f" {text} |" for text in cells))
    if closed:
        others = [each["others"] for each in closed]
        print(f"\nOther processes took {median(others):.2f} cores meanwhile (median), {max(others):.2f} at most.")
        wrong = sum(each["not_2xx"] + each["broken"] for each in closed)
        print(f"Answers other than 2xx, and broken connections: {wrong}.")
    for each in found:
        if each["kind"] == "failed":
            print(f"\nFAILED {each['server']} {each['model']} {each['workers']}: {each['why']}")


def cell(here: Found, name: str, connections: int) -> str:
    """Return the median rate, and the median of the rounds' ratios to ours."""
    rates = {(each["server"], each["round"]): each["rate"] for each in here if each["connections"] == connections}
    own = [rate for (server, _), rate in rates.items() if server == name]
    ratios = [
        rates["ours", at] / rate for (server, at), rate in rates.items() if server == name and ("ours", at) in rates
    ]
    if not own:
        return ""
    return f"{median(own):.0f}" + (f" ({median(ratios):.2f})" if ratios and name != "ours" else "")
