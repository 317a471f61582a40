"""The planner's command, in this process: Megatron's globals are put back after each run."""

import json
import os
import sys

import pytest

from megatron_internvlx.commands import plan
from tests.distributed import forget_megatron

MODEL = """
--num-layers 8 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --normalization RMSNorm
--swiglu --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights
--vision-preset internvit_tiny --image-size 56 --patch-size 14 --vocab-size 64
--make-vocab-size-divisible-by 1 --seq-length 64 --max-position-embeddings 64 --micro-batch-size 1
--global-batch-size 8 --expand-layer 3 --inject-layers 5 --max-tiles 6
"""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def run(*options: str) -> tuple[int, str, str]:
        environment = dict(os.environ)
        monkeypatch.setattr(sys, "argv", ["plan_pipeline.py", *MODEL.split(), *options])
        try:
            code = plan.main()
        except SystemExit as ended:  # argparse
            code = int(ended.code or 0)
        finally:
            forget_megatron()
            os.environ.clear()
            os.environ.update(environment)
        return code, *capsys.readouterr()

    return run


def test_plan(command, tmp_path) -> None:
    picture = tmp_path / "plan.png"
    code, out, _ = command(
        "--pipeline", "4", "--micro-batches", "8", "--timeline", str(picture), "--expansions"
    )
    assert code == 0
    layout = out.split("--pipeline-model-parallel-layout '")[1].split("'")[0]
    assert layout.startswith("E") and layout.endswith("L") and layout.count("|") == 3
    assert "uniform" in out and "bubble" in out and "where the expansion balances best" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in out.splitlines() if line.strip().startswith(("planned", "uniform"))]
    step = {words[0]: float(words[1]) for words in rows}
    assert 0 < step["planned"] <= step["uniform"]
    places = [line.split() for line in out.split("where the expansion balances best:")[1].splitlines()[2:]]
    times = [float(words[2]) for words in places if words]
    assert len(times) == 3 and times == sorted(times)  # layers 2 to 4: the injection at 5 stays above


def test_one_stage_needs_no_layout(command) -> None:
    code, out, _ = command("--pipeline", "1", "--micro-batches", "8")
    assert code == 0 and "no --pipeline-model-parallel-layout is needed" in out


@pytest.mark.parametrize("experts", [(), ("--num-experts", "4", "--moe-router-topk", "2")])
def test_plan_from_a_measured_profile(command, tmp_path, experts: tuple[str, ...]) -> None:
    profile = tmp_path / "profile.json"
    recompute = ("--recompute-granularity", "selective", "--recompute-modules", "moe") if experts else ()
    code, out, err = command("--measure", str(profile), "--repeats", "1", *experts, *recompute)
    assert code == 0, err
    found = json.loads(profile.read_text())
    suffix = "_experts" if experts else ""
    assert set(found["kinds"]) == {kind + suffix for kind in ("shallow", "expand", "deep", "inject")}
    times = [found["first"], found["last"], *found["kinds"].values()]
    assert all(part["forward"] > 0 and part["backward"] > 0 for part in times)
    code, out, err = command("--profile", str(profile), "--pipeline", "2", "--micro-batches", "4", *experts)
    assert code == 0, err
    assert f"measured, {profile}" in out and "--pipeline-model-parallel-layout 'E" in out


def test_gpus(command) -> None:
    code, out, _ = command("--gpus", "8")
    assert code == 0 and "for 8 GPUs, fastest first" in out


def test_mistakes_are_one_line(command, tmp_path) -> None:
    for options, message in (
        (
            ("--pipeline", "3", "--virtual", "2", "--micro-batches", "4"),
            "not a multiple of the 3 pipeline ranks",
        ),
        (("--profile", str(tmp_path / "none.json")), "No such file"),
        (("--pipeline", "4"), "1 GPUs cannot be divided into TP 1 x PP 4"),
        (("--pipeline", "0"), "--pipeline: 0: must be a whole number between 1 and "),
        (("--pipelin", "4"), "unknown arguments --pipelin"),
        (("--timelin", "a.png"), "did you mean --timeline?"),
        (("--pipeline", "2", "--micro-batches", "2", "--timeline", "/proc/none.png"), "No such file"),
        (("--gpu-memory-gib", "6.001"), "no split found that fits"),
    ):
        code, _, err = command(*options)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"kinds": {}}')
    assert "is not one that --measure wrote" in command("--profile", str(wrong))[2]
