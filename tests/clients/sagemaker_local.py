"""The local client of SageMaker's own SDK, which asks a container, and its splitting of a file for batch transform."""

# needs: sagemaker-core==2.27.0
# model: iris
# server: EXTENSIONS=+endpoints.sagemaker AUTH=off

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

from sagemaker.core.local.data import get_batch_strategy_instance, get_splitter_instance
from sagemaker.core.local.local_session import LocalSagemakerRuntimeClient

TRUTH = json.loads(Path(sys.argv[2]).read_text())
STRATEGIES = {"MULTI_RECORD": "MultiRecord", "SINGLE_RECORD": "SingleRecord"}
CLIENT = LocalSagemakerRuntimeClient({"local": {"serving_port": int(sys.argv[1].rpartition(":")[2])}})


def invoke(body: Any, **options: str) -> bytes:
    """Return the answer's body."""
    answer: bytes = CLIENT.invoke_endpoint(body, "iris", **options)["Body"].read()
    return answer


def transform(content: str, content_type: str, strategy: str, megabytes: float) -> tuple[str, int]:
    """Return what batch transform writes for a file with AssembleWith: Line, and how many requests that took."""
    file = Path("in")
    file.write_text(content)
    bodies = list(get_batch_strategy_instance(strategy, get_splitter_instance("Line")).pad(str(file), megabytes))
    return "".join(invoke(body, ContentType=content_type).decode() + "\n" for body in bodies), len(bodies)


def main() -> None:
    """Ask, then transform files."""
    rows, labels = TRUTH["rows"], TRUTH["predict"]
    assert json.loads(invoke(json.dumps(rows))) == labels  # without a type
    assert json.loads(invoke(json.dumps({"data": rows}), ContentType="application/json")) == {"prediction": labels}
    lines = {
        "text/csv": [",".join(map(repr, row)) for row in rows],
        "application/jsonlines": list(map(json.dumps, rows)),
    }
    with urllib.request.urlopen(f"{sys.argv[1]}/execution-parameters") as answer:
        parameters = json.load(answer)
    expected = "".join(f"{label}\n" for label in labels)
    for content_type, each in lines.items():
        for content in ("\n".join(each), "".join(f"{line}\n" for line in each)):
            assert invoke(content, ContentType=content_type).decode() == expected.removesuffix("\n")
            found = transform(
                content, content_type, STRATEGIES[parameters["BatchStrategy"]], parameters["MaxPayloadInMB"]
            )
            assert found == (expected, 1)
            found, count = transform(content, content_type, "MultiRecord", 200 / 2**20)
            assert found == expected
            assert 1 < count < len(rows)
            assert transform(content, content_type, "SingleRecord", 6) == (expected, len(rows))


main()
