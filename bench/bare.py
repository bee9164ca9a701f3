"""This server without password, record and metrics: what bench.cost compares it with.

AUTH=off gunicorn bench.bare:app
"""

import os
from typing import Any

import server
from settings import Settings


class Nothing:
    """Takes every call and does nothing."""

    def in_flight(self, view: Any) -> Any:
        return view

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self


server.log_monitor = Nothing()  # type: ignore[assignment]
server.Metrics = Nothing()  # type: ignore[assignment,misc]
app = server.create_app(Settings.from_environ(os.environ))
