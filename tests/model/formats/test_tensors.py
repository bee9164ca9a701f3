"""Models of other libraries: each is trained here with its own library, and answers as that library does."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.ensemble import IsolationForest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from model import formats
from model.formats import ModelLoadError
from model.loaded import LoadedModel, RowsRefused, load_model
from model.signature import BadRows

X, Y = load_iris(return_X_y=True)
ROWS = X.tolist()
NAMES = np.array(["setosa", "versicolor", "virginica"])
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Keras and PyTorch with numpy 2
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # who still writes it gets no new features
]
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def onnx() -> Any:
    """skl2onnx and onnx, which make files, and onnxruntime, which runs them."""
    pytest.importorskip("model.formats.onnx", reason="model/formats/onnx.py was removed")
    for name in ("onnxruntime", "skl2onnx", "onnx"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -r requirements/onnx.txt")
    import onnx

    return onnx


@pytest.fixture(scope="module")
def torch() -> Any:
    """PyTorch, seeded."""
    pytest.importorskip("model.formats.torch", reason="model/formats/torch.py was removed")
    library = pytest.importorskip("torch", reason="torch is not installed: pip install -r requirements/torch.txt")
    library.manual_seed(0)
    return library


@pytest.fixture(scope="module")
def keras() -> Any:
    """Keras over PyTorch, seeded."""
    pytest.importorskip("model.formats.keras", reason="model/formats/keras.py was removed")
    os.environ["KERAS_BACKEND"] = "torch"
    pytest.importorskip("torch", reason="torch is not installed: pip install -r requirements/torch.txt")
    library = pytest.importorskip("keras", reason="keras is not installed: pip install -r requirements/keras.txt")
    library.utils.set_random_seed(0)
    return library


def loaded(path: Path, sample: list[Any] | None = None) -> LoadedModel:
    """Load and validate a file as the server does."""
    return load_model(path, sample=sample)


def answer(model: LoadedModel, rows: list[Any], method: str = "predict") -> Any:
    """Return the answer to a request's rows."""
    result = model.predict(model.signature.parse(rows), method)
    return result.tolist() if isinstance(result, np.ndarray) else result


def refusal(path: Path) -> str:
    """Return why a file does not load."""
    with pytest.raises(ModelLoadError) as error:
        load_model(path)
    return str(error.value)


def bad(model: LoadedModel, rows: Any) -> str:
    """Return what is wrong with rows."""
    with pytest.raises(BadRows) as error:
        model.signature.parse(rows)
    return error.value.detail


def converted(tmp_path: Path, model: Any, example: Any = None, **options: Any) -> Path:
    """Write a scikit-learn model as ONNX, as its users do."""
    from skl2onnx import to_onnx

    given = X[:1].astype(np.float32) if example is None else example
    path = tmp_path / "model.onnx"
    path.write_bytes(to_onnx(model, given, **options).SerializeToString())
    return path


def onnxruntime_answers(path: Path, given: dict[str, Any]) -> list[Any]:
    """Run a file with onnxruntime itself."""
    import onnxruntime

    answers: list[Any] = onnxruntime.InferenceSession(path).run(None, given)
    return answers


# --- ONNX: classifiers and regressors


@pytest.mark.parametrize("labels", [Y, NAMES[Y]], ids=["numbers", "strings"])
@pytest.mark.parametrize("zipmap", [True, False])
def test_onnx_classifier_has_labels_probabilities_and_classes(
    onnx: Any, tmp_path: Path, labels: Any, zipmap: bool
) -> None:
    trained = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, labels)
    model = loaded(converted(tmp_path, trained, options={id(trained): {"zipmap": zipmap}}))
    assert answer(model, ROWS) == trained.predict(X).tolist()
    assert np.allclose(answer(model, ROWS, "predict_proba"), trained.predict_proba(X), atol=1e-6)
    assert model.classes == trained.classes_.tolist()
    assert model.methods == ("predict", "predict_proba")


def test_onnx_classes_are_left_out_if_nothing_names_them(
    onnx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = converted(tmp_path, LogisticRegression(max_iter=500).fit(X, Y), options={"zipmap": False})
    monkeypatch.setitem(sys.modules, "onnx", None)
    model = loaded(path)
    assert model.classes is None
    assert model.classes_for("predict_proba") is None
    assert len(answer(model, ROWS[:1], "predict_proba")[0]) == 3


@pytest.mark.parametrize("targets", [3, slice(2, 4)], ids=["one", "several"])
def test_onnx_regressor_answers_a_value_or_a_list_for_each_row(onnx: Any, tmp_path: Path, targets: Any) -> None:
    trained = LinearRegression().fit(X[:, :2], X[:, targets])
    model = loaded(converted(tmp_path, trained, X[:1, :2]))
    assert np.allclose(answer(model, X[:, :2].tolist()), trained.predict(X[:, :2]), rtol=1e-12)
    assert model.methods == ("predict",)


def test_onnx_outlier_scores_are_not_taken_for_probabilities(onnx: Any, tmp_path: Path) -> None:
    trained = IsolationForest(n_estimators=10, random_state=0).fit(X)
    model = loaded(converted(tmp_path, trained, target_opset={"": 18, "ai.onnx.ml": 3}))
    assert answer(model, ROWS) == trained.predict(X).tolist()
    assert model.methods == ("predict",)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_onnx_gets_the_type_of_number_that_it_takes(onnx: Any, tmp_path: Path, dtype: Any) -> None:
    whole = np.round(X * 10)
    trained = LogisticRegression(max_iter=2000).fit(whole, Y)
    model = loaded(converted(tmp_path, trained, whole[:1].astype(dtype), options={"zipmap": False}))
    assert answer(model, whole.astype(dtype).tolist()) == trained.predict(whole).tolist()
    if dtype is np.int64:
        assert "row 0, column 1: a number; expected a whole number" in bad(model, [[1, 2.5, 3, 4]])
        assert "number that does not fit int64" in bad(model, [[1, 2, 3, 2**63]])
    if dtype is np.float32:
        assert "too large for float32" in bad(model, [[1, 2, 3, 1e39]])


def test_null_is_refused_unless_the_file_says_that_the_model_takes_it(onnx: Any, tmp_path: Path) -> None:
    model = loaded(converted(tmp_path, LogisticRegression(max_iter=500).fit(X, Y)))
    assert "null; this model does not take a missing value here" in bad(model, [[1, 2, None, 4]])


# --- ONNX: columns and strings

FRAME = {
    "city": np.array([["Oslo"], ["Rome"], ["Oslo"], ["Bern"]], dtype=object),
    "size": np.array([[1.0], [2.0], [3.0], [4.0]], dtype=np.float32),
    "age": np.array([[10], [20], [30], [41]], dtype=np.int64),
}


@pytest.fixture
def of_columns(onnx: Any, tmp_path: Path) -> tuple[Path, Any]:
    """A column transformer's ONNX form, with an input for each column, and scikit-learn's own predictions."""
    import pandas as pd
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType, Int64TensorType, StringTensorType

    frame = pd.DataFrame({name: values[:, 0] for name, values in FRAME.items()})
    steps = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), ["city"]), (StandardScaler(), ["size", "age"])
    )
    trained = make_pipeline(steps, LogisticRegression()).fit(frame, [0, 1, 0, 1])
    types = {"city": StringTensorType, "size": FloatTensorType, "age": Int64TensorType}
    inputs = [(name, kind([None, 1])) for name, kind in types.items()]
    path = tmp_path / "columns.onnx"
    path.write_bytes(to_onnx(trained, initial_types=inputs).SerializeToString())
    return path, trained.predict(frame).tolist()


def test_onnx_of_columns_takes_rows_by_name_or_in_order(of_columns: tuple[Path, Any]) -> None:
    path, expected = of_columns
    model = loaded(path)
    rows = [dict(zip(FRAME, row, strict=True)) for row in zip(*(v[:, 0].tolist() for v in FRAME.values()), strict=True)]
    assert answer(model, rows) == expected
    assert answer(model, [list(row.values()) for row in rows]) == expected
    assert onnxruntime_answers(path, FRAME)[0].tolist() == expected
    assert [(c.name, c.kind) for c in model.signature.columns or ()] == [
        ("city", "text"),
        ("size", "number"),
        ("age", "integer"),
    ]
    assert "row 0, column 'size': a string; expected a number" in bad(model, [["Oslo", "1.5", 3]])
    assert "row 0, column 'age': missing" in bad(model, [{"city": "Oslo", "size": 1.5}])


def test_onnx_of_columns_does_without_pandas(of_columns: tuple[Path, Any]) -> None:
    program = """
        import sys
        from pathlib import Path
        from model.serving import Serving, SingleFile
        serving = Serving(SingleFile(Path(sys.argv[1])))
        serving.start()
        serving.finished.wait()
        assert serving.describe()["ready"], serving.describe()
        assert not {"pandas", "sklearn", "torch", "keras"} & set(sys.modules), sys.modules.keys()
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(of_columns[0])], cwd=ROOT, check=True, timeout=60
    )


@pytest.mark.parametrize("shape", [[None], [None, 1]], ids=str)
def test_onnx_of_strings(onnx: Any, tmp_path: Path, shape: list[Any]) -> None:
    from skl2onnx.common.data_types import StringTensorType

    texts = ["good and cheap", "bad", "cheap", "very bad and slow"]
    trained = make_pipeline(TfidfVectorizer(lowercase=False), LogisticRegression()).fit(texts, [1, 0, 1, 0])
    model = loaded(converted(tmp_path, trained, None, initial_types=[("text", StringTensorType(shape))]))
    rows: list[Any] = texts if len(shape) == 1 else [[text] for text in texts]
    assert answer(model, rows) == trained.predict(texts).tolist()


# --- ONNX: tensors of any shape


def small(onnx: Any, path: Path, operator: str, shape: list[Any], kind: str = "FLOAT", **options: Any) -> Path:
    """Write an ONNX file of one operator over one input."""
    helper, number = onnx.helper, getattr(onnx.TensorProto, kind)
    domain = options.pop("domain", "")
    graph = helper.make_graph(
        [helper.make_node(operator, ["rows"], ["result"], domain=domain, **options)],
        "small",
        [helper.make_tensor_value_info("rows", number, shape)],
        [helper.make_tensor_value_info("result", number, None)],
    )
    opsets = [helper.make_opsetid("", 17)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def test_onnx_of_images_takes_nested_lists(onnx: Any, tmp_path: Path) -> None:
    path = small(onnx, tmp_path / "m.onnx", "Flatten", ["rows", 1, 3, 2])
    model = loaded(path)
    image = [[[0.5, 1], [2, 3], [4, 5]]]
    assert answer(model, [image, image]) == [[0.5, 1, 2, 3, 4, 5]] * 2
    assert model.signature.describe() | {"columns": None} == {
        "layout": "tensor",
        "columns": None,
        "form": "[[[[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]]]",
        "shape": [1, 3, 2],
        "type": "number",
    }


WRONG_IMAGES = [
    ([[[1, 2], [3, 4]]], "row 0: nested lists of 2 × 2; expected nested lists of 3 × 2"),
    ([[[1, 2], [3, 4], [5, 6]], [[1, 2], [3, 4], [5]]], "row 1: the lists in it differ in length or depth"),
    ([[[1, 2], [3, 4], 5]], "row 0: the lists in it differ in length or depth"),
    ([[[1, 2], [3, 4], [5, [6]]]], "row 0: the lists in it differ in length or depth"),
    ([[[1, 2], [3, True], [5, 6]]], "row 0: holds true or false; expected a number"),
    ([[[1, 2], [3, "4"], [5, 6]]], "row 0: holds a string; expected a number"),
    ([[[1, 2], [3, None], [5, 6]]], "row 0: holds null; expected a number"),
    ([[1, 2, 3, 4, 5, 6]], "row 0: nested lists of 6; expected"),
    ([[[[1], [2]], [[3], [4]], [[5], [6]]]], "row 0: nested lists of 3 × 2 × 1; expected"),
    ([5.0], "row 0: a single value; expected"),
    ([{"a": 1}], "row 0: a single value; expected"),
    ([[]], "row 0: nested lists of 0; expected"),
    ([], "no rows"),
    (5, "expected a list of rows"),
    ([[[1, 2], [3, 1e39], [5, 6]]], "too large for float32"),
    ([[[1, 2], [3, 10**400], [5, 6]]], "too large for float32"),
]


@pytest.mark.parametrize(("rows", "why"), WRONG_IMAGES, ids=map(str, range(len(WRONG_IMAGES))))
def test_image_that_does_not_fit_is_named(onnx: Any, tmp_path: Path, rows: Any, why: str) -> None:
    model = loaded(small(onnx, tmp_path / "m.onnx", "Flatten", [None, 3, 2]))
    assert why in bad(model, rows)


def test_open_sizes_may_differ_between_requests_only(onnx: Any, tmp_path: Path) -> None:
    model = loaded(small(onnx, tmp_path / "m.onnx", "Identity", ["rows", "length"], "INT64"))
    assert answer(model, [[1, 2, 3]]) == [[1, 2, 3]]
    assert answer(model, [[1], [2]]) == [[1], [2]]
    assert bad(model, [[1, 2], [3]]) == "row 1: nested lists of 1; expected nested lists of 2"
    assert "holds a number; expected a whole number" in bad(model, [[1.5]])


@pytest.mark.parametrize(
    ("kind", "shape", "rows"),
    [
        ("BOOL", [None, 2], [[True, False]]),
        ("UINT8", [None, 2], [[0, 255]]),
        ("INT32", [None, 2, 1], [[[-1], [5]]]),
        ("STRING", [None, 2], [["a", "ß"]]),
        ("STRING", [None, 2, 1], [[["a"], ["b"]]]),
        ("DOUBLE", [None], [0.5, 1.5]),
        ("INT64", [None], [1, 2]),
        ("STRING", [None], ["a", "b"]),
    ],
)
def test_every_type_of_tensor_comes_through(onnx: Any, tmp_path: Path, kind: str, shape: Any, rows: Any) -> None:
    model = loaded(small(onnx, tmp_path / "m.onnx", "Identity", shape, kind))
    assert answer(model, rows) == rows


@pytest.mark.parametrize(
    ("kind", "shown", "wrong", "right"),
    [
        ("UINT8", "uint8", [300, -1], [0, 255]),
        ("INT8", "int8", [200, -129], [-128, 127]),
        ("INT32", "int32", [2**31, -(2**31) - 1], [2**31 - 1]),
        ("UINT64", "uint64", [-1], [2**63 - 1]),
    ],
)
def test_whole_number_of_an_array_that_does_not_fit_is_refused_as_in_json(
    onnx: Any, tmp_path: Path, kind: str, shown: str, wrong: list[int], right: list[int]
) -> None:
    model = loaded(small(onnx, tmp_path / "same.onnx", "Identity", ["n", 2], kind))
    for value in wrong:  # numpy would make 44 of 300
        assert f"does not fit {shown}" in bad(model, np.array([[value, 1]]))
        assert bad(model, [[value, 1]])
    for value in right:
        assert answer(model, np.array([[value, 1]])) == [[value, 1]]
        assert answer(model, [[value, 1]]) == [[value, 1]]


def test_number_that_does_not_fit_its_type_is_refused(onnx: Any, tmp_path: Path) -> None:
    model = loaded(small(onnx, tmp_path / "m.onnx", "Identity", [None, 2], "UINT8"))
    for number in (256, -1):
        assert "does not fit uint8" in bad(model, [[0, number]])


def test_rows_that_only_the_model_can_refuse_are_the_callers_fault(onnx: Any, tmp_path: Path) -> None:
    path = small(onnx, tmp_path / "m.onnx", "DepthToSpace", [None, "channels", 1, 1], blocksize=2)
    model = loaded(path, [[[[1.0]], [[2.0]], [[3.0]], [[4.0]]]])
    with pytest.raises(RowsRefused):
        answer(model, [[[[1.0]], [[2.0]], [[3.0]]]])


# --- ONNX: what is refused


def test_onnx_of_a_fixed_number_of_rows_is_refused_with_a_way_out(onnx: Any, tmp_path: Path) -> None:
    why = refusal(small(onnx, tmp_path / "m.onnx", "Identity", [1, 4]))
    assert "takes exactly 1 row(s) at a time" in why
    assert "dynamic_shapes=" in why


def test_onnx_that_claims_open_rows_and_takes_one_is_refused(onnx: Any, tmp_path: Path) -> None:
    path = small(onnx, tmp_path / "m.onnx", "Flatten", [None, 3], axis=0)  # makes one row of all
    assert "returned 1 for 2 rows" in refusal(path)


def test_onnx_whose_locale_is_not_here_names_it_with_the_line_that_makes_it(onnx: Any, tmp_path: Path) -> None:
    lower = {"case_change_action": "LOWER", "is_case_sensitive": 0}
    path = small(onnx, tmp_path / "m.onnx", "StringNormalizer", [None], "STRING", locale="xx_YY.UTF-8", **lower)
    why = refusal(path)
    assert "m.onnx needs the locale xx_YY.UTF-8, which this machine does not have" in why
    assert "sudo apt install locales && sudo localedef -i xx_YY -f UTF-8 xx_YY.UTF-8" in why
    path = small(onnx, tmp_path / "m.onnx", "StringNormalizer", [None], "STRING", locale="C.UTF-8", **lower)
    assert load_model(path).call(["SCHÖN"]) == ["schön"]


def test_locale_that_the_line_makes_is_enough(onnx: Any, tmp_path: Path) -> None:
    if shutil.which("localedef") is None or not Path("/usr/share/i18n/locales/en_US").exists():
        pytest.skip("needs localedef: apt install locales")
    (tmp_path / "locales").mkdir()
    made = ["localedef", "-i", "en_US", "-f", "UTF-8", str(tmp_path / "locales/en_US.UTF-8")]
    subprocess.run(made, check=True, capture_output=True)
    path = small(
        onnx, tmp_path / "m.onnx", "StringNormalizer", [None], "STRING", case_change_action="LOWER", is_case_sensitive=0
    )
    code = f"from model.loaded import *; print(load_model(Path({str(path)!r})).call(['SCHÖN']))"
    environ = os.environ | {"LOCPATH": str(tmp_path / "locales"), "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.stdout == "['schön']\n", done.stderr


def test_onnx_with_a_custom_operator_is_refused(onnx: Any, tmp_path: Path) -> None:
    why = refusal(small(onnx, tmp_path / "m.onnx", "Mine", [None, 4], domain="my.operators"))
    assert "Mine" in why
    assert "operator or an opset that this version does not have" in why


def test_onnx_with_weights_in_another_file_says_how_to_make_one(onnx: Any, tmp_path: Path) -> None:
    path = converted(tmp_path, LinearRegression().fit(X[:, :3], X[:, 3]), X[:1, :3].astype(np.float32))
    weights = onnx.numpy_helper.from_array(np.ones((4, 2), np.float32), "weights")
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["rows", "weights"], ["result"])],
        "linear",
        [helper.make_tensor_value_info("rows", 1, [None, 4])],
        [helper.make_tensor_value_info("result", 1, [None, 2])],
        [weights],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert "save_as_external_data=False" in refusal(path)
    onnx.save(onnx.load(path), tmp_path / "whole.onnx", save_as_external_data=False)
    assert answer(loaded(tmp_path / "whole.onnx"), [[1, 1, 1, 1]]) == [[4, 4]]


# --- PyTorch


@pytest.fixture(scope="module")
def network(torch: Any) -> Any:
    """A network trained on iris for a second."""
    nn = torch.nn
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    rows, labels = torch.tensor(X, dtype=torch.float32), torch.tensor(Y)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(rows), labels).backward()
        optimizer.step()
    net.eval()
    assert (net(rows).argmax(1) == labels).float().mean() > 0.9
    return net


def own_answers(torch: Any, network: Any, rows: Any = X) -> Any:
    """Run a network with PyTorch itself."""
    with torch.no_grad():
        return network(torch.tensor(rows, dtype=torch.float32)).numpy()


def exported(torch: Any, network: Any, path: Path, example: Any = None, rows: bool = True) -> Path:
    """Write the model as the error messages recommend."""
    given = torch.zeros(2, 4) if example is None else example
    shapes = ({0: torch.export.Dim("rows")},) if rows else None
    torch.export.save(torch.export.export(network.eval(), (given,), dynamic_shapes=shapes), path)
    return path


def scripted(torch: Any, network: Any, path: Path) -> Path:
    """Write TorchScript."""
    torch.jit.script(network.eval()).save(path)
    return path


MAKERS: dict[str, Callable[[Any, Any, Path], Path]] = {".pt": scripted, ".pt2": exported}


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
@pytest.mark.parametrize("form", ["scripted", "exported"])
def test_torch_model_answers_as_torch_does(torch: Any, network: Any, tmp_path: Path, suffix: str, form: str) -> None:
    make = scripted if form == "scripted" else exported
    model = loaded(make(torch, network, tmp_path / f"model{suffix}"))
    assert answer(model, ROWS) == own_answers(torch, network).tolist()
    assert "row 0: 3 values; expected 4" in bad(model, [[1, 2, 3]])
    assert model.methods == ("predict",)


def test_array_in_a_body_is_copied_since_torch_takes_no_array_that_is_read_only(
    torch: Any, network: Any, tmp_path: Path
) -> None:
    torch.set_warn_always(True)
    try:
        model = loaded(exported(torch, network, tmp_path / "m.pt2"))
        rows = np.frombuffer(X.astype(np.float32).tobytes(), np.float32).reshape(X.shape)
        assert model.predict(model.signature.validate(rows)).tolist() == own_answers(torch, network).tolist()
    finally:
        torch.set_warn_always(False)


def test_traced_model_answers_as_torch_does(torch: Any, network: Any, tmp_path: Path) -> None:
    torch.jit.trace(network, torch.zeros(2, 4)).save(tmp_path / "m.pt")
    assert answer(loaded(tmp_path / "m.pt"), ROWS) == own_answers(torch, network).tolist()


def test_model_that_was_saved_in_training_mode_is_served_in_evaluation_mode(
    torch: Any, network: Any, tmp_path: Path
) -> None:
    expected = own_answers(torch, network).tolist()
    torch.jit.script(network.train()).save(tmp_path / "m.pt")
    network.eval()
    assert answer(loaded(tmp_path / "m.pt"), ROWS) == expected


@pytest.mark.parametrize("suffix", MAKERS)
def test_torch_model_of_images(torch: Any, tmp_path: Path, suffix: str) -> None:
    nn = torch.nn
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 26 * 26, 10)).eval()
    images = np.random.default_rng(0).random((3, 1, 28, 28)).round(3)
    path = tmp_path / f"m{suffix}"
    if suffix == ".pt":
        model = loaded(scripted(torch, net, path), images[:1].tolist())
    else:
        model = loaded(exported(torch, net, path, torch.zeros(2, 1, 28, 28)))
    assert np.allclose(answer(model, images.tolist()), own_answers(torch, net, images), atol=1e-6)
    assert "expected nested lists of 1 × 28 × 28" in bad(model, images[:, 0].tolist())


def test_script_of_images_of_a_usual_size_is_found_without_a_sample(torch: Any, tmp_path: Path) -> None:
    nn = torch.nn
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 10)).eval()
    model = loaded(scripted(torch, net, tmp_path / "m.pt"))
    assert model.signature.shape == (1, None, None)
    with pytest.raises(RowsRefused):
        answer(model, np.zeros((1, 1, 30, 30)).tolist())


@pytest.mark.parametrize("suffix", MAKERS)
def test_torch_model_of_tokens_takes_whole_numbers(torch: Any, tmp_path: Path, suffix: str) -> None:
    net = torch.nn.Sequential(torch.nn.EmbeddingBag(50, 4), torch.nn.Linear(4, 2)).eval()
    path = tmp_path / f"m{suffix}"
    if suffix == ".pt":
        model = loaded(scripted(torch, net, path), [[1, 2, 3]])
    else:
        model = loaded(exported(torch, net, path, torch.zeros(2, 3, dtype=torch.int64)))
    with torch.no_grad():
        expected = net(torch.tensor([[1, 2, 3], [4, 5, 6]])).tolist()
    assert answer(model, [[1, 2, 3], [4, 5, 6]]) == expected
    assert "a number; expected a whole number" in bad(model, [[1, 2, 3.5]])


def test_first_of_several_outputs_is_the_prediction(torch: Any, tmp_path: Path) -> None:
    class Two(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x):  # type: ignore[no-untyped-def]
            return {"score": x.sum(1), "rest": x}

    model = loaded(exported(torch, Two(), tmp_path / "m.pt2"))
    assert answer(model, [[1, 2, 3, 4], [1, 1, 1, 1]]) == [10, 4]


def test_export_of_a_fixed_number_of_rows_is_refused_with_a_way_out(torch: Any, network: Any, tmp_path: Path) -> None:
    why = refusal(exported(torch, network, tmp_path / "m.pt2", torch.zeros(1, 4), rows=False))
    assert "takes exactly 1 row(s) at a time" in why
    assert 'dynamic_shapes=({0: torch.export.Dim("rows")},)' in why


def test_model_of_two_inputs_is_refused(torch: Any, tmp_path: Path) -> None:
    class Two(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x, y):  # type: ignore[no-untyped-def]
            return x + y

    given = (torch.zeros(2, 4), torch.zeros(2, 4))
    torch.export.save(torch.export.export(Two(), given), tmp_path / "m.pt2")
    torch.jit.trace(Two(), given).save(tmp_path / "m.pt")
    for suffix in MAKERS:
        assert "takes 2 inputs; wrap it in a module" in refusal(tmp_path / f"m{suffix}")


class Marks:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", MAKERS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("what", ["state_dict", "module", "code"])
def test_what_torch_save_wrote_is_not_unpickled_and_says_how_to_export(
    torch: Any, network: Any, tmp_path: Path, suffix: str, zipped: bool, what: str
) -> None:
    path, marker = tmp_path / f"m{suffix}", tmp_path / "marker"
    value = {"state_dict": network.state_dict(), "module": network, "code": Marks(marker)}[what]
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    why = refusal(path)
    assert "a state_dict, which is weights without a model, or a pickled module" in why
    assert "torch.export.save(program" in why
    assert not marker.exists()


def test_the_two_lines_of_the_message_make_a_file_that_is_served(torch: Any, network: Any, tmp_path: Path) -> None:
    torch.save(network, tmp_path / "m.pt")
    lines = [line.strip() for line in refusal(tmp_path / "m.pt").splitlines() if line.startswith("    ")]
    program = "\n".join(lines).replace("model.pt2", str(tmp_path / "model.pt2"))
    exec(program, {"torch": torch, "model": network, "example_of_2_rows": torch.zeros(2, 4)})
    assert answer(loaded(tmp_path / "model.pt2"), ROWS) == own_answers(torch, network).tolist()


@pytest.mark.parametrize("suffix", MAKERS)
def test_zip_of_something_else_is_refused(torch: Any, tmp_path: Path, suffix: str) -> None:
    with zipfile.ZipFile(tmp_path / f"m{suffix}", "w") as archive:
        archive.writestr("word/document.xml", "<a/>")
    assert "not one of PyTorch's" in refusal(tmp_path / f"m{suffix}")


def edited(path: Path, change: Callable[[str, str], str] = lambda _, content: content, **added: bytes) -> Path:
    """Rewrite a zip archive: change its JSON files, and add entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(entries)).partition("/")[0]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content.decode()) if name.endswith(".json") else content)
        for name, content in added.items():
            archive.writestr(f"{root}/{name}", content)
    return path


@pytest.mark.parametrize(("kind", "payload"), [("weights", "weight_9"), ("constants", "tensor_9")])
def test_pickled_payload_of_an_export_is_not_unpickled(
    torch: Any, network: Any, tmp_path: Path, kind: str, payload: str
) -> None:
    marker, content = tmp_path / "marker", io.BytesIO()
    torch.save(Marks(marker), content)
    entry = {"path_name": payload, "is_param": False, "use_pickle": True, "tensor_meta": None}

    def change(name: str, content: str) -> str:
        if not name.endswith(f"data/{kind}/model_{kind}_config.json"):
            return content
        return json.dumps({"config": json.loads(content)["config"] | {"mine": entry}})

    added = {f"data/{kind}/{payload}": content.getvalue()}
    path = edited(exported(torch, network, tmp_path / "m.pt2"), change, **added)
    assert "holds pickled objects" in refusal(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("data/constants/opaque_obj_0", "not tensors"),
        ("DATA/constants/opaque_obj_0", "not tensors"),  # PyTorch finds entries regardless of case
        ("data/constants/custom_obj_0", "not tensors"),
        ("data/weights/model.pt", "not tensors"),
        ("data/constants/model.pt", "not tensors"),
        ("data/aotinductor/model/library.so", "holds compiled code"),
        ("data/sample_inputs/other.pt", "sample inputs that are not plain tensors"),
    ],
)
def test_entry_of_an_export_that_would_run_code_is_refused(
    torch: Any, network: Any, tmp_path: Path, name: str, why: str
) -> None:
    marker, payload = tmp_path / "marker", io.BytesIO()
    torch.save(Marks(marker), payload)
    content = pickle.dumps(Marks(marker)) if "opaque" in name else payload.getvalue()
    path = edited(exported(torch, network, tmp_path / "m.pt2"), **{name: content})
    assert why in refusal(path)
    assert not marker.exists()


NOT_AN_OPERATOR = "calls torch.serialization.os.system, which is not one of PyTorch's own operators"
LEAF = json.dumps(json.dumps([1, {"type": None, "context": None, "children_spec": []}]))
ENUM = json.dumps([{"__enum__": True, "fqn": "__hello__:main", "name": "x"}])
IMPORTING = json.dumps(json.dumps([1, {"type": "builtins.list", "context": ENUM, "children_spec": []}]))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({'"expr_str": "Symbol(': '"expr_str": "CODE or Symbol('}, "holds a size that is not plain arithmetic"),
        ({'{"name": "input"}': '{"name": "input=CODE"}', '"input": {': '"input=CODE": {'}, "as a name"),
        ({"torch.ops.aten.relu.default": "torch.serialization.os.system"}, NOT_AN_OPERATOR),
        ({'"as_tensor": {"name": "linear"}': '"as_operator": "torch.serialization.os.system"'}, NOT_AN_OPERATOR),
        ({f'"out_spec": {LEAF}': f'"out_spec": {IMPORTING}'}, "in other containers than lists, tuples and dicts"),
        ({f'"out_spec": {LEAF}': f'"out_spec": {IMPORTING.replace("_", chr(92) * 6 + "u005f")}'}, "other containers"),
    ],
    ids=["size", "name", "operator", "operator as an argument", "import", "import with escapes"],
)
def test_program_of_an_export_that_would_run_code_is_refused(
    torch: Any, network: Any, tmp_path: Path, changes: dict[str, str], why: str
) -> None:
    code = f"__import__('pathlib').Path('{tmp_path}/marker').touch()"

    def change(name: str, content: str) -> str:
        for old, new in changes.items():
            assert old in content or "models" not in name
            content = content.replace(old, new.replace("CODE", code))
        return content

    assert why in refusal(edited(exported(torch, network, tmp_path / "m.pt2"), change))
    assert not (tmp_path / "marker").exists()
    assert "__hello__" not in sys.modules


def test_guard_that_is_a_program_is_not_run(torch: Any, network: Any, tmp_path: Path) -> None:
    guard = f"__import__('pathlib').Path('{tmp_path}/marker').touch() is None"
    path = edited(
        exported(torch, network, tmp_path / "m.pt2"),
        lambda _, content: content.replace('"guards_code": []', f'"guards_code": ["{guard}"]'),
    )
    assert answer(loaded(path), ROWS) == own_answers(torch, network).tolist()
    assert not (tmp_path / "marker").exists()


def test_output_may_have_any_key_and_layers_any_name(torch: Any, network: Any, tmp_path: Path) -> None:
    class Keyed(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleDict({"my-layer é": network})

        def forward(self, x):  # type: ignore[no-untyped-def]
            return {"score (é)": self.layers["my-layer é"](x)}

    model = loaded(exported(torch, Keyed(), tmp_path / "m.pt2"))
    assert answer(model, ROWS) == own_answers(torch, network).tolist()


@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")  # of recurrent layers at their export
@pytest.mark.parametrize("name", ["convolution", "recurrent", "attention"])
def test_layers_of_every_kind_are_read(torch: Any, tmp_path: Path, name: str) -> None:
    nn = torch.nn
    layers = {
        "convolution": [nn.Conv1d(5, 8, 3), nn.BatchNorm1d(8), nn.GELU(), nn.MaxPool1d(2), nn.Flatten(), nn.Softmax(1)],
        "recurrent": [nn.GRU(8, 3, batch_first=True)],
        "attention": [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten()],
    }[name]
    net = nn.Sequential(*layers).eval()
    rows = np.random.default_rng(0).random((3, 5, 8)).astype(np.float32)
    model = loaded(exported(torch, net, tmp_path / "m.pt2", torch.zeros(2, 5, 8)))
    with torch.no_grad():
        expected = net(torch.tensor(rows))
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert np.allclose(answer(model, rows.tolist()), expected.numpy(), atol=1e-6)


def test_sizes_that_are_plain_arithmetic_are_read(torch: Any, tmp_path: Path) -> None:
    class Twice(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x):  # type: ignore[no-untyped-def]
            return torch.cat([x, x + x.shape[1] // 2], 1)

    rows, width = torch.export.Dim("rows"), torch.export.Dim("width", min=2, max=100)
    program = torch.export.export(Twice(), (torch.zeros(3, 6),), dynamic_shapes=({0: rows, 1: width},))
    torch.export.save(program, tmp_path / "m.pt2")
    model = loaded(tmp_path / "m.pt2", [[1.0, 2.0]])
    assert answer(model, [[1.0, 2.0, 3.0, 4.0]]) == [[1.0, 2.0, 3.0, 4.0, 3.0, 4.0, 5.0, 6.0]]
    with pytest.raises(RowsRefused):
        answer(model, [[0.0] * 101])


# --- Keras


@pytest.fixture(scope="module")
def trained_keras(keras: Any) -> Any:
    """A Keras network trained on iris for a second."""
    net = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Normalization(mean=X.mean(0), variance=X.var(0)),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    net.compile("adam", "sparse_categorical_crossentropy")
    net.fit(X, Y, epochs=2, verbose=0)
    return net


KERAS_SUFFIXES = [".keras", ".h5"]


@pytest.mark.parametrize("suffix", KERAS_SUFFIXES)
def test_keras_model_answers_as_keras_does(keras: Any, trained_keras: Any, tmp_path: Path, suffix: str) -> None:
    trained_keras.save(tmp_path / f"m{suffix}")
    model = loaded(tmp_path / f"m{suffix}")
    assert np.allclose(answer(model, ROWS), trained_keras.predict(X, verbose=0), rtol=1e-6)
    assert answer(model, ROWS) == keras.ops.convert_to_numpy(trained_keras(X)).tolist()
    assert "row 0: 3 values; expected 4" in bad(model, [[1, 2, 3]])


@pytest.mark.parametrize("suffix", KERAS_SUFFIXES)
def test_keras_model_of_images(keras: Any, tmp_path: Path, suffix: str) -> None:
    net = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(2, 3), keras.layers.Flatten()])
    net.save(tmp_path / f"m{suffix}")
    images = np.random.default_rng(0).random((3, 8, 8, 1))
    model = loaded(tmp_path / f"m{suffix}")
    assert np.allclose(answer(model, images.tolist()), net.predict(images, verbose=0), rtol=1e-6, atol=1e-6)
    assert "expected nested lists of 8 × 8 × 1" in bad(model, images[:, :, :, 0].tolist())


@pytest.mark.parametrize("suffix", KERAS_SUFFIXES)
@pytest.mark.parametrize("deep", [False, True])
def test_lambda_layer_is_refused_before_its_bytecode_is_read(
    keras: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, deep: bool
) -> None:
    net = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: x * 2)])
    if deep:
        rows = keras.Input((4,))
        net = keras.Model(rows, keras.layers.Dense(1)(net(rows)))
    net.save(tmp_path / f"m{suffix}")
    monkeypatch.setattr("marshal.loads", lambda *_: pytest.fail("read the bytecode"))
    assert "has a layer that holds code (Lambda), which is not loaded" in refusal(tmp_path / f"m{suffix}")


@pytest.mark.parametrize(("spelling", "module"), [("Lambda", "keras.layers"), ("layers.Lambda", "keras")])
def test_lambda_layer_of_a_named_function_is_refused(keras: Any, tmp_path: Path, spelling: str, module: str) -> None:
    keras.Sequential([keras.Input((4,)), keras.layers.Lambda(keras.ops.relu)]).save(tmp_path / "m.keras")
    layer = '"module": "keras.layers", "class_name": "Lambda"'
    path = edited(
        tmp_path / "m.keras",
        lambda _, content: content.replace(layer, f'"module": "{module}", "class_name": "{spelling}"'),
    )
    with zipfile.ZipFile(path) as archive:
        assert f'"class_name": "{spelling}"' in archive.read("config.json").decode()
    assert "has a layer that holds code (Lambda), which is not loaded" in refusal(path)


@pytest.mark.parametrize("suffix", KERAS_SUFFIXES)
def test_pytorch_module_within_a_keras_model_is_refused(
    keras: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    import torch

    wrapped = keras.layers.TorchModuleWrapper(torch.nn.Linear(4, 2), output_shape=(None, 2))
    keras.Sequential([keras.Input((4,)), wrapped]).save(tmp_path / f"m{suffix}")
    monkeypatch.setattr("pickle.Unpickler", lambda *_, **__: pytest.fail("unpickled the module"))
    why = refusal(tmp_path / f"m{suffix}")
    assert "torch.nn.Module" in why or "TorchModuleWrapper" in why


@pytest.mark.parametrize("suffix", KERAS_SUFFIXES)
def test_layer_of_ones_own_is_refused_with_a_way_out(keras: Any, tmp_path: Path, suffix: str) -> None:
    class Mine(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x):  # type: ignore[no-untyped-def]
            return x * 2

    keras.Sequential([keras.Input((4,)), Mine()]).save(tmp_path / f"m{suffix}")
    why = refusal(tmp_path / f"m{suffix}")
    assert "Mine" in why
    assert "has a layer of your own, Mine," in why


def test_keras_weights_without_a_model_are_named(keras: Any, trained_keras: Any, tmp_path: Path) -> None:
    trained_keras.save_weights(tmp_path / "m.weights.h5")
    assert "holds weights without a model" in refusal(tmp_path / "m.weights.h5")


def test_keras_model_of_two_inputs_is_refused(keras: Any, tmp_path: Path) -> None:
    left, right = keras.Input((2,)), keras.Input((2,))
    keras.Model([left, right], keras.layers.Add()([left, right])).save(tmp_path / "m.keras")
    assert "takes 2 inputs" in refusal(tmp_path / "m.keras")


def test_keras_model_of_a_fixed_number_of_rows_is_refused(keras: Any, tmp_path: Path) -> None:
    keras.Sequential([keras.Input((4,), batch_size=5), keras.layers.Dense(1)]).save(tmp_path / "m.keras")
    assert "takes exactly 5 row(s) at a time" in refusal(tmp_path / "m.keras")


# --- all of them


@pytest.fixture(params=[".onnx", ".pt", ".pt2", ".keras", ".h5"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    """A model of each format in turn, in a file, with what its own library predicts for X."""
    suffix, made = request.param, request.getfixturevalue
    path = tmp_path / f"model{suffix}"
    if suffix == ".onnx":
        made("onnx")
        iris = LogisticRegression(max_iter=500).fit(X, Y)
        return converted(tmp_path, iris), iris.predict(X)
    if suffix in MAKERS:
        return MAKERS[suffix](made("torch"), made("network"), path), own_answers(made("torch"), made("network"))
    made("trained_keras").save(path)
    return path, made("trained_keras").predict(X, verbose=0)


@pytest.mark.parametrize("kept", [0, 1, 10, 0.1, 0.5, 0.9, 0.99, -1], ids=str)
def test_truncated_file_is_reported_as_damaged(saved: tuple[Path, Any], kept: float) -> None:
    path, _ = saved
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    assert "damaged, incomplete" in refusal(path)


def test_random_bytes_are_reported_as_damaged(saved: tuple[Path, Any]) -> None:
    path, _ = saved
    for seed in range(4):
        path.write_bytes(np.random.default_rng(seed).bytes(4000))
        assert "damaged, incomplete" in refusal(path)


# --- libraries and modules that are not here, and SavedModel


@pytest.mark.parametrize("removed", ["onnx", "torch", "keras", "base archive_checks onnx torch keras"])
def test_format_whose_module_was_removed_is_named_and_the_others_stay(tmp_path: Path, removed: str) -> None:
    shutil.copytree(ROOT / "model", tmp_path / "model", ignore=shutil.ignore_patterns("__pycache__"))
    for name in removed.split():
        (tmp_path / f"model/formats/{name}.py").unlink(missing_ok=True)
    program = """
        import importlib, sys
        from pathlib import Path
        from model import formats
        for suffix, loader in formats.LOADERS.items():
            module = loader.partition(":")[0]
            if module.removeprefix("model.formats.") not in sys.argv[1].split():
                importlib.import_module(module)
                continue
            try:
                formats.load(Path("gone" + suffix))
            except formats.ModelLoadError as error:
                assert f"was installed without {module}, which {suffix} files need" in str(error), error
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), removed], cwd=tmp_path, check=True, timeout=60)


@pytest.mark.parametrize(
    ("suffix", "library", "extra"),
    [
        (".onnx", "onnxruntime", "onnx"),
        (".keras", "torch", "torch"),
        (".h5", "keras", "keras"),
        (".pt", "torch", "torch"),
    ],
)
def test_missing_library_is_named_with_the_requirements_that_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, library: str, extra: str
) -> None:
    if suffix == ".h5":
        pytest.importorskip("torch", reason="torch is not installed: pip install -r requirements/torch.txt")
    path = tmp_path / f"m{suffix}"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/constants.pkl", b"")
        archive.writestr("m/code/a.py", b"")
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    with pytest.raises(ModelLoadError) as error:
        formats.load(path)
    assert f"needs the library {library}, which is not installed: pip install -r requirements/{extra}.txt" in str(
        error.value
    )
    assert (ROOT / f"requirements/{extra}.txt").exists()


def test_saved_model_of_tensorflow_says_how_to_make_one_file(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/saved_model.pb").write_bytes(b"\x08\x01")
    for path in (tmp_path / "saved", tmp_path / "saved/saved_model.pb"):
        with pytest.raises(ModelLoadError) as error:
            formats.load(path)
        assert f"python -m tf2onnx.convert --saved-model {tmp_path / 'saved'} --output model.onnx" in str(error.value)


# --- threads and processes


def test_each_library_runs_in_as_many_threads_as_a_worker_has(
    onnx: Any, torch: Any, network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    program = """
        import sys
        from pathlib import Path
        from model import formats
        formats.load(Path(sys.argv[1]))
        assert sys.modules["torch"].get_num_threads() == 1
    """
    path = scripted(torch, network, tmp_path / "m.pt")
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(path)], cwd=ROOT, check=True, timeout=60)
    session = formats.load(converted(tmp_path, LinearRegression().fit(X[:, :3], X[:, 3]), X[:1, :3]))._session
    options = session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)


def test_served_by_gunicorn_over_http(saved: tuple[Path, Any], tmp_path: Path) -> None:
    from conftest import gunicorn

    path, expected = saved
    with gunicorn(tmp_path, model_path=path) as server:
        for rows in (ROWS[:1], ROWS, ROWS * 10):  # the longest goes to a native thread
            status, answered = server.predict(rows)
            assert status == 200, answered
            assert np.allclose(answered["prediction"], np.tile(expected.T, 10).T[: len(rows)], rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_every_kind_of_file_is_published_promoted_served_and_rolled_back_by_the_same_commands(
    onnx: Any, torch: Any, network: Any, trained_keras: Any, tmp_path: Path
) -> None:
    from conftest import Load, gunicorn, write_users

    iris = LogisticRegression(max_iter=500).fit(X, Y)
    sample = tmp_path / "rows.json"
    sample.write_text(json.dumps(ROWS[::50]))
    joblib.dump(iris, tmp_path / "model.joblib")
    converted(tmp_path, iris, options={"zipmap": False})
    scripted(torch, network, tmp_path / "model.pt")
    trained_keras.save(tmp_path / "model.h5")
    environ = os.environ | {"MODEL_DIR": str(tmp_path / "store"), "JOURNAL_DIR": str(tmp_path / "journal")}

    def command(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "model", *arguments], cwd=ROOT, env=environ, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    expected = {
        ".joblib": iris.predict(X),
        ".onnx": iris.predict(X),
        ".pt": own_answers(torch, network),
        ".h5": trained_keras.predict(X, verbose=0),
    }
    for suffix in expected:
        command("publish", str(tmp_path / f"model{suffix}"), "--version", suffix[1:], "--sample", str(sample))
    command("promote", "joblib")
    write_users(tmp_path / "users.json")
    with gunicorn(tmp_path, model_dir=tmp_path / "store", web_concurrency=2) as server:

        def assert_serves(suffix: str) -> None:
            status, answered = server.predict(ROWS)
            assert status == 200, answered
            assert np.allclose(answered["prediction"], expected[suffix], rtol=1e-5, atol=1e-6)

        with Load(server) as load:
            for suffix in expected:
                if suffix != ".joblib":
                    assert "all 2 workers serve it" in command("promote", suffix[1:], "--force", "--wait", "120")
                assert_serves(suffix)
            for suffix in list(expected)[-2::-1]:
                assert "all 2 workers serve it" in command("rollback", suffix[1:], "--wait", "120")
                assert_serves(suffix)
        assert load.errors == []
        assert set(load.statuses) == {200}
        assert {answer.version for answer in load.answers} == {suffix[1:] for suffix in expected}
