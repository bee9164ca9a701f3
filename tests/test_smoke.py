from conftest import gunicorn


def test_a(tmp_path, iris_file):
    with gunicorn(tmp_path, model_path=iris_file) as s:
        assert s.predict([[5.1, 3.5, 1.4, 0.2]]) == (200, {"prediction": [0]})


def test_b(serve, iris_file):
    assert serve(iris_file).predict([[5.1, 3.5, 1.4, 0.2]]) == {"prediction": [0]}
