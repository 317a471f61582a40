"""What a user gets wrong, or a disk: one clear message, exit code 2, and nothing half-written."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_internvlx.checkpoint import importer, target, torch_dist_write
from megatron_internvlx.commands.convert import main
from tests.converting import FAMILIES, differences, make_directory, read_all

NATIVE = "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("hf") / "hf", FAMILIES["native"], shards=3)


@pytest.fixture
def hf(pristine: Path, tmp_path: Path) -> Path:
    """A directory to break."""
    return Path(shutil.copytree(pristine, tmp_path / "hf"))


def rename_or_drop(hf: Path, name: str, change: Any) -> None:
    """Replace a tensor by what `change` makes of it: {} drops it."""
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    file = index["weight_map"].pop(name)
    tensors = load_file(hf / file)
    new = change(tensors.pop(name))
    save_file(tensors | new, hf / file)
    index["weight_map"] |= dict.fromkeys(new, file)
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))


def refused(capsys: pytest.CaptureFixture, tmp_path: Path, *arguments: str) -> str:
    """Run an import that must fail; returns its message."""
    assert (
        main(["import", "--hf", str(tmp_path / "hf"), "--save", str(tmp_path / "ck"), "--quiet", *arguments])
        == 2
    )
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("ck")]
    return capsys.readouterr().err


def test_wrong_architecture(hf: Path, tmp_path: Path, capsys) -> None:
    config = json.loads((hf / "config.json").read_text()) | {"model_type": "qwen2_vl", "architectures": ["Q"]}
    (hf / "config.json").write_text(json.dumps(config))
    message = refused(capsys, tmp_path)
    assert "'qwen2_vl' (architectures Q)" in message
    assert "internvl_chat, internvlx or internvl" in message


def test_missing_shard(hf: Path, tmp_path: Path, capsys) -> None:
    (hf / "model-00002-of-00003.safetensors").unlink()
    assert "1 of 3 weight files are missing: model-00002-of-00003.safetensors" in refused(capsys, tmp_path)


def test_shape_mismatch_names_both(hf: Path, tmp_path: Path, capsys) -> None:
    rename_or_drop(hf, NATIVE, lambda t: {NATIVE: t[:-1].contiguous()})
    assert f"{NATIVE} is [95, 64], expected [96, 64]" in refused(capsys, tmp_path)


def test_unknown_keys_are_listed(hf: Path, tmp_path: Path, capsys) -> None:
    rename_or_drop(hf, NATIVE, lambda t: {NATIVE: t, "lora.A": t.clone(), "lora.B": t.clone()})
    message = refused(capsys, tmp_path)
    assert "2 tensors are not in this model" in message
    assert "lora.A\n  lora.B" in message


def test_missing_tensors_are_listed(hf: Path, tmp_path: Path, capsys) -> None:
    rename_or_drop(hf, NATIVE, lambda t: {})
    message = refused(capsys, tmp_path)
    assert "1 tensors are missing" in message
    assert NATIVE in message


@pytest.mark.parametrize("bytes_left", [0, 6, 3000, -1])
def test_truncated_safetensors(hf: Path, tmp_path: Path, capsys, bytes_left: int) -> None:
    path = hf / "model-00003-of-00003.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:bytes_left])
    message = refused(capsys, tmp_path)
    assert f"{path}: not a complete safetensors file" in message


def test_existing_target(hf: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "ck").mkdir()
    assert main(["import", "--hf", str(hf), "--save", str(tmp_path / "ck")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert not list((tmp_path / "ck").iterdir())


def test_too_little_disk(hf: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(target.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    assert "0.01 GB are free" in refused(capsys, tmp_path)


def test_disk_full_on_the_way(hf: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch_dist_write, "save_tensor", full)
    assert "the disk is full" in refused(capsys, tmp_path)


def test_no_config(hf: Path, tmp_path: Path, capsys) -> None:
    (hf / "config.json").unlink()
    assert "config.json: No such file" in refused(capsys, tmp_path)


def test_pickle_needs_permission(hf: Path, tmp_path: Path, capsys) -> None:
    tensors = read_all(hf)
    for path in hf.glob("model*"):
        path.unlink()
    torch.save(tensors, hf / "pytorch_model.bin")
    assert "--allow-pickle" in refused(capsys, tmp_path)
    ok = ["import", "--hf", str(hf), "--save", str(tmp_path / "ck"), "--quiet", "--allow-pickle"]
    assert main(ok) == 0
    assert main(["export", "--load", str(tmp_path / "ck"), "--hf", str(tmp_path / "out"), "--quiet"]) == 0
    found = read_all(tmp_path / "out")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_projectors_are_initialised_only_when_asked_for(hf: Path, tmp_path: Path, capsys) -> None:
    """From InternVL to InternVL-X with LVTC: the new parts are listed, equal for equal seeds."""
    wanted = ["--projector", "pvtc", "--expand-layer", "1", "--low-ratio", "0.25"]
    message = refused(capsys, tmp_path, *wanted)
    assert "--init-missing would initialise" in message
    assert "lvtc_projectors.1.cls_scale" in message
    for name in ("ck", "ck2"):
        command = ["import", "--hf", str(hf), "--save", str(tmp_path / name), "--quiet", "--init-missing"]
        assert main([*command, *wanted, "--list-tensors"]) == 0
    listed = capsys.readouterr().out
    assert "language_model.decoder.layers.1.injection.projector.cls_scale" in listed
    assert "model.multi_modal_projector.linear_1.weight" in listed
    from megatron_internvlx.checkpoint.torch_dist import CheckpointReader, checkpoint_folder

    first, second = (CheckpointReader(checkpoint_folder(tmp_path / name)) for name in ("ck", "ck2"))
    for name in (
        "projector.query_proj.linear.weight",
        "projector.cls_scale",
        "projector.kv_proj.norm.weight",
    ):
        assert torch.equal(first.read(name), second.read(name))
    weight = first.read("projector.query_proj.linear.weight")
    assert weight.abs().max() <= weight.shape[1] ** -0.5
    assert 0.8 < first.read("projector.cls_scale").std() < 1.2
    assert main(["export", "--load", str(tmp_path / "ck"), "--hf", str(tmp_path / "o"), "--quiet"]) == 2
    assert "its tokenizer has no token <IMG_CONTEXT>" in capsys.readouterr().err


def test_killed_conversions_continue(hf: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(importer, "UNIT_BYTES", 1 << 16)
    done: list[int] = []
    original = importer.write_unit

    def interrupted(unit: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(unit.number)
        return original(unit)

    monkeypatch.setattr(importer, "write_unit", interrupted)
    command = ["import", "--hf", str(hf), "--save", str(tmp_path / "ck"), "--quiet"]
    assert main(command) == 130
    assert not (tmp_path / "ck").exists()
    again: list[int] = []

    def counted(unit: Any) -> Any:
        again.append(unit.number)
        return original(unit)

    monkeypatch.setattr(importer, "write_unit", counted)
    assert main(command) == 0
    assert not set(done) & set(again)
    assert main(["export", "--load", str(tmp_path / "ck"), "--hf", str(tmp_path / "out"), "--quiet"]) == 0
    assert differences(hf, tmp_path / "out") == []
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


@pytest.mark.parametrize("broken", ["nothing", "tracker", "metadata", "data", "short data"])
def test_broken_checkpoints(hf: Path, tmp_path: Path, capsys, broken: str) -> None:
    ck = tmp_path / "ck"
    if broken == "nothing":
        ck.mkdir()
    else:
        assert main(["import", "--hf", str(hf), "--save", str(ck), "--quiet"]) == 0
    data = ck / "release" / "__0_0.distcp"
    if broken == "tracker":
        (ck / "latest_checkpointed_iteration.txt").write_text("soon")
    elif broken == "metadata":
        (ck / "release" / ".metadata").write_bytes(b"x")
    elif broken == "data":
        data.unlink()
    elif broken == "short data":
        data.write_bytes(data.read_bytes()[:5000])
    assert main(["export", "--load", str(ck), "--hf", str(tmp_path / "out"), "--quiet"]) == 2
    message = capsys.readouterr().err
    wanted = {"nothing": "no checkpoint", "tracker": "'soon'", "metadata": "unreadable", "data": "data files"}
    assert wanted.get(broken, "ends after 5000 bytes") in message
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith("out")]


def test_shards_and_types_can_be_chosen(hf: Path, tmp_path: Path) -> None:
    assert main(["import", "--hf", str(hf), "--save", str(tmp_path / "ck"), "--quiet"]) == 0
    command = ["export", "--load", str(tmp_path / "ck"), "--hf", str(tmp_path / "out"), "--quiet"]
    assert main([*command, "--dtype", "bfloat16", "--max-shard-size", "200KB"]) == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    original, found = read_all(hf), read_all(tmp_path / "out")
    assert all(torch.equal(found[name], original[name].bfloat16()) for name in original)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
