"""Large bodies of the further endpoints: tensors that are legal are not counted as too large."""

from typing import Any

import pytest
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_large import LONG, X


def tensor_for_each_column(client: Any) -> None:
    columns = load_breast_cancer().feature_names
    inputs = [{"shape": [len(X), 1], "datatype": "FP64", "data": LONG[:, [at]].tolist()} for at in range(30)]
    body = {"inputs": [{"name": name, **each} for name, each in zip(columns, inputs, strict=True)]}
    assert client.post(body, "/v2/models/model/infer").status_code == 200


def tensor_in_one_list(client: Any) -> None:
    body = {"inputs": [{"name": "input", "shape": X.shape, "datatype": "FP64", "data": LONG.ravel().tolist()}]}
    for path in ("/v2/models/model/infer", "/v1/endpoints/a/deployedModels/b:predict"):
        assert client.post(body, path).status_code == 200


@pytest.mark.parametrize("ask", [tensor_for_each_column, tensor_in_one_list])
def test_large_tensors_of_a_legal_form_are_not_counted_as_too_large(serve: Any, ask: Any) -> None:
    frame = load_breast_cancer(as_frame=True)
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(frame.data, frame.target)
    ask(serve(model, max_rows=len(X), extensions=("endpoints.open_inference", "endpoints.vertex")))
