"""Attacks on a server's connections, in a process of their own so that who measures is not slowed down by them.

    python tests/hostile/attacks.py ATTACK PORT CONNECTIONS http|https again|once [AUTHORIZATION]

Each goes on until the process is killed, on a thread for each connection; with `again`, one that is cut off begins
again.
"""

import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

AUTHORIZATION = f"Authorization: {sys.argv[6]}\r\n" if len(sys.argv) > 6 else ""


def head(line: str, *fields: str) -> bytes:
    """Return a request's head, with the password if there is one. It has 128 bytes or more: so many fill a read."""
    lines = f"{line} HTTP/1.1\r\nHost: a\r\n{AUTHORIZATION}", *(f"{each}\r\n" for each in fields), "X-Pad: "
    return "".join(lines).ljust(124, "x").encode() + b"\r\n\r\n"


def chunks(connection: socket.socket) -> None:
    """Send a body in chunks of one byte."""
    connection.sendall(head("POST /predict", "Content-Type: application/json", "Transfer-Encoding: chunked"))
    while True:
        connection.sendall(b"1\r\n \r\n" * 10_000)


def read(connection: socket.socket) -> None:
    """Read answers to their end."""
    with suppress(OSError):
        while connection.recv(2**20):
            pass


def pipeline(connection: socket.socket, line: str = "GET /model") -> None:
    """Send requests without waiting for their answers, which are read."""
    threading.Thread(target=read, args=(connection,), daemon=True).start()
    while True:
        connection.sendall(head(line) * 1000)


def pipeline_not_simple(connection: socket.socket) -> None:
    """Do the same with requests that gunicorn itself reads."""
    pipeline(connection, "GET /model?a='b'")


def fall_silent(connection: socket.socket) -> None:
    """Send requests for a second, and read no answer."""
    connection.settimeout(1.0)
    until = time.monotonic() + 1.0
    with suppress(TimeoutError):
        while time.monotonic() < until:
            connection.sendall(head("GET /model") * 1000)
    time.sleep(600)


def unread(connection: socket.socket, line: str = "GET /model") -> None:
    """Read no answer, of which little fits in buffers."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sendall(head(line) * 10_000)
    time.sleep(600)


def unread_not_simple(connection: socket.socket) -> None:
    """Do the same with requests that gunicorn itself reads."""
    unread(connection, "GET /model?a='b'")


def unread_large(connection: socket.socket) -> None:
    """Read nothing of an answer that fits in no buffer."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    body = b'{"data": [%s], "method": "predict_proba"}' % b", ".join([b"[5.1, 3.5, 1.4, 0.2]"] * 80_000)
    connection.sendall(head("POST /predict", "Content-Type: application/json", f"Content-Length: {len(body)}") + body)
    time.sleep(600)


def half_body(connection: socket.socket) -> None:
    """Send half a body, and wait until the server gives up."""
    connection.sendall(head("POST /predict", "Content-Type: application/json", "Content-Length: 1000") + b"[" * 500)
    read(connection)


def half_handshake(connection: socket.socket) -> None:
    """Connect, and wait until the server gives up."""
    read(connection)


def malformed(connection: socket.socket) -> None:
    """Send a request line that is none."""
    connection.sendall(b"GET\r\n\r\n")
    read(connection)


ATTACKS: dict[str, Callable[[socket.socket], None]] = {
    each.__name__: each
    for each in (
        *(chunks, pipeline, pipeline_not_simple, fall_silent, unread, unread_not_simple, half_body, half_handshake),
        *(malformed, unread_large),
    )
}


def attack(name: str, port: int, over: str, how_often: str) -> None:
    """Attack once, or again and again."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=600) as connection:
            if over == "https" and name != "half_handshake":
                connection = context.wrap_socket(connection)
            ATTACKS[name](connection)
        if how_often == "once":
            time.sleep(600)


if __name__ == "__main__":
    arguments = (sys.argv[1], int(sys.argv[2]), *sys.argv[4:6])
    for _ in range(int(sys.argv[3])):
        threading.Thread(target=attack, args=arguments).start()
