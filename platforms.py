"""The platforms that start this server, and the settings that each needs: a mapping from one environment to another.

    defaults, message = defaults_for({"K_SERVICE": "iris", "PORT": "8080"})   # GRACEFUL_TIMEOUT=8, KEEPALIVE=75, …

A platform is detected by a variable that it sets, or named by PLATFORM. What the user has set is never changed, and
AUTH never: that the platform authenticates callers is for the user to say. docs/clouds.md has this as a table.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from settings import SettingsError

# Of several variables the first counts. Knative sets K_SERVICE as well, where a disk may be larger than on Cloud Run.
DETECTED_BY = {
    "AIP_HTTP_PORT": "vertex",
    "FC_FUNCTION_NAME": "function-compute",
    "AWS_LAMBDA_FUNCTION_NAME": "lambda",
    "K_SERVICE": "cloud-run",
}
# What platforms and their tools call PORT. The first that is set counts, on any platform.
PORTS = ("AIP_HTTP_PORT", "SAGEMAKER_BIND_TO_PORT", "FC_CUSTOM_LISTEN_PORT", "FC_SERVER_PORT")
MB, MIB = 10**6, 2**20  # bytes
IN_TMP = "/tmp/prediction-server/journal"  # noqa: S108  # all else may be read-only there; one container, one user

# Settings as a user would write them. Those that are as the server's own default are not repeated. A drain ends before
# the platform kills; an idle connection is kept for longer than the platform's proxy keeps it, or the proxy would send
# a request into one that is being closed. WORKER_TIMEOUT is 0 on platforms that stop all processes between requests.
PLATFORMS: dict[str, dict[str, Any]] = {
    "sagemaker": {"GRACEFUL_TIMEOUT": 25, "KEEPALIVE": 75, "WORKER_TIMEOUT": 65, "MAX_BODY_BYTES": 25 * MB}
    | {"PREDICT_TIMEOUT": 60, "JOURNAL_DIR": IN_TMP, "PORT": 8080}
    | {"REQUEST_ID_HEADERS": "X-Request-ID,X-Amzn-SageMaker-Inference-Id"},
    "ecs": {"GRACEFUL_TIMEOUT": 25, "KEEPALIVE": 75, "PORT": 8080},
    "sae": {"GRACEFUL_TIMEOUT": 25, "KEEPALIVE": 75, "PORT": 8080},
    "eas": {"GRACEFUL_TIMEOUT": 25, "KEEPALIVE": 75, "WORKER_TIMEOUT": 65, "PREDICT_TIMEOUT": 60, "PORT": 8000},
    "vertex": {"GRACEFUL_TIMEOUT": 25, "KEEPALIVE": 75, "WORKER_TIMEOUT": 65, "MAX_BODY_BYTES": 10 * MB}
    | {"PREDICT_TIMEOUT": 60, "JOURNAL_MAX_BYTES": 200 * MB, "PORT": 8080}
    | {"REQUEST_ID_HEADERS": "X-Request-ID,X-Cloud-Trace-Context/"},
    # The journal is in memory there.
    "cloud-run": {"GRACEFUL_TIMEOUT": 8, "KEEPALIVE": 75, "WORKER_TIMEOUT": 0, "MAX_BODY_BYTES": 32 * MIB}
    | {"PREDICT_TIMEOUT": 300, "JOURNAL_MAX_BYTES": 64 * MB, "PORT": 8080}
    | {"REQUEST_ID_HEADERS": "X-Request-ID,X-Cloud-Trace-Context/"},
    # No variable has the function's own `timeout`: deploy files set PREDICT_TIMEOUT to it.
    "function-compute": {"GRACEFUL_TIMEOUT": 5, "KEEPALIVE": 900, "WORKER_TIMEOUT": 0, "MAX_BODY_BYTES": 32 * MB}
    | {"JOURNAL_MAX_BYTES": 200 * MB, "PORT": 9000}
    | {"REQUEST_ID_HEADERS": "X-Request-ID,X-Fc-Request-Id"},
    "lambda": {"KEEPALIVE": 900, "WORKER_TIMEOUT": 0, "PREDICT_TIMEOUT": 900, "JOURNAL_MAX_BYTES": 64 * MB}
    | {"JOURNAL_DIR": IN_TMP, "WEB_CONCURRENCY": 1, "PORT": 8080},
}
# The endpoints that a platform calls, as extensions.
ENDPOINTS = {
    "sagemaker": "endpoints.sagemaker",
    "eas": "endpoints.eas",
    "vertex": "endpoints.vertex",
    "function-compute": "endpoints.function_compute",
}


def defaults_for(environ: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Return the variables to use instead of those that are unset, and a line for the log; nothing on no platform.

    EXTENSIONS is the exception: to what the user has set there, the endpoints of the platform are added.

    Raises: SettingsError, PLATFORM is none of these, or a variable of the platform has a wrong value.
    """
    detected = next(((name, each) for name, each in DETECTED_BY.items() if environ.get(name)), ("", ""))
    variable, platform = ("PLATFORM", environ["PLATFORM"]) if environ.get("PLATFORM") else detected
    if platform and platform not in PLATFORMS:
        raise SettingsError(f"PLATFORM={platform!r}: expected one of {', '.join(PLATFORMS)}, or none to detect it")
    defaults = PLATFORMS.get(platform, {}) | _batch_transform(environ, platform)
    if port := next((name for name in PORTS if environ.get(name)), ""):
        defaults |= {"PORT": _whole_number(environ, port, 65535, "a TCP port")}
        variable = variable or port
    if platform:
        defaults |= {"HOST": "0.0.0.0"}  # noqa: S104  # the platform's proxy comes from outside of the container
    changed = {name: str(value) for name, value in defaults.items() if not environ.get(name)}
    notes = [f"{name}={value}" for name, value in changed.items()]
    endpoint, given = ENDPOINTS.get(platform, ""), environ.get("EXTENSIONS", "").replace(" ", "").split(",")
    if endpoint and not _is_there(endpoint):
        notes.append(f"(without {endpoint}: its module is not installed)")
    elif endpoint and all(entry[:1] in ("", "+", "-") for entry in given):  # else the user has named the whole list
        changed["EXTENSIONS"] = ",".join([f"+{endpoint}", *filter(None, given)])
        notes += [] if f"-{endpoint}" in given else [f"EXTENSIONS=+{endpoint}"]
    message = f"platform: {platform or 'unknown'} ({variable}): {' '.join(notes)}" if notes or platform else ""
    return changed | ({"PLATFORM": platform} if platform else {}), message


def _batch_transform(environ: Mapping[str, str], platform: str) -> dict[str, Any]:
    """Return what differs in a SageMaker batch transform job."""
    if platform != "sagemaker" or environ.get("SAGEMAKER_BATCH", "").lower() != "true":
        return {}
    found: dict[str, Any] = {"PREDICT_TIMEOUT": 600}
    if environ.get("SAGEMAKER_MAX_PAYLOAD_IN_MB"):  # of 2²⁰ bytes, as AWS's own splitter counts; 0 is no limit
        megabytes = _whole_number(environ, "SAGEMAKER_MAX_PAYLOAD_IN_MB", 2047, "megabytes")
        found["MAX_BODY_BYTES"] = megabytes * MIB or 2**31
    return found


def _whole_number(environ: Mapping[str, str], name: str, highest: int, unit: str) -> int:
    value = environ[name]
    if not (value.isascii() and value.isdigit() and int(value) <= highest):
        raise SettingsError(f"{name}={value!r}: expected a whole number of {unit} from 0 to {highest}")
    return int(value)


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package is not there
        return False
