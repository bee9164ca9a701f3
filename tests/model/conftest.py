"""What the tests of this room share."""

from collections.abc import Iterator

import pytest
from threadpoolctl import threadpool_limits


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Limit OpenMP and BLAS to one thread: on busy cores a pool mostly waits."""
    with threadpool_limits(1):
        yield
