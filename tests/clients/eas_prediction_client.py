"""EAS's own client, with and without a token, through a gateway that does what EAS does before a container."""

# needs: eas-prediction==0.36
# model: iris
# server: EXTENSIONS=+endpoints.eas AUTH=off

import json
import sys
from pathlib import Path

from eas_prediction import PredictClient, PredictException, StringRequest, TFRequest
from gateway import Gateway

TRUTH = json.loads(Path(sys.argv[2]).read_text())
PREFIX = "/api/predict/iris"


def path_of(path: str) -> str | None:
    """Return the container's path for one of the platform."""
    return path.removeprefix(PREFIX) or "/" if path.startswith(PREFIX) else None


def main() -> None:
    """Ask."""
    gateway = Gateway(sys.argv[1], path_of, {"content-type"})  # the token is the platform's
    for token in (None, "a token"):
        client = PredictClient(gateway.url, "iris")
        if token:
            client.set_token(token)
        client.init()

        def ask(content: object, client: PredictClient = client) -> object:
            return json.loads(client.predict(StringRequest(json.dumps(content))).response_data)

        assert ask(TRUTH["rows"]) == TRUTH["predict"]
        assert ask({"data": TRUTH["rows"]}) == {"prediction": TRUTH["predict"]}
        proba = ask({"data": TRUTH["rows"], "method": "predict_proba"})
        assert proba == {"prediction": TRUTH["predict_proba"], "classes": [0, 1, 2]}  # to the bit
        tensors = TFRequest("serving_default")
        tensors.add_feed("inputs", [1, 4], TFRequest.DT_FLOAT, TRUTH["rows"][0])
        for request, words in (
            (StringRequest("[[1, 2]]"), "2 values; expected 4"),
            (StringRequest(""), "the body is empty"),
            (tensors, "StringRequest"),
        ):
            try:
                client.predict(request)
            except PredictException as error:
                assert words in str(error), error
            else:
                raise AssertionError(f"not refused: {words}")


main()
