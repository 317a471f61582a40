"""Import, Megatron's own load and save in a layout, export: every family comes back byte for byte.

The directories' names are checked against the golden models and against transformers' classes, the
arithmetic by running the models: `parallel/test_verify.py` and `test_remote_code.py`.
"""

from pathlib import Path

import pytest

from megatron_internvlx.checkpoint.exporter import export_checkpoint
from megatron_internvlx.checkpoint.importer import SIDE, import_checkpoint
from tests.converting import FAMILIES, differences, load_and_save, make_directory
from tests.distributed import Pool

TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
TP4 = ["--tensor-model-parallel-size", "4", "--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
PP4 = ["--pipeline-model-parallel-size", "4"]
VPP2 = ["--num-virtual-stages-per-pipeline-rank", "2"]
EP2 = ["--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"]

# Ranks and arguments. The models have four decoder layers and an odd vocabulary.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "dp2": (2, []),
    "tp2": (2, TP2),
    "tp4": (4, TP4),
    "pp2": (2, PP2),
    "pp4": (4, PP4),
    "tp2_pp2": (4, [*TP2, *PP2]),
    "pp2_vpp2": (2, [*PP2, *VPP2]),
    "tp2_pp2_vpp2": (4, [*TP2, *PP2, *VPP2]),
    "pp2_uneven": (2, [*PP2, "--pipeline-model-parallel-layout", "Et|tttL"]),
    "pp4_lone_ends": (4, [*PP4, "--pipeline-model-parallel-layout", "E|tt|tt|L"]),
    "tp2_pp2_uneven": (4, [*TP2, *PP2, "--pipeline-model-parallel-layout", "Ettt|tL"]),
}
LIGHT = ("one", "dp2", "tp4", "tp2_pp2_vpp2", "pp4_lone_ends")
"""Layouts of `make test`; `make test-heavy` has the others."""
EXPERT_LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "ep2": (2, EP2),
    "tp2_ep2": (2, [*TP2, *EP2]),
    "ep2_pp2": (4, [*EP2, *PP2]),
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/<family> directories and their imports in ck/<family>."""
    root = tmp_path_factory.mktemp("families")
    for number, (name, config) in enumerate(FAMILIES.items()):
        hf = make_directory(
            root / "hf" / name, config, shards=1 + number % 3, tokenizer=config["model_type"] == "internvlx"
        )
        import_checkpoint(hf, root / "ck" / name, quiet=True)
    return root


def problems(root: Path, name: str, checkpoint: Path, out: Path) -> list[str]:
    """Differences between the original directory and the export of a checkpoint."""
    export_checkpoint(checkpoint, out, like=root / "ck" / name / SIDE, quiet=True)
    return differences(root / "hf" / name, out)


def test_without_megatron(imported: Path, tmp_path: Path) -> None:
    for name in FAMILIES:
        assert problems(imported, name, imported / "ck" / name, tmp_path / name) == [], name


@pytest.mark.parametrize(
    "layout", [name if name in LIGHT else pytest.param(name, marks=pytest.mark.heavy) for name in LAYOUTS]
)
def test_through_every_layout(pool: Pool, imported: Path, tmp_path: Path, layout: str) -> None:
    ranks, arguments = LAYOUTS[layout]
    checkpoints = {name: str(imported / "ck" / name) for name in FAMILIES}
    pool.run(ranks, load_and_save, arguments, checkpoints, str(tmp_path / "ck"), timeout=300)
    for name in FAMILIES:
        assert problems(imported, name, tmp_path / "ck" / name, tmp_path / "hf" / name) == [], name


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_experts_through_expert_layouts(pool: Pool, imported: Path, tmp_path: Path, layout: str) -> None:
    ranks, arguments = EXPERT_LAYOUTS[layout]
    name = "qwen3_moe"
    checkpoints = {name: str(imported / "ck" / name)}
    pool.run(ranks, load_and_save, arguments, checkpoints, str(tmp_path / "ck"), timeout=300)
    assert problems(imported, name, tmp_path / "ck" / name, tmp_path / "hf" / name) == []
