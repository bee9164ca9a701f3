"""This server without password, record and metrics: what bench.cost compares it with.

AUTH=off gunicorn bench.bare:app
"""

import os
from dataclasses import replace

import server
from settings import Settings

app = server.create_app(replace(Settings.from_environ(os.environ), extensions=("-telemetry",)))
app.extensions["service"].observers.clear()
