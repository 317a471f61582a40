"""`ivlx train` and `dry-run`: how many processes, started by whom, and the GPUs that a dry run assumes."""

import sys
from pathlib import Path

import pytest

import pretrain_vlm
from megatron_internvlx import launch, ranks, usage
from megatron_internvlx.commands import dry_run, train


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would be started: the words for torchrun, or for pretrain_vlm.py after "here"."""
    calls: list[list[str]] = []

    def here() -> int:
        calls.append(["here", *sys.argv])
        return 76

    monkeypatch.setattr(sys, "argv", ["ivlx train"])
    monkeypatch.setattr(pretrain_vlm, "main", here)
    monkeypatch.setattr(launch, "main", lambda words: calls.append(list(words)) or 77)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return calls


PROGRAM = str(Path(pretrain_vlm.__file__))
RUN = ["--recipe", "r.yaml", "--lr", "1e-3"]


@pytest.mark.parametrize(
    ("cards", "given", "count"),
    [
        (0, [], 1),
        (0, ["--ranks", "2"], 2),
        (8, [], 8),
        (8, ["--ranks", "1"], 1),
        (1, [], 1),
        (8, ["--dry-run"], 1),
    ],
)
def test_processes(started, monkeypatch, capsys, cards: int, given: list[str], count: int) -> None:
    monkeypatch.setattr(train, "visible_cards", lambda: cards)
    code = train.main([*RUN, *given])
    rest = [*RUN, *(word for word in given if word == "--dry-run")]
    if count == 1:
        assert (code, started) == (76, [["here", PROGRAM, *rest]])
        assert capsys.readouterr().err == ""
    else:
        assert (code, started) == (77, [["--standalone", "--nproc-per-node", str(count), PROGRAM, *rest]])
        assert capsys.readouterr().err.startswith(f"ivlx train: {count} ranks (")


def test_a_rank_of_a_launcher_is_the_program(started, monkeypatch, capsys) -> None:
    monkeypatch.setattr(train, "visible_cards", lambda: 8)
    monkeypatch.setenv("RANK", "3")
    assert train.main(RUN) == 76 and started == [["here", PROGRAM, *RUN]]
    assert train.main([*RUN, "--ranks", "2"]) == 2 and len(started) == 1
    assert "a launcher has done that already" in capsys.readouterr().err


@pytest.mark.parametrize("given", [[], ["--ranks", "3"]])
def test_a_layout_that_needs_more_ranks_is_refused(started, monkeypatch, capsys, given: list[str]) -> None:
    monkeypatch.setattr(train, "visible_cards", lambda: 0)
    words = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", *given]
    assert train.main(words) == 2 and started == []
    assert "needs at least 4 ranks (TP 2 x PP 2)" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert given or train.main(words) == 76  # Megatron knows how many there are


@pytest.mark.parametrize(
    ("files", "chosen", "count"),
    [
        ([], None, 0),
        ([], "0,1", 0),  # no driver: the CPU
        (["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"], None, 2),
        (["nvidia0", "nvidia1"], "1", 1),
        (["nvidia0", "nvidia1"], "", 0),
        (["nvidia0", "nvidia1"], "-1", 0),
    ],
)
def test_visible_cards(tmp_path, monkeypatch, files: list[str], chosen: str | None, count: int) -> None:
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(ranks, "Path", lambda _: tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert ranks.visible_cards() == count


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ([], 1),
        (["--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "2"], 8),
        (["--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "8"], 8),
        (["--recipe", "R", "--pipeline-model-parallel-size", "3"], 6),
        (["--recipe", "R", "--without", "tensor_model_parallel_size"], 1),
        (["--recipe", "S"], None),  # it names a number itself
        (["--recipe", "S", "--without", "dry-run-world-size"], 4),
        (["--dry-run-world-size", "64"], None),
        (["--recipe", "none.yaml"], None),  # for the complete parser to refuse
        (["--pipeline-model-parallel-size", "x"], None),
        (["--expert-model-parallel-size", "0"], None),
    ],
)
def test_gpus_of_a_dry_run(tmp_path, started, words: list[str], size: int | None) -> None:
    (tmp_path / "R").write_text("tensor-model-parallel-size: 2\n")
    (tmp_path / "S").write_text("tensor_model_parallel_size: 4\ndry_run_world_size: 64\n")
    words = [str(tmp_path / word) if word in ("R", "S") else word for word in words]
    assert dry_run.world_size(words) == size
    assert dry_run.main([*words, "--ranks", "12"]) == 76
    assert started[-1] == ["here", PROGRAM, *words, "--dry-run", "--dry-run-world-size", "12"]


def test_help_has_every_argument_of_the_short_help() -> None:
    for parser in (train.parser(), dry_run.parser()):
        known = {flag for action in parser._actions for flag in action.option_strings}
        rows = [row for _, group in usage.groups() for row in group]
        assert {f"--{row.name.replace('_', '-')}" for row in rows} | {"--recipe", "--ranks"} <= known
