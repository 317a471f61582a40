"""Runs of the quality study: one trained model, and from it a short training per combination and seed.

As in the paper, a combination starts from a vision encoder and a decoder that are trained already, and its projectors
are new. The trained ones are the demo's, trained on without any compression: a decoder that has only seen LVTC reads
visual rows in its deep layers, and every run without LVTC would pay for learning to read them earlier.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from safetensors.torch import load_file, save_file

from benchmarks.common import ROOT
from benchmarks.quality_report import EXPANSIONS, RULES, Combination
from megatron_internvlx.model.presets import preset
from megatron_internvlx.reporting.picture import accuracy_by_kind, read_predictions

LAYERS = 4  # of the preset internvlx_demo
COMBINATIONS: list[Combination] = list(itertools.product(("mlp", "pvtc"), EXPANSIONS, RULES))


class Stage(NamedTuple):
    """A training of the model that runs start from."""

    combination: Combination
    steps: int


DEMO: Combination = ("pvtc", "L/2", "edge")
UNCOMPRESSED: Combination = ("mlp", "off", "off")
BASE_SEED = 1234
BASE_RANKS = 2
PROJECTORS = ("projector.", "lvtc_projectors.", "mlp1.")
"""Beginnings of the names of an exported model's projectors; the last is InternVL's, for a model of no compression."""


def demo_recipe() -> dict[str, Any]:
    """Settings of `make demo`."""
    return dict(yaml.safe_load((ROOT / "examples" / "demo" / "demo.yaml").read_text()))


def expand_layer(expansion: str) -> int | None:
    """Value of --expand-layer for a name of `EXPANSIONS`; None: LVTC off."""
    quarters = EXPANSIONS[expansion]
    return None if quarters is None else quarters * LAYERS // 4


def recipe(combination: Combination, seed: int, steps: int) -> dict[str, Any]:
    """The demo's recipe with this combination, on one rank."""
    projector, expansion, rvtc = combination
    return demo_recipe() | {
        "pipeline_model_parallel_size": 1,
        "projector": projector,
        "expand_layer": expand_layer(expansion),
        "rvtc": rvtc,
        "seed": seed,
        "train_iters": steps,
        "eval_interval": 10 * steps,  # only the one at the end
        "save_interval": None,
    }


def digest(*settings: dict[str, Any]) -> str:
    """Names the content of recipes: a run of other recipes is another run."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def train(data: Path, settings: dict[str, Any], *flags: str, ranks: int = 1) -> dict[str, tuple[int, int]]:
    """One run, each rank in a process of one core: right and asked questions of every kind."""
    with tempfile.TemporaryDirectory() as folder:
        path, answers = Path(folder) / "recipe.yaml", Path(folder) / "answers.jsonl"
        path.write_text(yaml.safe_dump(settings))
        run_python(
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            "pretrain_vlm.py", "--recipe", str(path), "--data", str(data / "meta.json"),
            "--valid-data", str(data / "meta_val.json"), "--tokenizer-model", str(data / "tokenizer"),
            "--predictions-file", str(answers), *flags,
        )  # fmt: skip
        return accuracy_by_kind(read_predictions(answers))


def run_python(*arguments: str) -> None:
    """A Python process on one core. Raises RuntimeError with the end of its output if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def base_recipes(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Recipes of the trainings after which vision encoder and decoder are what every run starts from."""
    return [recipe(stage.combination, BASE_SEED, stage.steps) for stage in stages]


def trained_base(data: Path, work: Path, stages: Sequence[Stage]) -> Path:
    """Exported model of these trainings, without projectors. A stage that `work` holds already is not repeated."""
    recipes = base_recipes(stages)
    folder = work / f"base-{digest(*recipes)}"
    hf, done = folder / "hf", folder / "right.json"
    if not done.exists():
        flags = ["--save", str(folder / "checkpoints"), "--save-interval", str(stages[-1].steps)]
        if stages[:-1]:
            before = trained_base(data, work, stages[:-1])
            flags += ["--pretrained-checkpoint", str(start_of(before, stages[-1].combination, BASE_SEED))]
        right = train(data, recipes[-1], *flags, ranks=BASE_RANKS)
        export = ("tools/convert_checkpoint.py", "export", "--load", str(folder / "checkpoints"), "--quiet")
        run_python(*export, "--hf", str(hf))
        without_projectors(hf)
        done.write_text(json.dumps(right))
    return hf


def without_projectors(hf: Path) -> None:
    """Take projectors and LVTC out of an exported model; an import puts others in."""
    weights, config = hf / "model.safetensors", hf / "config.json"
    tensors = load_file(weights)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(PROJECTORS)}
    assert len(kept) < len(tensors), f"{weights} has no projectors"
    save_file(kept, weights, metadata={"format": "pt"})
    settings = json.loads(config.read_text())
    if "compression" in settings:  # not in InternVL's own form
        settings["compression"] |= {"expand_layer": None, "inject_layers": []}
    config.write_text(json.dumps(settings, indent=2))


def ratios() -> tuple[str, ...]:
    """Flags of the preset's side ratios: InternVL's own form has one of them only."""
    model = preset(demo_recipe()["model_preset"])
    names = ("low_ratio", "high_ratio")
    return tuple(
        text for name in names if name in model for text in (f"--{name.replace('_', '-')}", str(model[name]))
    )


def start_of(base: Path, combination: Combination, seed: int) -> Path:
    """Checkpoint of the base with this combination's projectors, initialised by `seed`."""
    projector, expansion, _ = combination
    folder = base.parent / f"{projector}-{expansion.replace('/', '_')}-{seed}"
    if not (folder / "latest_checkpointed_iteration.txt").exists():
        layer = expand_layer(expansion)
        lvtc = () if layer is None else ("--expand-layer", str(layer))
        run_python(
            "tools/convert_checkpoint.py", "import", "--hf", str(base), "--save", str(folder), "--projector",
            projector, *ratios(), *lvtc, "--init-missing", "--seed", str(seed), "--quiet",
        )  # fmt: skip
    return folder
