"""Parts of a trained vision encoder in a CUDA graph, one by one: which of them a graph cannot replay."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "part",
    [
        "patches",
        "layer, torch",
        "attention, torch",
        pytest.param(
            "attention, megatron", marks=pytest.mark.xfail(reason="why a graph refuses it", strict=False)
        ),
        pytest.param("layer, megatron", marks=pytest.mark.xfail(reason="has that attention", strict=False)),
    ],
)
def test_a_part_of_the_vision_encoder_replays(part: str) -> None:
    """Which part ends the replay of a trained encoder; in a process of its own, because CUDA is lost with it."""
    command = [sys.executable, "-m", "tests.gpu.graph_part", part]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
