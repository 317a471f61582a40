"""What an export says about a model that was trained: its config.json and its model card."""

import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from megatron_internvlx.checkpoint.export_files import write_files
from megatron_internvlx.checkpoint.export_plan import plan_export
from megatron_internvlx.checkpoint.exporter import export_checkpoint
from megatron_internvlx.checkpoint.hf_config import model_config, read_config
from megatron_internvlx.checkpoint.importer import import_checkpoint
from megatron_internvlx.checkpoint.remote_code import model_card
from megatron_internvlx.checkpoint.sources import read_arguments
from megatron_internvlx.checkpoint.torch_dist import CheckpointReader
from megatron_internvlx.data.prepare import PrepareSettings, prepare
from megatron_internvlx.evaluation.hf_model import load_model
from tests.converting import FAMILIES, TOKENIZER, Named, differences, lvtc_config, make_directory


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ck")
    for name, config in (("chat", FAMILIES["llama"]), ("lvtc", lvtc_config())):
        import_checkpoint(make_directory(root / "hf" / name, config, tokenizer=True), root / name, quiet=True)
    return {name: root / name for name in ("chat", "lvtc")}


def exported_config(checkpoint: Path, out: Path, **trained: Any) -> dict[str, Any]:
    plan = plan_export(checkpoint)
    out.mkdir()
    write_files(replace(plan, arguments=plan.arguments | trained), out)
    return json.loads((out / "config.json").read_text())


def test_settings_of_training_reach_the_original_config(checkpoints, tmp_path: Path) -> None:
    """The model is to be used with the tiles and the template that it was trained with."""
    original = json.loads((checkpoints["chat"] / "hf" / "config.json").read_text())
    assert exported_config(checkpoints["chat"], tmp_path / "same") == original
    trained = {"max_tiles": 3, "rvtc": "edge", "no_thumbnail": True, "conversation_template": "internvl2_5"}
    changed = exported_config(checkpoints["chat"], tmp_path / "trained", **trained)
    expected = {"max_dynamic_patch": 3, "rvtc": "edge", "use_thumbnail": False, "template": "internvl2_5"}
    assert changed == original | expected | {"rvtc_version": 2}
    found = model_config(read_config(tmp_path / "trained"), Named())
    assert {name: found.arguments[name] for name in trained} == trained


def test_tile_rule_of_a_model_from_scratch(checkpoints, tmp_path: Path) -> None:
    """The released config has no word for it; ours is read back, or answers would see other tiles."""
    plan = replace(plan_export(checkpoints["chat"]), notes={}, side=None)
    out = tmp_path / "out"
    out.mkdir()
    write_files(replace(plan, arguments=plan.arguments | {"rvtc": "area"}), out)
    assert model_config(read_config(out), Named()).arguments["rvtc"] == "area"


def test_tile_rule_under_its_name_of_before(checkpoints) -> None:
    """Without a version of the names, `area` meant the rule that is `edge` now."""
    trained = {"expand_layer": None, "rvtc": "area"}
    for common, rule in (
        ({"args": Namespace(**trained)}, "edge"),
        ({"args": Namespace(**trained, rvtc_version=2)}, "area"),
        ({"internvlx": {"arguments": trained, "family": "qwen2"}}, "edge"),
        ({"internvlx": {"arguments": trained, "family": "qwen2", "rvtc_version": 2}}, "area"),
    ):
        assert read_arguments(Mock(common=lambda common=common: common))[0]["rvtc"] == rule
    notes = json.loads((checkpoints["lvtc"] / "hf" / "conversion.json").read_text())
    assert notes["rvtc_version"] == 2
    assert CheckpointReader(checkpoints["lvtc"] / "release").common()["internvlx"]["rvtc_version"] == 2


def test_model_card_says_configuration_data_and_training(checkpoints, tmp_path: Path) -> None:
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"charts": {"length": 7}, "scenes": {"root": ""}}))
    facts = {
        "data": str(meta), "consumed_train_samples": 96, "global_batch_size": 8, "lr": 0.002, "bf16": True,
        "freeze_vision": True,
    }  # fmt: skip
    plan = plan_export(checkpoints["lvtc"])
    card = model_card(replace(plan, arguments=plan.arguments | facts, iteration=12), tmp_path)
    for said in (
        "qwen2, 4 layers, width 64",
        "1 tokens per tile before layer 1, 4 from it on",
        "| Injections at layers | 1, 2 |",
        "meta.json: charts (7 records), scenes",
        "12 steps, 96 samples, global batch 8, learning rate 0.002, bf16, frozen: vision",
    ):
        assert said in card
    assert str(tmp_path) not in card
    meta.write_text("[]")
    assert "| Data | meta.json |" in model_card(
        replace(plan, arguments=plan.arguments | facts, iteration=12), tmp_path
    )
    assert "none after import" in model_card(plan, tmp_path)


def test_model_card_names_the_sets_of_a_prepared_directory(checkpoints, tmp_path: Path) -> None:
    """What the recipes train on, with the records that are left of each set, and its repetitions."""
    turns = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]
    meta = {}
    for name, records, repeat in (("charts", 4, 1), ("scenes", 3, 2.5)):
        lines = [json.dumps({"id": i, "conversations": turns}) for i in range(records)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        meta[name] = {"root": ".", "annotation": f"{name}.jsonl", "length": records, "repeat_time": repeat}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    prepared = tmp_path / "prepared"
    prepare(tmp_path / "meta.json", prepared, PrepareSettings(validation=0.25))
    plan = plan_export(checkpoints["lvtc"])
    for data in (prepared, tmp_path / "meta.json"):
        card = model_card(
            replace(plan, arguments=plan.arguments | {"data": str(data)}, iteration=12), tmp_path
        )
        counts = (3, 2) if data == prepared else (4, 3)
        said = f"charts ({counts[0]} records), scenes ({counts[1]} records, 2.5 times)"
        assert f"| Data | {data.name}: {said} |" in card
    (prepared / "prepared.json").write_text('{"sets": [{"name": "charts"}]}')
    card = model_card(
        replace(plan, arguments=plan.arguments | {"data": str(prepared)}, iteration=12), tmp_path
    )
    assert "| Data | prepared |" in card


@pytest.mark.parametrize("kind", ["llama", "internvlx"])
def test_remote_code_without_lvtc_gives_the_same_logits(tmp_path: Path, kind: str) -> None:
    """Released names, MLP and PVTC with InternLM2, in a format that AutoModel loads; its import and export keep it."""
    import_checkpoint(
        make_directory(tmp_path / "hf", FAMILIES[kind], tokenizer=True), tmp_path / "ck", quiet=True
    )
    for source, out in (("ck", "code"), ("again", "code2")):
        export_checkpoint(tmp_path / source, tmp_path / out, remote_code=source == "ck", quiet=True)
        if source == "ck":
            import_checkpoint(tmp_path / out, tmp_path / "again", quiet=True)
    assert differences(tmp_path / "code", tmp_path / "code2") == []
    released, processor, _ = load_model(tmp_path / "hf", torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "code2", trust_remote_code=True)
    inputs = processor(text="<image>\na", images=[Image.new("RGB", (40, 20), "red")])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, released(**inputs).logits)


def test_a_directory_of_an_earlier_version_still_loads(checkpoints, tmp_path: Path) -> None:
    """Its tokenizer has an end of its own, which generation_config.json lists, and auto_map has one name less."""
    export_checkpoint(checkpoints["lvtc"], tmp_path / "new", quiet=True)
    old = Path(shutil.copytree(tmp_path / "new", tmp_path / "old"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(TOKENIZER / name, old / name)
    config = json.loads((old / "config.json").read_text())
    assert config["auto_map"].pop("AutoModelForMultimodalLM")
    (old / "config.json").write_text(json.dumps(config))
    for kind in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        assert type(kind.from_pretrained(old, trust_remote_code=True)).__name__ == config["architectures"][0]
    models = [load_model(directory, torch.float32)[0] for directory in (tmp_path / "new", old)]
    stops = [model.generation_config.eos_token_id for model in models]
    assert stops[0] == stops[1] == config["eos_token_id"]
    import_checkpoint(old, tmp_path / "again", quiet=True)
    export_checkpoint(tmp_path / "again", tmp_path / "hf", quiet=True)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
