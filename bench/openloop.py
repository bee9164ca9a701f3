"""Requests at a fixed rate, whatever the server does. A latency counts from the moment when its request was due.

    python -m bench.openloop PORT RATE SECONDS < requests.json

A generator that waits for answers before it asks again asks less while a server is slow, and so leaves out what would
have been slowest ("coordinated omission"). Here a request that finds no free connection at its time waits for one, and
that wait is part of its latency. Standard input has the requests to send in turn, a JSON list of HTTP messages.
"""

import asyncio
import gc
import itertools
import json
import re
import selectors
import sys
import time
from contextlib import suppress

import click

GRACE = 10.0  # seconds for what is still under way at the end


async def run(
    port: int, requests: list[str], rate: float, count: int, connections: int, drop: bool
) -> dict[str, float]:
    """Ask so often, and return what became of it."""
    due: asyncio.Queue[float] = asyncio.Queue()
    latencies: list[float] = []
    found, under_way, turns = {"unsent": 0, "failed": 0}, {}, itertools.cycle(map(str.encode, requests))

    async def connection(name: int) -> None:
        """Send what is due, one at a time, on one connection after another."""
        while True:
            with suppress(OSError, EOFError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                head = b""
                while b"\r\nconnection: close" not in head:
                    under_way[name] = await due.get()
                    writer.write(next(turns))
                    head = (await reader.readuntil(b"\r\n\r\n")).lower()
                    length = re.search(rb"\r\ncontent-length: *(\d+)", head)
                    await (reader.readexactly(int(length[1])) if length else reader.readuntil(b"0\r\n\r\n"))
                    began = under_way.pop(name)
                    if head.startswith(b"http/1.1 200 "):
                        latencies.append(time.perf_counter() - began)
                    else:
                        found["failed"] += 1
                writer.close()
            found["failed"] += under_way.pop(name, None) is not None
            await asyncio.sleep(0.001)

    callers = [asyncio.create_task(connection(name)) for name in range(connections)]
    await asyncio.sleep(0.5)
    start = time.perf_counter()
    for number in range(count):
        if (wait := start + number / rate - time.perf_counter()) > 0 or drop:
            await asyncio.sleep(max(0, wait))  # even at a rate that is never reached, time is left for answers
        if drop and len(under_way) + due.qsize() >= connections:
            found["unsent"] += 1
        else:
            due.put_nowait(start + number / rate)
    end = time.perf_counter() + GRACE
    while len(latencies) + sum(found.values()) < count and time.perf_counter() < end:
        await asyncio.sleep(0.002)
    answered, now = len(latencies), time.perf_counter()
    latencies += [now - began for began in under_way.values()] + [now - due.get_nowait() for _ in range(due.qsize())]
    found |= {"requests": count, "unfinished": len(latencies) - answered}
    for each in callers:
        each.cancel()
    p50, p99 = (sorted([0.0, *latencies])[len(latencies) * percent // 100] for percent in (50, 99))
    return found | {"p50": p50, "p99": p99, "answered_rate": answered / (now - start)}


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.argument("port", type=int)
@click.argument("rate", type=float)
@click.argument("seconds", type=float)
@click.option("--connections", default=64, show_default=True)
@click.option("--drop", is_flag=True, help="what finds no free connection is not sent")
def main(port: int, rate: float, seconds: float, connections: int, drop: bool) -> None:
    gc.disable()  # its pauses would count as the server's
    # epoll, which asyncio would take, rounds a wait up to a millisecond; select does not.
    asyncio.set_event_loop(loop := asyncio.SelectorEventLoop(selectors.SelectSelector()))
    found = loop.run_until_complete(run(port, json.load(sys.stdin), rate, round(rate * seconds), connections, drop))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
