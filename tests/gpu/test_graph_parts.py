"""Parts of a trained vision encoder in a CUDA graph: which of them a graph cannot replay (`graph_part.py` says why).

Each in a process of its own, because CUDA is lost with an illegal access; some beside each other, which import long and
compute little. A part that does not replay is a failure, also where one is expected: the answer is what is looked for.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from tests.gpu.graph_part import PARTS, versions  # noqa: E402

ROOT = Path(__file__).parents[2]
BESIDE, SECONDS = 8, 100
ANSWERS: dict[str, str] = {}


def run(part: str) -> dict[str, Any]:
    """The part's own last line, or what its process left if it died or hung."""
    command = [sys.executable, "-m", "tests.gpu.graph_part", part]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no end within {SECONDS} s", **versions()}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": f"exit code {done.returncode}: {done.stderr[-600:]}", **versions()}


@pytest.fixture(scope="module")
def answers() -> Iterator[dict[str, Future]]:
    """All parts, begun at the first of them."""
    with ThreadPoolExecutor(BESIDE) as pool:
        yield {part: pool.submit(run, part) for part in PARTS}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_vision_encoder_replays(part: str, answers: dict[str, Future], capsys) -> None:
    """Its answer is printed at once, in the form that the GPU report keeps when this process is ended."""
    found = answers[part].result()
    shown = ", ".join(f"{name} {found[name]}" for name in ("torch", "cudnn", "transformer-engine"))
    ANSWERS[part] = found["error"] or "replays"
    with capsys.disabled():
        print(f"\nRESULT {json.dumps({'parts': ANSWERS, 'versions': shown})}", flush=True)
    assert found["error"] is None, f"{found['error'][:300]} ({shown})"
