"""The metadata service of an ECS instance on loopback: it hands out temporary credentials of the instance's RAM role.

    with LoopbackSLS() as sls, EcsMetadata(sls.accept, lifetime=4) as metadata:
        run_a_child(env=os.environ | sls.environ() | {"ALIBABA_CLOUD_CREDENTIALS_URI": metadata.credentials_uri})
        metadata.mode = "no role"  # from now on

- `PUT /latest/api/token` answers a token for `X-aliyun-ecs-metadata-token`, good for as long as the header
  `X-aliyun-ecs-metadata-token-ttl-seconds` says (1 to 21600);
- `GET /latest/meta-data/ram/security-credentials/` answers the role's name;
- `GET /latest/meta-data/ram/security-credentials/{role}` answers its credentials as JSON.

Paths, headers, JSON and the 403 are those of `view-instance-metadata` and `obtain-a-temporary-authorization-token` in
https://www.alibabacloud.com/help/en/ecs/user-guide/. Guessed are the 400 for a time to live out of range, the 403 for a
token that is unknown or over, and when a set of credentials is replaced.
"""

import json
import math
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qsl

from loopback_sls import Server, Service

ARNS = {"RoleArn": "ROLE_ARN", "OIDCProviderArn": "OIDC_PROVIDER_ARN"}  # a parameter, and its variable
TOKEN, ROLES = "/latest/api/token", "/latest/meta-data/ram/security-credentials/"


class EcsMetadata(Service):
    """One instance with one role, and how its metadata service behaves now.

    `register` is called with key id, secret, token and end (seconds of epoch) of each set of credentials before it is
    handed out. A set is replaced at half its `lifetime` (seconds, rounded up to where the clock shows a full one), so
    there is always one with more than that to live; `rotate()` replaces it at once.

    `mode` is one of `modes`: in "no role" nothing is found, in "garbage" all is answered with a page of HTML. With
    `requires_token` the instance is hardened: what bears no token is forbidden. `calls` counts requests by what they
    ask for ("token", "role", "credentials" or "other"), and by the status they get.
    """

    modes = frozenset({"ok", "no role", "garbage"})

    def __init__(
        self,
        register: Callable[[str, str, str, float], None] = lambda *_: None,
        *,
        role: str = "server-role",
        lifetime: float = 3600.0,
        requires_token: bool = False,
    ) -> None:
        super().__init__(Handler)
        self.register, self.role, self.lifetime, self.requires_token = register, role, lifetime, requires_token
        self.lock = threading.Lock()  # held for each request
        self.calls: Counter[str | int] = Counter()
        self.tokens: dict[str, float] = {}  # and their end, by the monotonic clock
        self.credentials: dict[str, str] = {}  # as answered
        self._replace_at = 0.0  # seconds of epoch

    @property
    def base(self) -> str:
        """Where it is, as http://100.100.100.200/latest is on an instance."""
        return f"http://127.0.0.1:{self.port}/latest"

    @property
    def credentials_uri(self) -> str:
        return f"http://127.0.0.1:{self.port}{ROLES}{self.role}"

    def rotate(self) -> None:
        """Make a new set of credentials, which those that ask from now on get. The old ones live on until their end."""
        now = time.time()
        end = math.ceil(now + self.lifetime)
        self._replace_at = now + self.lifetime / 2
        key_id, secret, token = f"STS.{uuid.uuid4().hex}", uuid.uuid4().hex, uuid.uuid4().hex
        self.register(key_id, secret, token, end)
        self.credentials = {
            "AccessKeyId": key_id,
            "AccessKeySecret": secret,
            "SecurityToken": token,
            "Expiration": in_utc(end),
            "LastUpdated": in_utc(now),
            "Code": "Success",
        }

    def answer(self, method: str, path: str, headers: Any, _: str = "") -> tuple[int, str]:
        """Return status and body."""
        asked = {("PUT", TOKEN): "token", ("GET", ROLES): "role", ("GET", ROLES + self.role): "credentials"}
        self.calls[asked.get((method, path), "other")] += 1
        if self.mode == "garbage":
            return 200, "<html>Log in to the hotel's network</html>"
        if (method, path) == ("PUT", TOKEN):
            return self._make_token(headers.get("X-aliyun-ecs-metadata-token-ttl-seconds", ""))
        token = headers.get("X-aliyun-ecs-metadata-token")
        if (token or self.requires_token) and self.tokens.get(token, 0) < time.monotonic():
            return 403, "Forbidden"
        if (method, path) not in asked or self.mode == "no role":
            return 404, "Not Found"
        if path == ROLES:
            return 200, self.role
        if time.time() >= self._replace_at:
            self.rotate()
        return 200, json.dumps(self.credentials, indent=2)

    def _make_token(self, seconds: str) -> tuple[int, str]:
        if not (seconds.isdecimal() and 1 <= int(seconds) <= 21600):
            return 400, "Bad Request"
        token = uuid.uuid4().hex
        self.tokens[token] = time.monotonic() + int(seconds)
        return 200, token


class Sts(EcsMetadata):
    """STS, which changes a service account's token for such credentials: `AssumeRoleWithOIDC`.

    Parameters and answer are those of https://www.alibabacloud.com/help/en/ram/api-assumerolewithoidc, which lists no
    errors: the codes here are guessed. `token` is the one that counts now; `session` is the last session's name.
    """

    token = "a.jwt.token"
    session = ""

    @property
    def environ(self) -> dict[str, str]:
        """What the pod identity webhook sets, but the path of the token; and where STS is."""
        return {
            "ALIBABA_CLOUD_ROLE_ARN": "acs:ram::1:role/server-role",
            "ALIBABA_CLOUD_OIDC_PROVIDER_ARN": "acs:ram::1:oidc-provider/ack-rrsa-c1",
            "ALIBABA_CLOUD_STS_ENDPOINT": f"http://127.0.0.1:{self.port}",
        }

    def answer(self, method: str, path: str, headers: Any, form: str = "") -> tuple[int, str]:
        """Return status and body."""
        given = dict(parse_qsl(form, strict_parsing=True))
        self.calls["credentials"] += 1
        assert (method, path) == ("POST", "/"), "the token must not be in a path, which is logged"
        expected = {"Action": "AssumeRoleWithOIDC", "Version": "2015-04-01", "Format": "JSON"}
        arns = {name: self.environ[f"ALIBABA_CLOUD_{each}"] for name, each in ARNS.items()}
        if given.keys() != {*expected, *arns, "OIDCToken", "RoleSessionName", "Timestamp"}:
            return 400, json.dumps({"Code": "InvalidParameter", "Message": form})
        if not (expected | arns).items() <= given.items() or not re.fullmatch(
            r"[\w.@-]{2,64}", given["RoleSessionName"]
        ):
            return 400, json.dumps({"Code": "InvalidParameter.RoleArn", "Message": form})
        if given["OIDCToken"] != self.token:
            return 400, json.dumps({"Code": "AuthenticationFail.OIDCToken.Expired", "Message": form})
        if abs(time.time() - datetime.strptime(given["Timestamp"], "%Y-%m-%dT%H:%M:%S%z").timestamp()) > 900:
            return 400, json.dumps({"Code": "InvalidTimeStamp.Expired"})
        if time.time() >= self._replace_at:
            self.rotate()
        self.session = given["RoleSessionName"]
        return 200, json.dumps({"RequestId": "1", "Credentials": self.credentials})


def in_utc(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.0: a connection for each request."""

    server: Server

    def respond(self) -> None:
        metadata = self.server.service
        with metadata.lock:
            form = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            status, text = metadata.answer(self.command, self.path, self.headers, form)
            metadata.calls[status] += 1
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = respond  # noqa: N815 - the names http.server looks for

    def log_message(self, *_: object) -> None:
        """Say nothing."""
