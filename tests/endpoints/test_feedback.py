"""POST /feedback over HTTP: receipts on answers, truths that come later, and the figures in GET /model."""

import base64
import json
import logging
import time
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from conftest import Client, basic, records, write_users
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import mean_absolute_error, root_mean_squared_error, zero_one_loss
from sklearn.multioutput import MultiOutputClassifier

from endpoints.feedback import ClassesFiles, Feedback
from endpoints.ledger import TOO_OLD
from endpoints.truths import labels_of
from settings import Settings

IRIS = load_iris()
X, Y = IRIS.data, IRIS.target
NAMES = np.array(["setosa", "versicolor", "virginica"])
ROW = [5.1, 3.5, 1.4, 0.2]


def feedback_of(client: Client) -> Feedback:
    """Return what makes the receipts of a server."""
    hooks = [getattr(hook, "__self__", None) for hook in client.service.on_answer]
    return next(each for each in hooks if isinstance(each, Feedback))


def send(client: Client, *entries: Any) -> Any:
    """POST entries, expect 200, and return the answer."""
    answer = client.post({"feedback": list(entries)}, "/feedback", Authorization=basic("feedback"))
    assert answer.status_code == 200, answer.text
    return answer.json


def predict(client: Client, rows: Any, **headers: str) -> tuple[str, Any]:
    """POST rows; return the receipt and the predictions."""
    answer = client.post({"data": np.asarray(rows).tolist()}, **headers)
    assert answer.status_code == 200, answer.text
    return answer.headers["X-Feedback"], answer.json["prediction"]


def figures(client: Client) -> Any:
    """Return what GET /model shows of the feedback."""
    return client.get("/model").json["stable"]["feedback"]


@pytest.fixture
def client(serve: Any, iris_file: Path) -> Client:
    """A server of iris."""
    started: Client = serve(iris_file)
    return started


def test_error_rate_is_that_of_scikit_learn(serve: Any) -> None:
    client = serve(LogisticRegression(max_iter=1000).fit(X[::5], NAMES[Y[::5]]))
    entries, answered, true = [], [], []
    for at in range(0, 150, 6):
        receipt, prediction = predict(client, X[at : at + 6])
        truth: list[str | None] = [*NAMES[Y[at : at + 6]]]
        truth[0] = None
        entries.append({"receipt": receipt, "truth": truth})
        answered += prediction[1:]
        true += truth[1:]
    assert send(client, *entries[:20]) == {"accepted": 20, "duplicates": 0, "rejected": []}
    assert send(client, *entries) == {"accepted": 5, "duplicates": 20, "rejected": []}
    found = figures(client)
    assert (found["rows"], found["coverage"], found["unknown_labels"]) == (125, 125 / 150, 0)
    assert found["error_rate"] == zero_one_loss(true, answered, normalize=False) / 125
    assert 0 < found["low"] < found["error_rate"] < found["high"] < 0.2
    assert set(found) == {"rows", "coverage", "error_rate", "low", "high", "unknown_labels"}


def test_errors_of_a_regression_are_scikit_learns(serve: Any) -> None:
    client = serve(LinearRegression().fit(X[:, :3], X[:, 3]))
    receipt, prediction = predict(client, X[:20, :3])
    large, rest = predict(client, X[20:, :3])  # whose predictions do not fit the receipt
    truth = X[:, 3] + np.linspace(-1, 1, 150)
    (wrong,) = send(client, {"receipt": large, "truth": truth[20:].tolist()})["rejected"]
    assert "send prediction" in wrong["detail"]
    sent = {"receipt": large, "truth": truth[20:].tolist(), "prediction": rest}
    assert send(client, {"receipt": receipt, "truth": truth[:20].tolist()}, sent)["accepted"] == 2
    found, answered = figures(client), np.array([*prediction, *rest])
    assert found["rows"] == 150
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, answered), rel=1e-12)
    assert found["rmse"] == pytest.approx(root_mean_squared_error(truth, answered), rel=1e-12)
    assert found["bias"] == pytest.approx(np.mean(answered - truth), abs=1e-12)
    assert found["mae_low"] < found["mae"] < found["mae_high"]
    assert found["bias_low"] < found["bias"] < found["bias_high"]
    last = records(client.journal_dir)[-1]
    assert (last["wrong"], last["rows"]) == (None, 130)
    assert last["abs_error"] == pytest.approx(np.abs(answered - truth)[20:].sum())


def test_outputs_of_a_row_are_right_only_together(serve: Any) -> None:
    targets = np.column_stack([Y, Y == 2])
    client = serve(MultiOutputClassifier(LogisticRegression(max_iter=1000)).fit(X, targets))
    receipt, prediction = predict(client, X[:3])
    assert prediction == [[0, 0]] * 3
    assert send(client, {"receipt": receipt, "truth": [[0, 0], [0, 1], [9, 0]]})["accepted"] == 1
    found = figures(client)
    assert (found["rows"], found["error_rate"], found["unknown_labels"]) == (3, 2 / 3, 1)


def test_models_without_classes(serve: Any) -> None:
    clusters = serve(KMeans(3, random_state=0).fit(X))
    receipt, prediction = predict(clusters, X[:2])
    send(clusters, {"receipt": receipt, "truth": prediction})
    assert figures(clusters)["error_rate"] == 0.0
    assert "mae" in figures(serve(RandomForestRegressor(5).fit(X, X[:, :2])))  # before its first prediction


@pytest.mark.parametrize("method", ["predict_proba", "decision_function"])
def test_only_predict_has_a_receipt(client: Client, method: str) -> None:
    assert "X-Feedback" in client.post({"data": [ROW]}).headers
    assert "X-Feedback" not in client.post({"data": [ROW], "method": method}).headers
    assert "X-Feedback" not in client.post({"data": []}).headers
    assert "X-Feedback" not in client.get("/model").headers
    assert figures(client)["coverage"] == 0.0


def test_answer_that_fails_has_no_receipt(client: Client) -> None:
    def after(answer: Any, record: dict[str, Any]) -> Any:
        answer.prediction = {1, 2}  # without a form in JSON
        return answer

    client.service.after_predict = after
    answer = client.post({"data": [ROW]})
    assert (answer.status_code, "X-Feedback" in answer.headers) == (500, False)
    assert not feedback_of(client).ledger.figures()  # and its row is not counted


V2 = {"inputs": [{"name": "input", "shape": [2, 4], "datatype": "FP64", "data": [*ROW, *ROW]}]}
PROTOCOLS = [
    ("open_inference", "/v2/models/model/infer", V2),
    ("open_inference", "/v2/models/model/infer", V2 | {"outputs": [{"name": "predict"}, {"name": "predict_proba"}]}),
    ("sagemaker", "/invocations", {"data": [ROW, ROW]}),
    ("vertex", "/v1/endpoints/endpoint/deployedModels/model:predict", {"instances": [ROW, ROW]}),
    ("eas", "/", [ROW, ROW]),
    ("function_compute", "/invoke", {"data": [ROW, ROW]}),
]


@pytest.mark.parametrize(("protocol", "path", "body"), PROTOCOLS)
def test_other_protocols_have_a_receipt_too(serve: Any, iris_file: Path, protocol: str, path: str, body: Any) -> None:
    client = serve(iris_file, extensions=(f"+endpoints.{protocol}",))
    answer = client.post(body, path)
    assert answer.status_code == 200, answer.text
    (receipt,) = answer.headers.getlist("X-Feedback")
    assert send(client, {"receipt": receipt, "truth": [0, 1]})["accepted"] == 1
    assert (figures(client)["error_rate"], figures(client)["coverage"]) == (0.5, 1.0)


def test_array_in_has_a_receipt_too(client: Client, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", X[:2])
    answer = client.post((tmp_path / "rows.npy").read_bytes(), Content_Type="application/x-npy")
    assert send(client, {"receipt": answer.headers["X-Feedback"], "truth": [0, 0]})["accepted"] == 1


def test_label_that_the_model_does_not_know_is_wrong_and_counted(client: Client) -> None:
    receipt, _ = predict(client, [ROW] * 3)
    send(client, {"receipt": receipt, "truth": [7, 0.5, 0.0]})
    assert (figures(client)["error_rate"], figures(client)["unknown_labels"]) == (2 / 3, 2)


def test_each_bad_entry_is_rejected_alone_and_may_be_sent_again(client: Client) -> None:
    receipt, _ = predict(client, [ROW, ROW])
    good = {"receipt": receipt, "truth": [0, None]}
    bad = [
        (receipt, "not an object"),
        ({"truth": [0, 0]}, "receipt is missing"),
        ({"receipt": receipt}, "truth is missing"),
        ({**good, "receipt": receipt[:-3]}, "cut off, changed"),
        ({**good, "receipt": "Ä"}, "cut off, changed"),
        ({**good, "receipt": 7}, "not a string"),
        ({**good, "truth": [0]}, "1 entries, the prediction 2 rows"),
        ({**good, "truth": ["0", "0"]}, "row 0 is a string"),
        ({**good, "truth": [None, None]}, "no row's truth is known"),
        ({**good, "truth": 0}, "send a list"),
        ({**good, "predictions": [0, 0]}, "unknown key 'predictions'"),
        ({**good, "prediction": [0, 1]}, "not what was answered"),
        (None, "not an object"),
    ]
    found = send(client, *(entry for entry, _ in bad))
    assert (found["accepted"], found["duplicates"]) == (0, 0)
    assert [each["index"] for each in found["rejected"]] == list(range(len(bad)))
    for each, (_, words) in zip(found["rejected"], bad, strict=True):
        assert words in each["detail"]
    found = send(client, bad[1][0], good, good, bad[2][0])
    assert (found["accepted"], found["duplicates"], len(found["rejected"])) == (1, 1, 2)
    assert [each["index"] for each in found["rejected"]] == [0, 3]
    assert send(client, {"receipt": receipt, "truth": [0, 0]})["duplicates"] == 1  # an accepted one is final
    assert figures(client)["rows"] == 1


def test_spellings_of_a_receipt_are_one(client: Client) -> None:
    receipt, _ = predict(client, [ROW])
    padded = receipt + "=" * (-len(receipt) % 4)
    spellings = [receipt, padded, padded.translate(str.maketrans("-_", "+/")), f" {receipt}\n"]
    found = send(client, *({"receipt": each, "truth": [0]} for each in spellings))
    assert found == {"accepted": 1, "duplicates": 3, "rejected": []}


WHOLE = [
    (b"", 400, "empty"),
    (b"{", 400, "not JSON"),
    (b'{"feedback": [NaN]}', 400, "NaN"),
    (b"[]", 422, "feedback"),
    (b"7", 422, "feedback"),
    (b"{}", 422, "feedback"),
    (b'{"feedback": {}}', 422, "feedback"),
    (b'{"feedback": null}', 422, "feedback"),
    (json.dumps({"feedback": [0] * 1001}).encode(), 413, "at most 1000"),
]


@pytest.mark.parametrize(("body", "status", "words"), WHOLE)
def test_body_that_is_refused_whole(client: Client, body: bytes, status: int, words: str) -> None:
    answer = client.post(body, "/feedback", Authorization=basic("feedback"))
    assert (answer.status_code, answer.content_type) == (status, "application/problem+json")
    assert words in answer.json["detail"]


def test_body_may_be_empty_of_entries_or_have_a_thousand(client: Client) -> None:
    assert send(client) == {"accepted": 0, "duplicates": 0, "rejected": []}
    entries = [{"receipt": predict(client, [ROW])[0], "truth": [0]} for _ in range(500)]
    found = send(client, *entries, *entries)
    assert (found["accepted"], found["duplicates"]) == (500, 500)
    assert len([record for record in records(client.journal_dir) if "event" in record]) == 500


def test_roles_and_methods(client: Client) -> None:
    body = b'{"feedback": []}'
    for user, status in (("predict", 403), ("admin", 403), ("nobody", 403), ("feedback", 200)):
        assert client.post(body, "/feedback", Authorization=basic(user)).status_code == status
    assert client.post(body, "/feedback", Authorization="").status_code == 401
    assert client.post({"data": [ROW]}, Authorization=basic("feedback")).status_code == 403
    assert client.http.get("/feedback", headers={"Authorization": basic("feedback")}).status_code == 405
    answer = client.post(body, "/feedback", Authorization=basic("feedback"), Content_Type="text/plain")
    assert answer.status_code == 415
    answer = client.post(body, "/feedback", Authorization=basic("feedback"), Content_Encoding="gzip")
    assert answer.status_code == 415


def test_old_receipt_is_rejected(serve: Any, iris_file: Path) -> None:
    client = serve(iris_file, feedback_max_age=1)
    receipt, _ = predict(client, [ROW])
    time.sleep(1.1)
    assert send(client, {"receipt": receipt, "truth": [0]})["rejected"] == [{"index": 0, "detail": TOO_OLD}]


def test_truth_of_a_version_that_is_gone_is_counted(serve: Any, tmp_path: Path, iris_file: Path) -> None:
    users = write_users(tmp_path / "users.json")
    other = tmp_path / "other.joblib"
    joblib.dump(LogisticRegression(max_iter=1000).fit(X, NAMES[Y]), other)
    shared = {"users_file": users, "journal_dir": tmp_path / "journal", "feedback_key_file": tmp_path / "key"}
    first = Client(Settings(model_path=iris_file, **shared))
    receipt, _ = predict(first, [ROW, ROW])
    version = first.get("/model").json["stable"]["version"]
    second = Client(Settings(model_path=other, **shared))
    assert send(second, {"receipt": receipt, "truth": [0, 9]})["accepted"] == 1
    found = feedback_of(second).ledger.figures()[version, "stable"]
    assert (found.rows, found.wrong, found.unknown_labels, found.predicted_rows) == (2, 1, 1, 2)
    assert figures(second)["rows"] == 0
    # On a host that has never served the version its labels are not known; what is wrong is.
    third = serve(other, feedback_key_file=tmp_path / "key")
    assert send(third, {"receipt": receipt, "truth": [0, 9]})["accepted"] == 1
    assert [(each["wrong"], each["unknown_labels"]) for each in records(third.journal_dir)] == [(1, None)]


def test_record_names_who_sent_it_and_holds_no_row(client: Client) -> None:
    receipt, _ = predict(client, [ROW])
    send(client, {"receipt": receipt, "truth": [2]})
    record = records(client.journal_dir)[-1]
    assert set(record) == {
        *("event", "receipt_id", "model_version", "variant", "rows", "wrong", "unknown_labels", "abs_error"),
        *("sq_error", "signed_error", "age", "user", "error_bound", "time", "record_id", "pid"),
    }
    assert (record["event"], record["user"], record["variant"], record["wrong"]) == (
        "feedback",
        "feedback",
        "stable",
        1,
    )
    assert 0 <= record["age"] < 60


def test_extension_may_rename_the_labels(client: Client) -> None:
    def after(answer: Any, record: dict[str, Any]) -> Any:
        answer.prediction = [f"class {label}" for label in answer.prediction.tolist()]
        return answer

    client.service.after_predict = after
    receipt, _ = predict(client, [ROW, ROW])
    assert send(client, {"receipt": receipt, "truth": ["class 0", "class 1"]})["accepted"] == 1
    assert figures(client)["error_rate"] == 0.5


def test_feedback_that_is_off_leaves_nothing(serve: Any, iris_file: Path) -> None:
    client = serve(iris_file, feedback=False)
    assert "X-Feedback" not in client.post({"data": [ROW]}).headers
    assert client.post({"feedback": []}, "/feedback", Authorization=basic("feedback")).status_code == 404
    assert "feedback" not in client.get("/model").json["stable"]
    assert not (client.journal_dir / "feedback").exists()
    assert not (client.journal_dir.parent / "feedback.key").exists()
    hooks = [*client.service.on_answer, *client.service.serving.on_describe, *client.service.every_second]
    assert not [hook for hook in hooks if isinstance(getattr(hook, "__self__", None), Feedback)]


def test_labels_are_those_of_the_last_version_with_a_name(tmp_path: Path) -> None:
    files = ClassesFiles(tmp_path)
    files.keep("1", [0, 1])
    files.keep("1", ["a", "b"])
    assert files.read("1") == labels_of(["a", "b"])
    assert files.read("2") is None


# --- what cannot be read or written


def test_server_without_a_key_serves_on(serve: Any, iris_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = iris_file.parent / "no-directory"
    place.touch()
    client = serve(iris_file, feedback_key_file=place / "key")
    for _ in range(3):
        assert "X-Feedback" not in client.post({"data": [ROW]}).headers
        feedback_of(client).tick()
    answer = client.post({"feedback": []}, "/feedback", Authorization=basic("feedback"))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "60")
    assert len([each for each in caplog.records if "FEEDBACK_KEY_FILE" in each.getMessage()]) == 1


def test_directory_that_cannot_be_written_stops_no_prediction(
    serve: Any, iris_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = serve(iris_file)
    feedback = feedback_of(client)
    for path in feedback.ledger.directory.iterdir():
        path.unlink()
    feedback.ledger.directory.rmdir()
    feedback.ledger.directory.touch()  # a file, where the directory should be
    for _ in range(3):
        feedback.tick()
        assert "X-Feedback" not in client.post({"data": [ROW]}).headers
    assert len([each for each in caplog.records if "carry no receipt until" in each.getMessage()]) == 1
    assert client.post({"feedback": []}, "/feedback", Authorization=basic("feedback")).status_code == 503
    assert client.get("/model").status_code == 200
    feedback.ledger.directory.unlink()
    feedback.tick()
    assert predict(client, [ROW])[0]


def test_ledger_that_cannot_be_written_is_unavailable(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    receipt, _ = predict(client, [ROW])
    state = feedback_of(client).ledger.directory / "figures.json"
    state.mkdir()
    body = {"feedback": [{"receipt": receipt, "truth": [0]}]}
    answer = client.post(body, "/feedback", Authorization=basic("feedback"))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert "send it again" in answer.json["detail"]
    assert "feedback cannot be written" in caplog.text
    state.rmdir()
    assert send(client, *body["feedback"])["accepted"] == 1


def test_key_is_in_no_log(serve: Any, iris_file: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "feedback.key"
    client = serve(iris_file, feedback_key_file=path)
    receipt, _ = predict(client, [ROW])
    digits = path.read_text().strip()
    send(client, {"receipt": receipt, "truth": [0]}, {"receipt": digits, "truth": [0]})
    path.write_text(digits[:-1])
    feedback_of(client).tick()
    assert "one or two lines of 64 hex digits" in caplog.text
    told = caplog.text + client.get("/model").text + "".join(map(str, records(client.journal_dir)))
    assert digits[:16] not in told


# --- anything at all

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Client:
    """A server whose figures nobody looks at."""
    place = tmp_path_factory.mktemp("fuzzed")
    joblib.dump(LogisticRegression(max_iter=1000).fit(X, Y), place / "model.joblib")
    users = write_users(place / "users.json")
    return Client(Settings(model_path=place / "model.joblib", users_file=users, journal_dir=place / "journal"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_entry_of_any_json_is_answered(fuzzed: Client, data: Any) -> None:
    receipt, _ = predict(fuzzed, [ROW] * data.draw(st.sampled_from([1, 2, 300])))
    content = bytearray(base64.urlsafe_b64decode(receipt + "=="))
    for _ in range(data.draw(st.integers(0, 2))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    changed = base64.urlsafe_b64encode(content).decode()
    text = data.draw(st.sampled_from([receipt, changed, changed[:9]]) | st.text() | JSON)
    entry = {"receipt": text, "truth": data.draw(JSON | st.lists(JSON, max_size=2)), "prediction": data.draw(JSON)}
    for name in data.draw(st.sets(st.sampled_from(sorted(entry)))):
        del entry[name]
    found = send(fuzzed, entry, data.draw(JSON))
    assert found["accepted"] + found["duplicates"] + len(found["rejected"]) == 2
    assert all(each["detail"] for each in found["rejected"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(body=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_body_of_anything_is_answered(fuzzed: Client, body: bytes) -> None:
    answer = fuzzed.post(body, "/feedback", Authorization=basic("feedback"))
    assert answer.status_code in (200, 400, 422)


def test_deep_and_large_entries_are_answered(fuzzed: Client) -> None:
    receipt, _ = predict(fuzzed, [ROW] * 300)
    deep = b"[" * 900 + b"]" * 900
    for truth, prediction in ((deep, b"null"), (b"[0]", deep), (deep, deep), (b"[" + deep + b"]", b"null")):
        body = b'{"feedback": [{"receipt": "%b", "truth": %b, "prediction": %b}]}' % (
            receipt.encode(),
            truth,
            prediction,
        )
        answer = fuzzed.post(body, "/feedback", Authorization=basic("feedback"))
        assert (answer.status_code, len(answer.json["rejected"])) == (200, 1)
    large = "a" * 2**19
    found = send(fuzzed, {"receipt": large, "truth": [0]}, {large: 1}, {"receipt": receipt, "truth": [large]})
    assert len(found["rejected"]) == 3
    assert max(len(each["detail"]) for each in found["rejected"]) < 400
