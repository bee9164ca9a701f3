"""The server as a Cloud Run function: functions-framework calls `predict` for every path and method.

    gcloud functions deploy prediction-server --gen2 --runtime python311 --region R --source . --entry-point predict \
        --trigger-http --no-allow-unauthenticated --memory 2Gi --cpu 2 --concurrency 80 --min-instances 0 \
        --set-build-env-vars GOOGLE_FUNCTION_SOURCE=deploy/gcp/main.py \
        --set-env-vars AUTH=off,MODEL_PATH=model.joblib

In the root of the repository, with the model beside server.py and `functions-framework` in requirements.txt. Only
callers with the role `roles/run.invoker` reach it, so it is told AUTH=off. `gcloud functions delete prediction-server`
is the tear-down. It costs as Cloud Run does: https://cloud.google.com/functions/pricing

The platform's own gunicorn serves it: one process with threads, without this server's worker, drain and time limits of
bodies. Cloud Run with the image (cloud_run.py) has them.
"""

import os
import sys
from pathlib import Path

from flask import Request
from werkzeug import Response

sys.path.insert(0, str(Path(__file__).parents[2]))

from server import create_app
from settings import Settings

app = create_app(Settings.load())  # with the defaults of Cloud Run
# The model loads while the instance starts, not at its first request; and in the worker, since a thread that imports
# while its process is forked leaves half a module behind.
os.register_at_fork(after_in_child=app.extensions["service"].start)


def predict(request: Request) -> Response:
    """Answer any request as the server does."""
    return Response.from_app(app.wsgi_app, request.environ)
