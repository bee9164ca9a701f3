"""A stop resets no connection that is being opened: the kernel drops new ones before the workers accept the last.

An extension (EXTENSIONS in settings.py). A worker that stops takes the connections that wait in the listener's queue
before it closes its listener (workers.py). One that came between these two, while no other worker listened, would be
reset by the kernel. So the listener is first told to drop SYN packets, by a filter. A client that connects meanwhile
sends its SYN again a second later, and is then refused.

Not where others go on with the same listener: systemd, or a new master after SIGUSR2. gunicorn: wraps `stop` of its
master. Linux: socket(7), SO_ATTACH_FILTER, whose program gets a packet from its TCP header on.
"""

import socket
import struct
import time
from array import array
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flask import Flask

    from server import Service

SO_ATTACH_FILTER = 26  # Python does not name it
HANDSHAKE = 0.1  # seconds for which handshakes that have begun may go on
# As (code, jump if true, jump if false, operand), from linux/filter.h: load the flags, the header's byte 13; leave SYN
# and ACK of them; is it SYN alone? Then take nothing of the packet, else all.
NO_SYN = [(0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF)]


def init_app(app: "Flask", service: "Service") -> None:
    """Do nothing: a stop begins in gunicorn's master."""


def master_ready(server: Any) -> None:
    """Let gunicorn's master drop new connections when it begins to stop."""
    stop = server.stop

    def drop_new_and_stop(graceful: bool = True) -> None:
        if graceful and not (server.systemd or server.reexec_pid or server.master_pid):
            drop_new(server.LISTENERS)
            time.sleep(HANDSHAKE)
        stop(graceful)

    server.stop = drop_new_and_stop


def drop_new(listeners: Any) -> None:
    """Let the kernel drop the first packet of each new connection, where it can."""
    program = array("B", b"".join(struct.pack("HBBI", *each) for each in NO_SYN))
    for listener in listeners:
        if isinstance(listener.getsockname(), tuple):  # not a Unix socket
            with suppress(OSError):  # not Linux, or a sandbox without filters
                listener.setsockopt(
                    socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(NO_SYN), program.buffer_info()[0])
                )
