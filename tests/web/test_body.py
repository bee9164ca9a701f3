"""A body's time is counted in ticks, of which none comes while a platform has stopped the process."""

import io

import pytest
from werkzeug.exceptions import RequestTimeout

from web.body import BodyReader


class Slow(io.BytesIO):
    """A body of which each byte takes a second."""

    reader: BodyReader

    def read(self, size: int | None = -1, /) -> bytes:
        self.reader.expire_reads()
        return super().read(1)


@pytest.mark.parametrize(("length", "is_late"), [(2, False), (3, True), (30, True)])
def test_body_has_as_many_ticks_as_seconds(length: int, is_late: bool) -> None:
    reader, body = BodyReader(1000, 2.0), Slow(b"x" * length)
    body.reader = reader
    environ = {"CONTENT_LENGTH": str(length), "wsgi.input": body}
    if not is_late:
        assert reader.read(environ) == b"x" * length
        return
    with pytest.raises(RequestTimeout, match="within 2 seconds"):
        reader.read(environ)
    assert body.tell() == 3
