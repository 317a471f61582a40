"""Fixtures that the tests of layouts share."""

import pytest

from tests.distributed import Pool
from tests.layout_cases import Runner


@pytest.fixture(scope="module")
def runner(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Trains cases; it keeps what they are compared with for the tests of one file."""
    return Runner(pool, tmp_path_factory.mktemp("layouts"))
