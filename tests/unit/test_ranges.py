"""Every number is finite and in its range before anything is built."""

import argparse
import re
from dataclasses import fields
from typing import get_type_hints

from tests import single  # noqa: F401  # isort: skip  (sets Megatron up)
import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_internvlx import arguments
from megatron_internvlx.config import SETTINGS
from megatron_internvlx.ranges import DESTINATIONS, RANGES
from tests.unit.test_arguments import NEEDED, TINY, parsed

BOTH = [False, True]


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    known = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    for settings in SETTINGS:
        arguments.ArgumentGroupFactory(settings).build_group(known)
    return known


def test_every_number_of_ours_has_a_range() -> None:
    numbers = {
        field.name
        for settings in SETTINGS
        for field in fields(settings)
        if re.search(r"\b(int|float)\b", str(get_type_hints(settings)[field.name]))
    }
    assert len(numbers) > 20
    assert numbers - set(RANGES) == set()


def test_every_range_is_of_an_argument_and_holds_its_default(parser: argparse.ArgumentParser) -> None:
    actions = {action.dest: action for action in parser._actions}
    for name, span in RANGES.items():
        action = actions[DESTINATIONS.get(name, name)]
        assert f"--{name.replace('_', '-')}" in action.option_strings
        assert action.type in (int, float), name
        assert span.low < span.high and span.what
        assert action.default is None or span.contains(action.default), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lr inf", "--lr inf: must be at least 0 and at most 1,000.0 (the peak of the learning rate)"),
        ("--lr nan", "--lr nan: must be at least 0"),
        ("--lr -1", "--lr -1.0: must be at least 0"),
        ("--weight-decay nan", "--weight-decay nan: must be at least 0"),
        ("--clip-grad nan", "--clip-grad nan: must be at least 0"),
        ("--lr-warmup-fraction 2", "--lr-warmup-fraction 2.0: must be at least 0.0 and below 1.0"),
        ("--lr-warmup-fraction 1", "--lr-warmup-fraction 1.0: must be at least 0.0 and below 1.0"),
        ("--adam-beta2 7", "--adam-beta2 7.0: must be at least 0.0 and below 1.0"),
        ("--vision-drop-path -0.5", "--vision-drop-path -0.5: must be at least 0.0 and below 1.0"),
        ("--projector-drop-path 1", "--projector-drop-path 1.0: must be at least 0.0 and below 1.0"),
        ("--train-iters -3", "--train-iters -3: must be at least 1"),
        (
            f"--train-iters {10**30}",
            "--train-iters 1000000000000000000000000000000: must be at least 1 and at most",
        ),
        (f"--train-iters {10**300}", "--train-iters 100000000000... (301 digits): must be"),
        ("--log-interval 0", "--log-interval 0: must be at least 1"),
        ("--vocab-size -1", "--vocab-size -1: must be at least 1"),
        ("--loader-workers -1", "--loader-workers -1: must be at least 0"),
        (f"--seed {2**70}", f"--seed {2**70}: must be at least 1 and at most 2,147,483,647"),
        ("--pack-buffer 0", "--pack-buffer 0: must be at least 1"),
        ("--max-reject-rate 1.5", "--max-reject-rate 1.5: must be at least 0.0 and at most 1.0"),
        ("--stall-minutes nan", "--stall-minutes nan: must be at least 0"),
        ("--norm-epsilon 0", "--norm-epsilon 0.0: must be above 0 and at most 1"),
        ("--expand-layer 2 --inject-layers 3 -1", "--inject-layers -1: must be at least 0"),
        # Not in the table: finite, and 64 bits.
        ("--moe-router-bias-update-rate nan", "--moe-router-bias-update-rate nan: must be a finite number"),
        (f"--null-tokenizer-eod-id {2**63}", f"--null-tokenizer-eod-id {2**63}: must fit into 64 bits"),
        # All at once.
        (
            "--lr inf --adam-beta1 1",
            "--adam-beta1 1.0: must be at least 0.0 and below 1.0 (the decay of a running mean); --lr",
        ),
        # Two of them.
        ("--min-lr 5", "--min-lr 5.0 is more than the peak, --lr 0.001"),
        ("--lr-warmup-init 1", "--lr-warmup-init 1.0 is more than the peak, --lr 0.001"),
        ("--bf16 --fp16", "--bf16 and --fp16: set only one of them"),
        (
            "--train-iters 4 --lr-warmup-iters 4",
            "--lr-warmup-iters 4 must be below the length of the decay, 4 iters",
        ),
        (
            "--lr-decay-iters 9 --lr-warmup-iters 9 --train-iters 20",
            "--lr-warmup-iters 9 must be below the length of the decay, 9 iters",
        ),
        (
            "--lr-warmup-fraction 0.5 --lr-warmup-iters 1",
            "--lr-warmup-fraction 0.5 and --lr-warmup-iters 1: set only one",
        ),
        ("--lr-decay-style WSD", "--lr-decay-style WSD: --lr-wsd-decay-iters is None, must be 1 to 1"),
        ("--weight-decay-incr-style linear", "needs --start-weight-decay (now None) and --end-weight-decay"),
    ],
)
@pytest.mark.parametrize("dry", BOTH, ids=["run", "dry run"])
def test_values_that_make_no_sense(
    flags: str, message: str, dry: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(arguments.platform, "pretend_hopper", lambda: None)
    with pytest.raises(ValueError) as raised:
        parsed(monkeypatch, *TINY, *NEEDED, *flags.split(), *(["--dry-run"] if dry else []))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_missing_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError) as raised:
        parsed(monkeypatch, *TINY)
    assert str(raised.value) == (
        "not set: --seq-length (tokens of a sample or a pack), --lr (the peak of the learning rate), "
        "--train-iters (or --train-samples, or --epochs), --data (meta.json of the training data), "
        "--tokenizer-model (a Hugging Face tokenizer directory); give them on the command line or in a --recipe"
    )
    with pytest.raises(ValueError, match=r"not set: --lr \(the peak of the learning rate\); give"):
        parsed(monkeypatch, *TINY, "--seq-length", "256", "--train-samples", "1", "--dry-run")
