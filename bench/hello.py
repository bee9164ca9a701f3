"""A Flask application that does nothing, on this server's own gunicorn settings: what is left for all else to cost.

gunicorn bench.hello:app
"""

import threading
from types import SimpleNamespace

from flask import Flask

app = Flask(__name__)
finished = threading.Event()
finished.set()
# What the hooks of gunicorn.conf.py call.
app.extensions["service"] = SimpleNamespace(
    start=lambda: None,
    serving=SimpleNamespace(finished=finished),
    request_log=SimpleNamespace(summarise=lambda: None),
)


@app.route("/predict", methods=["POST"])
def hello():
    return {"hello": "world"}
