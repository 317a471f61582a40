"""Base of adapters: its fingerprint, and which base and adapters are refused."""

from tests.single import single  # noqa: F401  isort: skip  (sets Megatron up)
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.training import checkpointing

from megatron_internvlx import files
from megatron_internvlx.lifecycle import base as base_module
from megatron_internvlx.lifecycle.base import base_fingerprint, check_base
from megatron_internvlx.lifecycle.continuation import Continuation
from megatron_internvlx.model import lora
from tests.namespaces import parsed

LORA = {"lora_rank": 4, "freeze_vision": True}


def save_weights(folder: Path, iteration: int | None = None, **changes: torch.Tensor) -> Path:
    """Writes a checkpoint with two weights, their optimizer state, and these changes; returns `folder`."""
    tensors = {
        "language_model.w": torch.arange(6000.0).view(100, 60),
        "projector.scale": torch.ones(1, 2),
        "optimizer.state.exp_avg.language_model.w": torch.zeros(4),
    }
    named = {name.replace("__", "."): value for name, value in changes.items()}
    checkpoint = folder / "release" if iteration is None else files.checkpoint_directory(folder, iteration)
    dcp.save(tensors | named, checkpoint_id=checkpoint, no_dist=True)
    (folder / files.TRACKER).write_text("release" if iteration is None else str(iteration))
    return folder


def test_a_fingerprint_is_of_the_weights(tmp_path: Path) -> None:
    """A moved base and another optimizer state change nothing; a weight, a shape or a type does."""
    known = base_fingerprint(save_weights(tmp_path / "base"))
    assert re.fullmatch("[0-9a-f]{64}", known)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    assert base_fingerprint(tmp_path / "moved") == base_fingerprint(tmp_path / "moved" / "release") == known
    state = {"optimizer__state__exp_avg__language_model__w": torch.ones(4), "rng_state": torch.ones(2)}
    assert base_fingerprint(save_weights(tmp_path / "trained", 7, **state)) == known
    first, last = torch.arange(6000.0).view(100, 60), torch.arange(6000.0).view(100, 60)
    first[0, 0], last[-1, -1] = 1, 1
    for number, changed in enumerate((first, last, first.view(60, 100), first.half())):
        other = save_weights(tmp_path / str(number), language_model__w=changed)
        assert base_fingerprint(other) != known


def test_a_fingerprint_is_of_the_middle_too(tmp_path: Path) -> None:
    """The middle half of a tensor that is larger than all samples together."""
    weight = torch.arange(40_000.0).view(100, 400)
    known = base_fingerprint(save_weights(tmp_path / "base", language_model__w=weight.clone()))
    weight[25:75] += 1
    assert base_fingerprint(save_weights(tmp_path / "other", language_model__w=weight)) != known


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint is in it"):
        base_fingerprint(tmp_path)
    folder = save_weights(tmp_path / "torn")
    (data,) = (folder / "release").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ValueError, match="torn/release: its weights cannot be read"):
        base_fingerprint(folder)


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> dict[Path, Namespace]:
    """Arguments in checkpoints; others cannot be read."""
    known: dict[Path, Namespace] = {}
    monkeypatch.setattr(base_module, "made_with", known.__getitem__)
    return known


Resume = Callable[..., None]


@pytest.fixture
def resume(tmp_path: Path, stored: dict[Path, Namespace]) -> Resume:
    """Checks a run on the base that resumes adapters, with changes of either's arguments."""
    save_weights(tmp_path / "base")
    adapters = save_weights(tmp_path / "adapters", 3) / "iter_0000003"

    def go(made: dict[str, Any], **now: Any) -> None:
        note = {"lora_base": "elsewhere", "lora_base_fingerprint": base_fingerprint(tmp_path / "base")}
        stored[adapters] = parsed(**LORA | note | made)
        paths = {"load": str(adapters.parent), "pretrained_checkpoint": str(tmp_path / "base")}
        args = parsed(**LORA | paths | now)
        check_base(args)
        assert args.lora_base == paths["pretrained_checkpoint"]
        assert args.lora_base_fingerprint == note["lora_base_fingerprint"]

    return go


def test_a_base_that_trained_on_is_taken_at_the_step_of_the_adapters(
    tmp_path: Path, stored: dict[Path, Namespace]
) -> None:
    base = save_weights(tmp_path / "base", 5)
    note = {
        "lora_base": "elsewhere",
        "lora_base_fingerprint": base_fingerprint(base),
        "lora_base_step": 5,
    }
    save_weights(base, 9, projector__scale=torch.zeros(1, 2))
    adapters = save_weights(tmp_path / "adapters", 3) / "iter_0000003"
    stored[adapters] = parsed(**LORA | note)
    paths = {"load": str(adapters.parent), "pretrained_checkpoint": str(base)}
    args = parsed(**LORA | paths)
    check_base(args)
    assert (args.lora_base_step, args.lora_base_fingerprint) == (5, note["lora_base_fingerprint"])
    fresh = parsed(**LORA | {"pretrained_checkpoint": str(base)})
    check_base(fresh)
    assert fresh.lora_base_step == 9
    shutil.rmtree(base / "iter_0000005")
    with pytest.raises(ValueError, match="wherever it is now, with its step 5"):
        check_base(parsed(**LORA | paths))


def test_the_same_base_elsewhere_is_taken(resume: Resume) -> None:
    resume({})
    resume({}, finetune=True)
    resume({}, lora_alpha=8.0)  # what it is by default
    resume({"lora_targets": ["decoder_mlp", "decoder_attention"]}, freeze_llm=True)


@pytest.mark.parametrize("finetune", [False, True])
@pytest.mark.parametrize(
    ("made", "now", "said"),
    [
        (
            {"lora_base_fingerprint": "abc"},
            {},
            "another base: of elsewhere with the fingerprint abc, and .* has",
        ),
        ({"lora_base_fingerprint": None}, {}, "whole weights and no adapters: give --pretrained-checkpoint"),
        ({}, {"lora_rank": 8, "lora_alpha": 8.0}, r"--lora-rank 4 -> 8: give what its adapters were trained"),
        ({}, {"lora_alpha": 9.0}, r"--lora-alpha 8.0 -> 9.0"),
        ({}, {"lora_rslora": True}, r"--lora-rslora False -> True"),
        (
            {},
            {"lora_targets": ["decoder_mlp"]},
            r"--lora-targets decoder_attention decoder_mlp -> decoder_mlp",
        ),
        ({}, {"freeze_projectors": True}, r"frozen parts llm vision -> llm projectors vision"),
    ],
)
def test_other_adapters_are_refused(
    resume: Resume, made: dict[str, Any], now: dict[str, Any], said: str, finetune: bool
) -> None:
    with pytest.raises(ValueError, match=said):
        resume(made, **now, finetune=finetune)


def test_adapters_need_their_base(resume: Resume, tmp_path: Path, stored: dict[Path, Namespace]) -> None:
    for missing in (None, ""):
        with pytest.raises(
            ValueError, match=r"needs --pretrained-checkpoint at every start.*theirs is elsewhere"
        ):
            resume({}, pretrained_checkpoint=missing)
    with pytest.raises(ValueError, match=r"needs --pretrained-checkpoint at every start.*an import"):
        check_base(parsed(**LORA))
    with pytest.raises(ValueError, match="must be a directory, not a URL"):
        resume({}, pretrained_checkpoint="msc://profile/base")
    with pytest.raises(ValueError, match="is the base of the adapters"):
        resume({}, save=str(tmp_path / "adapters" / ".." / "base"))
    stored[tmp_path / "base" / "release"] = parsed(lora_base="first", lora_rank=4)
    with pytest.raises(
        ValueError, match=r"holds adapters of first and not weights: .*--pretrained-checkpoint fi"
    ):
        resume({})


@pytest.mark.parametrize("flag", ["load", "pretrained_checkpoint"])
def test_adapters_are_no_weights(resume: Resume, tmp_path: Path, flag: str) -> None:
    resume({})
    unset = {"load": None, "pretrained_checkpoint": None}
    with pytest.raises(
        ValueError, match="adapters of elsewhere and not weights: continue with --lora-rank 4"
    ):
        check_base(parsed(**unset | {flag: str(tmp_path / "adapters")}))
    check_base(parsed(**unset | {flag: str(tmp_path / "base")}))


@pytest.mark.parametrize("finetune", [False, True])
def test_a_named_step_is_the_one_that_is_checked(resume: Resume, tmp_path: Path, finetune: bool) -> None:
    save_weights(tmp_path / "adapters", 9)
    with pytest.raises(ValueError, match="iter_0000003 does not fit"):
        resume({}, ckpt_step=3, lora_alpha=9.0, finetune=finetune)


Loads = list[tuple[str | None, str | None, int | None, bool]]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Loads, Namespace, Any]]:
    """Runs the loading of base and adapters; returns what Megatron was told each time, the arguments, the result."""

    def go(**given: Any) -> tuple[Loads, Namespace, Any]:
        args, seen = parsed(**LORA | {"pretrained_checkpoint": "base"} | given), Loads()

        def load(model: list, *parts: Any, strict: bool) -> tuple[int, int]:
            assert (model, parts, strict) == (["stage"], ("optimizer", "scheduler"), False)
            seen.append((args.load, args.pretrained_checkpoint, args.ckpt_step, args.finetune))
            args.finetune = args.finetune or args.load is None  # as Megatron does
            return (0 if args.finetune else 7), 5

        monkeypatch.setattr(checkpointing, "load_checkpoint", load)
        monkeypatch.setattr(lora, "base_checkpoint", lambda stages: nullcontext())
        return seen, args, base_module._load_both(args, ["stage"], "optimizer", "scheduler")  # type: ignore[list-item]

    return go


def test_the_base_is_loaded_first(loads: Callable[..., tuple[Loads, Namespace, Any]], tmp_path: Path) -> None:
    (tmp_path / files.TRACKER).write_text("7")
    run, none = str(tmp_path), str(tmp_path / "new")
    for given in ({"load": None}, {"load": none}, {"load": none, "save": none}):
        seen, args, result = loads(**given)
        assert seen == [(None, "base", None, False)] and result == (0, 5)
        assert (args.load, args.finetune) == (given["load"], True)
    for finetune, step in ((False, None), (True, None), (False, 7)):
        seen, args, result = loads(load=run, finetune=finetune, ckpt_step=step)
        assert seen == [(None, "base", None, finetune), (run, None, step, finetune)]
        assert result == (0 if finetune else 7, 5)
        assert (args.load, args.pretrained_checkpoint, args.ckpt_step) == (run, "base", step)


@pytest.mark.parametrize(("rank", "kept"), [(4, "base"), (None, None)])
def test_a_resumed_run_keeps_the_base_of_adapters(rank: int | None, kept: str | None) -> None:
    run = Continuation.__new__(Continuation)
    run.args = parsed(lora_rank=rank, pretrained_checkpoint="base", save="run")
    run._load(7)
    assert (run.args.load, run.args.ckpt_step, run.args.pretrained_checkpoint) == ("run", 7, kept)
