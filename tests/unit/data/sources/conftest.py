"""The command as a fixture."""

import pytest

from tests.preparing import Command


@pytest.fixture
def prepare(capsys):
    return Command(capsys)
