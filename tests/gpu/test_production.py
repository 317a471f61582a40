"""Whole training steps from the command line on one GPU, in every precision: arguments, optimizer, static budgets.

The other GPU tests build their model themselves; here the fused rotary embedding, the flags of each recipe and FP8
in every part are those of a run. No figure here was measured yet: the bound on the losses is what E4M3's
three bits admit.
"""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)
# Without it nothing here would be tested, which must not look like success on a GPU.
import transformer_engine.pytorch  # noqa: E402, F401

from benchmarks.common import Worker  # noqa: E402
from tests.gpu.production import MICRO_BATCHES, arguments  # noqa: E402

STEPS = 6
FP8 = ("fp8_tensorwise", "fp8_delayed", "fp8_blockwise", "mxfp8")


def losses(precision: str) -> list[float]:
    """Of each step, in a process of its own."""
    worker = Worker({"kind": "ours", "argv": arguments(precision), "micro_batches": MICRO_BATCHES})
    try:
        return [worker.step()["loss"] for _ in range(STEPS)]
    finally:
        worker.close()


@pytest.fixture(scope="module")
def curves() -> Iterator[dict[str, Future[list[float]]]]:
    """Losses by precision. Beside each other: a process imports for longer than it trains."""
    chosen = ["bf16", *(precision for precision in FP8 if refusal(precision) is None)]
    with ThreadPoolExecutor(len(chosen)) as threads:
        yield {precision: threads.submit(losses, precision) for precision in chosen}


def refusal(precision: str) -> str | None:
    """Why this GPU does not have a precision; None if it does."""
    capability = torch.cuda.get_device_capability()
    if precision == "mxfp8" and capability < (10, 0):
        return "MXFP8 needs Blackwell"
    if precision == "fp8_blockwise" and capability[0] != 9:
        return "the blockwise recipe is Hopper's"
    return None


@pytest.fixture(scope="module")
def bf16(curves: dict[str, Future[list[float]]]) -> list[float]:
    return curves["bf16"].result()


def test_bf16_learns(bf16: list[float]) -> None:
    """Text that repeats is learnt: the loss starts near that of guessing and falls."""
    assert abs(bf16[0] - math.log(512)) < 1
    assert bf16[-1] < bf16[0] - 0.1


@pytest.mark.parametrize("precision", FP8)
def test_fp8_learns_like_bf16(bf16: list[float], curves, precision: str, capsys) -> None:
    """Every part that can be in FP8: the losses are not bf16's own, stay within 3 % of them, and fall."""
    if (reason := refusal(precision)) is not None:
        pytest.skip(reason)
    found = curves[precision].result()
    away = max(abs(a - b) / b for a, b in zip(found, bf16, strict=True))
    with capsys.disabled():
        print(f"\nlosses in {precision}, from bf16: at most {away:.2%}")
    assert 1e-6 < away < 0.03
    assert found[-1] < found[0] - 0.1
