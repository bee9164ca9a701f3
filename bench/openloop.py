"""Requests at a fixed rate, whatever the server does. A latency counts from the moment when its request was due.

    python -m bench.openloop PORT --rate 500 --seconds 10 < requests.json

A generator that waits for answers before it asks again asks less while a server is slow, and so leaves out what would
have been slowest ("coordinated omission"). Here a request is due at its time: it takes a free connection, or waits for
one, and that wait is part of its latency. Without a rate all are due at once: the connections are always busy, and
latencies say nothing.
Standard input has the requests to send in turn, a JSON list of what goes over the wire; the output is one JSON object.
"""

import argparse
import asyncio
import gc
import json
import re
import selectors
import sys
import time
from collections import deque

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
GRACE = 10.0  # seconds for what is still under way at the end


class Generator:
    """Sends what is due, and notes what becomes of it."""

    def __init__(self, port: int, requests: list[bytes], drops: bool = False) -> None:
        self.port, self.requests, self.drops = port, requests, drops
        self.due: deque[float] = deque()
        self.free: deque[Connection] = deque()
        self.busy: set[Connection] = set()
        self.latencies: list[float] = []
        self.late: list[float] = []  # how late this generator was itself
        self.failed = self.sent = self.unsent = 0
        self.connecting: set[asyncio.Task[None]] = set()  # the loop itself keeps no task alive

    async def run(self, connections: int, count: int, rate: float) -> dict[str, float]:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(self.connect() for _ in range(connections)))
        began = time.perf_counter()
        for number in range(count):
            due = began + number / rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
                self.late.append(time.perf_counter() - due)
            self.due.append(due)
            self.send()
            if self.drops:
                self.unsent += len(self.due)
                self.due.clear()
                if wait <= 0:
                    await asyncio.sleep(0)  # else a rate that is never reached would leave no time for answers
        end = loop.time() + GRACE + (0.0 if rate < float("inf") else count / 50)  # on a busy machine
        while len(self.latencies) + self.failed + self.unsent < count and loop.time() < end:
            await asyncio.sleep(0.002)
        now = time.perf_counter()
        unfinished = [*self.due, *(connection.due for connection in self.busy)]
        self.latencies += [now - due for due in unfinished]  # at least
        figures = {
            "requests": count,
            "unsent": self.unsent,
            "failed": self.failed,
            "unfinished": len(unfinished),
            "elapsed": now - began,
        }
        return figures | {
            "p50": percentile(self.latencies, 50),
            "p99": percentile(self.latencies, 99),
            "max": max(self.latencies, default=0.0),
            "late_p99": percentile(self.late, 99),
        }

    async def connect(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: Connection(self), "127.0.0.1", self.port)
        except OSError:
            await asyncio.sleep(0.05)
            await self.connect()

    def send(self) -> None:
        while self.due and self.free:
            connection = self.free.popleft()
            if connection.transport.is_closing():
                continue
            self.busy.add(connection)
            connection.ask(self.due.popleft(), self.requests[self.sent % len(self.requests)])
            self.sent += 1


class Connection(asyncio.Protocol):
    """One connection, with one request at a time. When the server closes it, another takes its place."""

    transport: asyncio.Transport

    def __init__(self, generator: Generator) -> None:
        self.generator, self.due, self.answer = generator, 0.0, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.generator.free.append(self)
        self.generator.send()

    def ask(self, due: float, request: bytes) -> None:
        self.due, self.answer = due, b""
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.answer += data
        head, mark, body = self.answer.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        whole = len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n")  # else it comes in chunks
        if not (mark and whole and self in self.generator.busy):
            return
        self.generator.busy.remove(self)
        if head.startswith(b"HTTP/1.1 200 "):
            self.generator.latencies.append(time.perf_counter() - self.due)
        else:
            self.generator.failed += 1
        if b"\r\nconnection: close" in head.lower():
            self.transport.close()
        else:
            self.generator.free.append(self)
            self.generator.send()

    def connection_lost(self, reason: Exception | None) -> None:
        if self in self.generator.busy:
            self.generator.busy.remove(self)
            self.generator.failed += 1
        task = asyncio.get_running_loop().create_task(self.generator.connect())
        self.generator.connecting.add(task)
        task.add_done_callback(self.generator.connecting.discard)


def percentile(values: list[float], percent: int) -> float:
    """Return the smallest value that so many of a hundred do not exceed; 0 of none."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)] if values else 0.0


def main() -> None:
    """Run once and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m bench.openloop", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("port", type=int)
    parser.add_argument("--rate", type=float, default=float("inf"), help="requests a second")
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--count", type=int, default=0, help="requests, instead of seconds")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--drop", action="store_true", help="what finds no free connection is not sent")
    given = parser.parse_args()
    generator = Generator(given.port, [request.encode() for request in json.load(sys.stdin)], given.drop)
    gc.disable()  # its pauses would count as the server's
    count = given.count or round(given.rate * given.seconds)
    # epoll, which asyncio would take, rounds a wait up to a millisecond; select does not.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        print(json.dumps(runner.run(generator.run(given.connections, count, given.rate))))


if __name__ == "__main__":
    main()
