"""Programs of examples/ that build on the package run as they are, and show what they say they show."""

import importlib.util
from pathlib import Path
from types import ModuleType

from tests.distributed import Pool, init_parallel

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    """A program as a module, its main part left out."""
    path = EXAMPLES / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train() -> tuple[list[int], list[float]]:
    init_parallel()
    return load("lvtc_in_gpt.py").train()


def test_lvtc_in_a_gpt_of_ones_own(pool: Pool) -> None:
    """Rows grow at the entry of layer 2, and the answers are learnt through them.

    Two samples of a start token, a question and an answer with 4, then 16 rows of their image. Measured: a loss of
    2.68 in the first five steps, 0.88 in the last five; 2.19 there if the images are blank (guessing: ln 8 = 2.08).
    """
    ((rows, losses),) = pool.run(1, train)
    assert rows == [2 * (3 + 4)] * 2 + [2 * (3 + 16)] * 2
    assert sum(losses[:5]) / 5 > 2
    assert sum(losses[-5:]) / 5 < 1.5
