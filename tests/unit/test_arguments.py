"""The command line: presets, recipes, refusals with a message, and flags that users rely on."""

import argparse
import os
import re
import sys
from pathlib import Path

from tests import single  # noqa: F401  # isort: skip  (sets Megatron up)
import pytest
import torch
from megatron.training.argument_utils import ArgumentGroupFactory, core_transformer_config_from_args
from megatron.training.arguments import add_megatron_arguments, parse_args
from torch.distributed.rendezvous import rendezvous

from megatron_internvlx import arguments, paths
from megatron_internvlx.config import SETTINGS
from megatron_internvlx.lifecycle.start import check_paths
from megatron_internvlx.model.presets import PRESETS, preset
from megatron_internvlx.model.sizes import vision_config
from megatron_internvlx.training.provider import plan_settings
from tests.golden_weights import GOLDEN

TOKENIZER = GOLDEN / "data" / "tokenizers" / "qwen2_fast"
TINY = ["--model-preset", "internvlx_tiny"]
NEEDED = ["--tokenizer-model", str(TOKENIZER), "--data", "meta.json", "--seq-length", "256"]
NEEDED += ["--lr", "1e-3", "--train-iters", "1", "--global-batch-size", "1"]


def parsed(monkeypatch: pytest.MonkeyPatch, *flags: str) -> argparse.Namespace:
    """All of `arguments.parse` but Megatron's global variables, which a process can set only once."""
    monkeypatch.setattr(sys, "argv", ["pretrain_vlm.py", *flags])
    args = parse_args(arguments.add_our_arguments)
    arguments.check_arguments(args)
    arguments.validate(args)
    return args


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_parses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Megatron asks the device whether it has grouped matrix products, for the mixture of experts.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    args = parsed(monkeypatch, "--model-preset", name, *NEEDED)
    for setting, value in PRESETS[name].items():
        if setting != "vocab_size":
            assert getattr(args, setting) == value, setting
    # Released vocabularies may be larger than the tokenizer; small models follow it.
    size = arguments.tokenizer_size(str(TOKENIZER))
    assert args.vocab_size == (size if "tiny" in name else max(size, PRESETS[name]["vocab_size"]))


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"--model-preset internvlx_3b: unknown; one of .*internvlx_2b"):
        preset("internvlx_3b")


def test_order_of_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preset, then recipe, then command line."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_preset: internvlx_tiny\nexpand-layer: 4\ninject_layers: [5]\nseq_length: 128\n")
    args = parsed(monkeypatch, "--recipe", str(recipe), *NEEDED)
    assert (args.num_layers, args.expand_layer, args.inject_layers) == (6, 4, [5])
    assert args.seq_length == 256
    args = parsed(monkeypatch, "--recipe", str(recipe), *NEEDED, "--expand-layer", "2", "--vocab-size", "900")
    assert (args.expand_layer, args.vocab_size) == (2, 900)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("a: [1\n", "not YAML"),
        ("- seq_length\n", "a recipe must be a flat mapping of argument names to values"),
        (
            "seq_length: 8\nexpand_layr: 3\nzeta: 1\n",
            r"unknown arguments expand_layr \(do you mean expand_layer\?\), zeta",
        ),
        ("expand_layer: three\n", "expand_layer: 'three' must be a number"),
        ("train_iters: 2.5\n", "train_iters: 2.5 must be a whole number"),
        ("lr: true\n", "lr: True must be a number"),
        ("inject_layers: 4\n", r"inject_layers: 4 must be a list: write \[4\]"),
        ("expand_layer: [3]\n", r"expand_layer: \[3\] must be a single value, not a list"),
        ("rvtc: sideways\n", "rvtc: 'sideways' must be one of edge, area, off"),
        ("freeze_llm: maybe\n", "freeze_llm: 'maybe' must be true or false"),
        ("lr: {start: 1}\n", "lr: {'start': 1} must not be a mapping: a recipe is flat"),
        ("train_iters: .inf\n", "train_iters: inf must be a whole number"),
        ("inject_layers: [.nan]\n", r"inject_layers: \[nan\] must be a whole number"),
        ("lr: .nan\n", "lr: nan must be a finite number"),
        ("lr: 2024-01-01\n", r"lr: datetime.date\(2024, 1, 1\) must be a number"),
        ("clip_grad: null\n", "clip_grad: None must be a value: give one, or remove the line for 1.0"),
        ("data: 5\n", "data: 5 must be text: put it in quotes"),
        ("lr: 1\nseed: 1\nlr: 2\n", "lr is set twice, in lines 1 and 3: keep one"),
        ("conversation_template: phi3-chat\n", "conversation_template: 'phi3-chat' must be one of internlm2"),
    ],
)
def test_bad_recipes(
    content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"--recipe {re.escape(str(path))}: {message}"):
        parsed(monkeypatch, *TINY, *NEEDED, "--recipe", str(path))


def test_settings_of_a_recipe_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("freeze_llm: true\nexpand_layer: 2\nlr: 0.1\n")
    command = [*TINY, *NEEDED, "--recipe", str(path), "--without"]
    args = parsed(monkeypatch, *command, "freeze-llm", "expand_layer", "--loader-workers", "0")
    assert (args.freeze_llm, args.expand_layer) == (False, 3)
    with pytest.raises(
        ValueError, match=r"--without freeze_lm: .* has no such setting \(do you mean freeze_llm\?\)"
    ):
        parsed(monkeypatch, *command, "freeze_lm")


def test_recipe_that_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match="not YAML: it is not text"):
        parsed(monkeypatch, *TINY, *NEEDED, "--recipe", str(path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--expand-laier", "3"],
            "unknown arguments --expand-laier (do you mean --expand-layer?) 3; --help shows",
        ),
        (["--expand-layer", "x"], "argument --expand-layer: invalid int value: 'x'; --help shows"),
        (["--rvtc", "sideways"], "argument --rvtc: invalid choice: 'sideways'"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        parsed(monkeypatch, *TINY, *NEEDED, *flags)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{bad", "--vision-overrides {bad: not JSON: Expecting property name"),
        ("[1]", "--vision-overrides [1]: must be a JSON object"),
        ('{"num_layer": 2}', "InternViT has no field num_layer (do you mean num_layers?)"),
        ('{"zeta": 2}', "InternViT has no field zeta: one of hidden_size, num_layers"),
        ('{"hidden_size": "x"}', '--vision-overrides: hidden_size is "x", must be a whole number'),
        ('{"qkv_bias": 1}', "--vision-overrides: qkv_bias is 1, must be true or false"),
        ('{"num_layers": -1}', "num_layers -1 of the vision encoder: it must be at least 0"),
        ('{"patch_size": 0}', "patch_size 0 of the vision encoder: it must be at least 1"),
    ],
)
def test_vision_overrides(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parsed(monkeypatch, *TINY, *NEEDED, "--vision-overrides", text)
    args = parsed(monkeypatch, *TINY, *NEEDED, "--vision-overrides", '{"num_layers": 2, "layer_norm_eps": 0}')
    assert vision_config(args).num_layers == 2


EXPERTS = ["--num-experts", "4", "--moe-ffn-hidden-size", "64"]


@pytest.mark.parametrize(
    ("ranks", "flags", "message"),
    [
        (
            1,
            ["--pipeline-model-parallel-size", "2"],
            "1 rank cannot be divided into TP 1 x PP 2 = 2: start 2",
        ),
        (3, ["--tensor-model-parallel-size", "2"], "3 ranks cannot be divided into TP 2 x PP 1 = 2: start 4"),
        (3, ["--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size 0: must be at least 1"),
        (
            6,
            ["--global-batch-size", "16", "--tensor-model-parallel-size", "2"],
            "--global-batch-size 16 must be a multiple of --micro-batch-size 1 x 3 data-parallel ranks = 3 "
            "(6 ranks / TP 2 / PP 1): use 15",
        ),
        (
            4,
            [*EXPERTS, "--expert-model-parallel-size", "3"],
            "the model's 4 experts cannot be divided by --expert-model-parallel-size 3: use one of 1, 2, 4",
        ),
        (
            2,
            ["--expert-model-parallel-size", "2"],
            "the model's 0 experts cannot be divided by --expert-model-parallel-size 2: remove it",
        ),
        (
            2,
            [*EXPERTS, "--expert-model-parallel-size", "4"],
            "2 ranks cannot be divided into EP 4 x expert TP 1 x PP 1 = 4: start 4 ranks",
        ),
        (1, [*EXPERTS, "--moe-router-topk", "5"], "--moe-router-topk 5 is more than the model's 4 experts"),
        (
            2,
            ["--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", "Ett|tttL"],
            "has 5 layers (2 + 3) and the model 6",
        ),
    ],
)
def test_layouts_that_do_not_divide(
    ranks: int, flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(ValueError, match=re.escape(message)):
        parsed(monkeypatch, *TINY, *NEEDED, *flags)


def test_a_preset_that_this_megatron_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "strange", {"num_lairs": 3, "hidden_size": 16})
    with pytest.raises(ValueError, match="settings unknown to this version of Megatron: num_lairs"):
        parsed(monkeypatch, "--model-preset", "strange", *NEEDED)


STATIC = ["--boundary", "static", "--max-tiles-per-pack", "13", "--shallow-seq-length", "128"]
FEW = ["--max-supervised-tokens-per-pack"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*TINY, "--image-size", "225"], "image_size 225 is not a multiple of patch_size 28"),
        ([*TINY, "--vision-preset", "clip"], "unknown vision encoder 'clip'"),
        ([*TINY, "--select-layer", "9"], "select_layer 9 is outside -4..3"),
        (
            [],
            "not set: --num-layers (or a --model-preset), --hidden-size (or a --model-preset), "
            "--num-attention-heads (or a --model-preset); give them on the command line or in a --recipe",
        ),
        (
            ["--num-layers", "4", "--hidden-size", "64"],
            "not set: --num-attention-heads (or a --model-preset); give",
        ),
        ([*TINY, "--expand-layer", "6"], "--expand-layer 6 must be between 1 and 5"),
        ([*TINY, "--high-ratio", "0.3"], "--high-ratio 0.3 does not fit 8x8 patches"),
        ([*TINY, "--hidden-size", "136"], "--hidden-size 136 is not a multiple of 16"),
        ([*TINY, "--context-parallel-size", "2"], "--context-parallel-size: not supported with InternVL-X"),
        ([*TINY, "--mtp-num-layers", "1"], "--mtp-num-layers: not supported"),
        (
            [*TINY, "--multi-latent-attention", "--use-torch-fsdp2"],
            "--multi-latent-attention, --use-torch-fsdp2: not supported",
        ),
        ([*TINY, "--use-megatron-fsdp"], "--use-megatron-fsdp: not supported"),
        ([*TINY, "--cuda-graph-impl", "local"], "--cuda-graph-impl local: graphs of single layers"),
        (
            [*TINY, "--cuda-graph-impl", "full_iteration", "--clip-grad", "0"],
            "--cuda-graph-impl full_iteration cannot go with --boundary variable (micro-batches of different shapes; "
            "use static); --transformer-impl local (no GPU kernels); --clip-grad 0 (the norm shows",
        ),
        ([*TINY, "--heterogeneous-layers-config-path", "x"], "--heterogeneous-layers-config-path: not supp"),
        (
            [*TINY, "--max-position-embeddings", "128"],
            "--seq-length 256 is more than the model's --max-position-embeddings 128",
        ),
        ([*TINY, "--boundary", "static"], "--boundary static needs --max-tiles-per-pack and --shallow-seq"),
        ([*TINY, *STATIC, "--seq-length", "208"], "--seq-length 208 is too small for the 208 visual rows"),
        ([*TINY, *FEW, "64"], "--max-supervised-tokens-per-pack 64 needs --boundary static"),
        (
            [*TINY, *STATIC, *FEW, "129"],
            "--max-supervised-tokens-per-pack 129 must be at least 1 (samples of a micro-batch) and at most 128, the",
        ),
        ([*TINY, *STATIC, *FEW, "0"], "--max-supervised-tokens-per-pack 0: must be at least 1"),
        (
            [*TINY, "--freeze-vision", "--freeze-llm", "--freeze-projectors"],
            "--freeze-vision --freeze-llm --freeze-projectors: nothing is left to train",
        ),
        ([*TINY, "--min-tiles", "0"], "--min-tiles 0: must be at least 1 and at most 65,536 (tiles)"),
        (
            [*TINY, "--min-tiles", "7", "--max-tiles", "6"],
            "--min-tiles 7 must be at least 1 and at most --max-tiles 6",
        ),
        ([*TINY, "--data", ""], "not set: --data (meta.json of the training data); give"),
        (
            [*TINY, "--tokenizer-model", ""],
            "not set: --tokenizer-model (a Hugging Face tokenizer directory); give",
        ),
        ([*TINY, "--train-samples", "3"], "--train-iters 1 and --train-samples 3: set only one of them"),
        (
            [*TINY, "--data", "", "--tokenizer-model", "", "--save", "x"],
            "not set: --save-interval (steps between two checkpoints), --data (meta.json of the training data), "
            "--tokenizer-model (a Hugging Face tokenizer directory); give",
        ),
        # Megatron's own checks: with a text, and without one.
        (
            [*TINY, "--overlap-param-gather"],
            "Megatron refuses the arguments: --overlap-param-gather only supported with distributed optimizer",
        ),
        (
            [*TINY, "--log-memory-interval", "3", "--log-interval", "2"],
            "Megatron refuses the arguments: it requires log_memory_interval % log_interval == 0 "
            "(--log-memory-interval is 3, --log-interval is 2)",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parsed(monkeypatch, *NEEDED, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--save", "/proc/none", "--save-interval", "1"], "--save: /proc/none cannot be made: No such file"),
        (["--report-file", "/proc/none/r.png"], "--report-file: /proc/none cannot be made"),
        (["--pretrained-checkpoint", "/none"], "--pretrained-checkpoint /none: no such directory"),
        (["--load", "/none"], "--load /none: no such directory"),
    ],
)
def test_paths_that_cannot_be_used(flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = parsed(monkeypatch, *TINY, *NEEDED, *flags)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=re.escape(message)):
        check_paths(args)
    monkeypatch.setenv("RANK", "1")
    check_paths(args)


def test_a_process_without_a_launcher_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "kept")
    arguments.default_to_one_rank()
    assert os.environ["MASTER_ADDR"] == "kept"
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    arguments.default_to_one_rank()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
    ports = []
    for _ in range(2):  # the store listens before anybody hears of its port, so nobody can take it first
        store, rank, world_size = next(rendezvous("env://"))
        ports.append(store.port)
        assert (rank, world_size) == (0, 1)
    assert min(ports) > 0 and ports[0] != ports[1]


def test_per_token_loss_cannot_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("calculate_per_token_loss: false\n")
    with pytest.raises(ValueError, match="the loss weights need Megatron's --calculate-per-token-loss"):
        parsed(monkeypatch, *TINY, *NEEDED, "--recipe", str(recipe))


def test_deterministic_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron sets torch and the libraries' variables itself; what cannot be deterministic is refused."""
    names = ("NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "CUBLAS_WORKSPACE_CONFIG")
    for name in names:  # set once, so that what Megatron sets is taken back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    try:
        args = parsed(monkeypatch, *TINY, *NEEDED, "--deterministic-mode")
        assert torch.are_deterministic_algorithms_enabled()
        assert [os.environ[name] for name in names] == ["Ring", "0", ":4096:8"]
        assert core_transformer_config_from_args(args).deterministic_mode
        with pytest.raises(ValueError, match="deterministic-mode requires: cross_entropy_loss_fusion=False"):
            parsed(monkeypatch, *TINY, *NEEDED, "--deterministic-mode", "--cross-entropy-loss-fusion")
    finally:
        torch.use_deterministic_algorithms(False)


def test_static_boundary_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parsed(monkeypatch, *TINY, *NEEDED, *STATIC, *FEW, "128")
    assert (args.boundary, args.max_tiles_per_pack, args.shallow_seq_length) == ("static", 13, 128)
    assert plan_settings(args).supervised_budget == 128


def test_flags_stay() -> None:
    """Users' scripts and recipes hold these: do not rename or remove one without a word in the changelog."""
    parser = argparse.ArgumentParser(add_help=False)
    for settings in SETTINGS:
        ArgumentGroupFactory(settings).build_group(parser, title=settings.__name__)
    flags = {option for action in parser._actions for option in action.option_strings}
    lost = set(FLAGS.split()) - flags
    assert not lost


def test_paths_that_are_looked_at_early_mean_the_same_to_this_parser() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    arguments.add_our_arguments(add_megatron_arguments(parser))
    for flag in (*paths.PATH_FLAGS, "--save"):
        action = parser._option_string_actions[flag]
        assert (action.nargs, action.type in (None, str), action.option_strings) == (None, True, [flag])
        assert action.dest == flag[2:].replace("-", "_")


FLAGS = """
--auto-resume --boundary --conversation-template --data --dry-run --dry-run-world-size --epochs --expand-layer
--freeze-llm --freeze-projectors --freeze-vision --gpu-memory-gib --high-ratio --image-size
--inject-layers --loader-workers --loss-weighting --low-ratio --max-rejects --max-supervised-tokens-per-pack --max-tiles
--max-tiles-per-pack --max-tries --min-tiles --model-preset --no-thumbnail --patch-size
--pixel-shuffle-version --predictions-file --projector --projector-drop-path --rejects-file
--released-quirks --report-file --rvtc --select-layer --shallow-seq-length
--static-image-size --upsample --valid-data --vision-attention --vision-drop-path --vision-overrides --vision-preset
--vision-recompute
"""
