"""nginx with the files of deploy/ in front of a server under measurement, on this host."""

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from bench.running import NotRight, Running, free_ports
from bench.servers import ROOT

AROUND = """
daemon off; pid {place}/pid; error_log {place}/error.log; worker_processes 1; worker_rlimit_nofile 4096;
events {{ worker_connections 4000; }}
http {{
    client_body_temp_path {place}/body; proxy_temp_path {place}/proxy; fastcgi_temp_path {place}/fastcgi;
    uwsgi_temp_path {place}/uwsgi; scgi_temp_path {place}/scgi;
    {upstream}
    {front}
}}
"""


@contextmanager
def in_front(run: Running, cores: str) -> Iterator[None]:
    """Put nginx in front of a server: `run.port` is nginx's for as long."""
    place, behind, (port, unused) = run.start.place / "nginx", run.port, free_ports(2)
    place.mkdir()
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin") or sys.exit("needs nginx")
    upstream = (ROOT / "deploy/docker/upstream.conf").read_text().replace("server:5000", f"127.0.0.1:{behind}")
    front = (ROOT / "deploy/nginx/prediction-server.conf").read_text().replace("/var/log/nginx", str(place))
    front = front.replace("listen 80;", f"listen 127.0.0.1:{unused};").replace("443 ssl http2;", f"127.0.0.1:{port};")
    front = re.sub(r"(?m)^ *(ssl_|limit_(req|conn) )\S.*\n", "", front)
    (place / "nginx.conf").write_text(AROUND.format(place=place, upstream=upstream, front=front))
    command = ["taskset", "-c", cores, program, "-p", str(place), "-c", str(place / "nginx.conf"), "-e", "stderr"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        else:
            raise NotRight("nginx did not start")
        run.port = port
        yield
    finally:
        run.port = behind
        process.terminate()
        process.wait(10)
