"""The wire to SLS: its SDK's client with our errors, and credentials that are renewed while it runs."""

import configparser
import json
import re
import socket
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Any

import requests
from aliyun.log import LogClient, LogException
from aliyun.log.credentials import Credentials, CredentialsProvider
from aliyun.log.log_logs_raw_pb2 import LogGroupRaw

from settings import Settings
from sls.shipper import SLSError

TOPIC = "model_service_monitor"
METADATA = "http://100.100.100.200/latest"  # of an ECS instance
OIDC = ("ALIBABA_CLOUD_OIDC_TOKEN_FILE", "ALIBABA_CLOUD_ROLE_ARN", "ALIBABA_CLOUD_OIDC_PROVIDER_ARN")
RENEW = 600.0  # seconds before they expire that temporary credentials are renewed, or at half their life


class Client(LogClient):  # type: ignore[misc]  # the SDK's types are left out
    """The SDK's client, but it raises SLSError instead of LogException.

    It does so as soon as the SDK sees an error, so the SDK's own retries (ten, a second apart) are off.
    """

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        """Connect to nothing yet: the first request finds out whether settings and credentials work."""
        self.project, self.logstore = settings.sls_project, settings.sls_logstore
        self._credentials = RenewedCredentials(find_credentials(environ))
        endpoint = settings.sls_endpoint
        super().__init__(
            endpoint if "://" in endpoint else f"https://{endpoint}",
            source=socket.gethostname(),  # without it, the SDK looks up its own name
            auth_version="v4" if settings.sls_region else "v1",
            region=settings.sls_region,
            credentials_provider=self._credentials,
        )
        self.timeout = (3, 10)  # seconds to connect, and to answer

    def send(self, records: list[dict[str, Any]]) -> None:
        """Store records, in one call. Raises: SLSError."""
        group = LogGroupRaw(Topic=TOPIC, Source=socket.gethostname())
        for record in records:
            seconds, microseconds = divmod(round(record["time"] * 1e6), 10**6)
            # One call with all contents: a call for each would cost twice as much.
            contents = [
                {"Key": key, "Value": (value if type(value) is str else _to_string(value)).encode()}
                for key, value in record.items()
                if key != "time"
            ]
            group.Logs.add(Time=seconds, Time_ns=microseconds * 1000, Contents=contents)
        self.put_log_raw(self.project, self.logstore, group)

    def _send(self, *arguments: Any, **named: Any) -> Any:
        try:
            return super()._send(*arguments, **named)
        except SLSError as error:
            if error.is_transient or error.status not in (401, 403) or not self._credentials.renew():
                raise
            return super()._send(*arguments, **named)  # they were replaced before they expired

    def _sendRequest(self, *arguments: Any, **named: Any) -> Any:  # noqa: N802  # the SDK's name
        try:
            return super()._sendRequest(*arguments, **named)
        except LogException as error:
            message = self._credentials.redact(str(error.get_error_message()))
            raise SLSError(error.get_error_code(), message[:500], error.get_resp_status()) from None


def _to_string(value: Any) -> str:
    """Write a value as SLS takes it: it has only strings."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


# --- credentials


Fetched = tuple[Credentials, float, float]  # in how many seconds to renew them, and in how many they expire


def find_credentials(environ: Mapping[str, str]) -> Callable[[], Fetched]:
    """Return how to get credentials, by the first of Alibaba Cloud's conventional variables that is set.

    ALIBABA_CLOUD_ACCESS_KEY_ID and ..._SECRET, with ALIBABA_CLOUD_SECURITY_TOKEN if they are temporary;
    ALIBABA_CLOUD_OIDC_TOKEN_FILE, ..._ROLE_ARN and ..._OIDC_PROVIDER_ARN: the RAM role of a service account in ACK
    (RRSA); STS changes the account's token, read again each time, for credentials;
    ALIBABA_CLOUD_CREDENTIALS_FILE: an INI file, read again while we run, whose section ALIBABA_CLOUD_PROFILE
    (`default`) holds `access_key_id`, `access_key_secret` and perhaps `security_token`;
    ALIBABA_CLOUD_CREDENTIALS_URI: a URL that returns them in the form of the ECS metadata service;
    else the RAM role of this ECS instance: ALIBABA_CLOUD_ECS_METADATA, or the one that it has.
    """
    if environ.get("ALIBABA_CLOUD_ACCESS_KEY_ID"):
        names = [f"ALIBABA_CLOUD_{name}" for name in ("ACCESS_KEY_ID", "ACCESS_KEY_SECRET", "SECURITY_TOKEN")]
        return lambda: (_credentials(environ, *names), inf, inf)
    # A role alone may be meant for something else.
    if environ.get("ALIBABA_CLOUD_OIDC_TOKEN_FILE") or environ.get("ALIBABA_CLOUD_OIDC_PROVIDER_ARN"):
        return lambda: _from_oidc(environ)
    if path := environ.get("ALIBABA_CLOUD_CREDENTIALS_FILE"):
        return lambda: _from_file(Path(path).expanduser(), environ.get("ALIBABA_CLOUD_PROFILE") or "default")
    if uri := environ.get("ALIBABA_CLOUD_CREDENTIALS_URI"):
        return lambda: _from_response(_request("GET", uri))
    return lambda: _from_ecs(environ.get("ALIBABA_CLOUD_ECS_METADATA", ""))


def _credentials(found: Mapping[str, str], key_id: str, secret: str, token: str) -> Credentials:
    if not (found.get(key_id) and found.get(secret)):
        raise KeyError(f"{key_id} and {secret} are not both set")
    return Credentials(found[key_id], found[secret], found.get(token) or "")


def _parts(found: Credentials) -> set[str]:
    return {found.get_access_key_id(), found.get_access_key_secret(), found.get_security_token()}


def _from_file(path: Path, section: str) -> Fetched:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(path.read_text("utf-8"))
    return _credentials(parser[section], "access_key_id", "access_key_secret", "security_token"), 5.0, inf


def _from_oidc(environ: Mapping[str, str]) -> Fetched:
    """Let STS change a service account's token for credentials of a RAM role.

    https://www.alibabacloud.com/help/en/ram/api-assumerolewithoidc; the variables are those of Alibaba's own SDKs.
    """
    if missing := [name for name in OIDC if not environ.get(name)]:
        raise KeyError(f"{' and '.join(missing)} not set; {', '.join(OIDC)} belong together")
    token_file, role, provider = (environ[name] for name in OIDC)
    region = environ.get("ALIBABA_CLOUD_STS_REGION")
    by_vpc = environ.get("ALIBABA_CLOUD_VPC_ENDPOINT_ENABLED", "").lower() == "true"
    default = f"{'sts-vpc' if by_vpc else 'sts'}.{region}.aliyuncs.com" if region else "sts.aliyuncs.com"
    endpoint = environ.get("ALIBABA_CLOUD_STS_ENDPOINT") or default
    form = {
        **{"Action": "AssumeRoleWithOIDC", "Version": "2015-04-01", "Format": "JSON"},
        "Timestamp": datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **{"RoleArn": role, "OIDCProviderArn": provider},
        "OIDCToken": Path(token_file).read_text("utf-8").strip(),
        "RoleSessionName": environ.get("ALIBABA_CLOUD_ROLE_SESSION_NAME") or "prediction-server",
    }
    try:
        answer = _request("POST", endpoint if "://" in endpoint else f"https://{endpoint}", form=form)
    except requests.HTTPError as error:
        status, text = (error.response.status_code, error.response.text) if error.response is not None else (0, "")
        found = re.search(r'"Code"\s*:\s*"([A-Za-z0-9.]{1,80})"', text)  # its message may quote the token
        raise KeyError(f"STS answered {status} {found[1] if found else ''}".strip()) from None
    return _from_response(json.dumps(json.loads(answer)["Credentials"]))


def _from_ecs(role: str) -> Fetched:
    # A hardened instance requires the token; others ignore it.
    token = _request("PUT", f"{METADATA}/api/token", {"X-aliyun-ecs-metadata-token-ttl-seconds": "60"})
    proof = {"X-aliyun-ecs-metadata-token": token}
    roles = f"{METADATA}/meta-data/ram/security-credentials/"
    return _from_response(_request("GET", roles + (role or _request("GET", roles, proof).strip()), proof))


def _from_response(body: str) -> Fetched:
    """Read the metadata service's JSON: AccessKeyId, AccessKeySecret, SecurityToken, Expiration (UTC)."""
    content = json.loads(body)
    expires = datetime.strptime(content["Expiration"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    left = expires.timestamp() - time.time()
    found = _credentials(content, "AccessKeyId", "AccessKeySecret", "SecurityToken")
    return found, max(left / 2, left - RENEW), left


def _request(
    method: str, url: str, headers: Mapping[str, str] | None = None, form: Mapping[str, str] | None = None
) -> str:
    with requests.Session() as session:
        session.trust_env = False  # credentials do not go through a proxy
        response = session.request(method, url, headers=headers, data=form, timeout=(1, 5))
    response.raise_for_status()
    return response.text


class RenewedCredentials(CredentialsProvider):  # type: ignore[misc]  # the SDK's types are left out
    """Credentials that are fetched again before they expire; if that fails, the old ones while they last."""

    def __init__(self, fetch: Callable[[], Fetched]) -> None:
        self._fetch = fetch
        self._credentials: Credentials | None = None
        self._renew_at = self._expire_at = 0.0  # seconds of the monotonic clock
        self._seen: set[str] = set()  # every key that was ever used here

    def get_credentials(self) -> Credentials:
        """Return credentials that are valid now; the SDK calls this for each signature. Raises: SLSError."""
        now = time.monotonic()
        if now >= self._renew_at:
            try:
                self._credentials, renew_in, expire_in = self._fetch()
            except (OSError, ValueError, LookupError, TypeError, configparser.Error) as error:
                if now >= self._expire_at:
                    # A parser's message would quote what it could not read.
                    detail = error.args[0] if isinstance(error, KeyError) else getattr(error, "strerror", None)
                    why = f"{type(error).__name__}{f', {detail}' if detail else ''}"
                    raise SLSError("NoCredentials", f"there are no credentials ({why})", 0) from None
            else:
                self._renew_at, self._expire_at = now + renew_in, now + expire_in
                self._seen |= _parts(self._credentials)
        return self._credentials

    def renew(self) -> bool:
        """Fetch them again; return whether they have changed."""
        old, self._renew_at = self._credentials, 0.0
        return old is not None and _parts(self.get_credentials()) != _parts(old)

    def redact(self, message: str) -> str:
        """Return a message without the keys."""
        for secret in sorted(self._seen - {""}, key=len, reverse=True):
            message = message.replace(secret, "***")
        return message
