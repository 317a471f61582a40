"""Converted models in Megatron against the released code (golden cases) and against transformers.

Measured worst differences, golden: logits 5.0e-6 (values up to 5.2), gradients 2.7e-7; against the exported
remote code see `parity/test_remote_code.py`. 1e-4 is what the user is promised.
"""

import os
import re
import signal
import time
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_internvlx.checkpoint import verify as verify_module
from megatron_internvlx.checkpoint.case import compare, load_case
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.importer import import_checkpoint
from megatron_internvlx.checkpoint.request import Layout, Request
from megatron_internvlx.checkpoint.verify import Results, verify
from megatron_internvlx.commands.convert import main
from tests.converting import internvl, make_directory
from tests.distributed import Pool
from tests.golden_weights import GOLDEN

MODELS = GOLDEN / "models"
TOLERANCE = 1e-4


def rank_job(request: Request) -> None:
    from megatron_internvlx.checkpoint.verify_rank import run_rank

    run_rank(request)


def run(pool: Pool, request: Request, out: Path) -> dict:
    """Tensors of `verify`, on the pool's ranks instead of new processes."""
    return results(pool, request, out).tensors


def results(pool: Pool, request: Request, out: Path) -> Results:
    return verify(request, out, start=lambda changed, ranks: pool.run(ranks, partial(rank_job, changed)))


def request_for(model: str, case: str, layout: Layout, *, gradients: bool = False) -> Request:
    folder = MODELS / model
    return Request("", str(folder / f"{case}.inputs.safetensors"), layout, gradients, None, hf=str(folder))


LAYOUTS = {
    "one": Layout(),
    "tp2_pp2": Layout(tensor=2, pipeline=2),
    "pp4": Layout(pipeline=4),
    "pp2_vpp2": Layout(pipeline=2, virtual=2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_internlm2_and_every_gradient(pool: Pool, tmp_path: Path, layout: str) -> None:
    request = request_for("internlm2_tiny", "case_train", LAYOUTS[layout], gradients=True)
    found = run(pool, request, tmp_path / "out.safetensors")
    case = load_case(Path(request.inputs))
    differences = {d.name: d.worst for d in compare(case, found)}
    gradients = load_file(MODELS / "internlm2_tiny" / "case_train.grads.safetensors")
    assert set(gradients) <= set(differences)
    assert {"logits", "loss", "vit_last_hidden_state", "projector_output"} <= set(differences)
    assert max(differences.values()) < TOLERANCE
    assert found["projector_output"].shape == case.expected["projector_output"].shape


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tensor=2, pipeline=2, stages="Et|ttL"), Layout(pipeline=4, stages="Et|t|t|L")],
    ids=["one", "tp2_pp2", "pp4"],
)
def test_qwen2(pool: Pool, tmp_path: Path, layout: Layout) -> None:
    request = request_for("qwen2_tiny", "case_single", layout)
    found = run(pool, request, tmp_path / "out.safetensors")
    differences = compare(load_case(Path(request.inputs)), found)
    assert len(differences) == 4
    assert max(d.worst for d in differences) < TOLERANCE


def test_text_only_from_a_checkpoint(pool: Pool, tmp_path: Path) -> None:
    """Vision gradients are zeros, not absent; the weights come from an import."""
    import_checkpoint(MODELS / "internlm2_tiny", tmp_path / "ck", quiet=True)
    inputs = MODELS / "internlm2_tiny" / "case_text_only.inputs.safetensors"
    layout = Layout(tensor=2, extra=("--sequence-parallel",))
    request = Request("", str(inputs), layout, True, None, load=str(tmp_path / "ck"))
    found = run(pool, request, tmp_path / "out.safetensors")
    differences = compare(load_case(inputs), found)
    assert max(d.worst for d in differences) < TOLERANCE
    assert not found["vision_model.encoder.layers.0.attn.qkv.weight"].any()


def test_layers_above_the_selected_state_and_uneven_stages(pool: Pool, tmp_path: Path) -> None:
    """A select_layer of -2, as released models have; three decoder layers on two stages, on four virtual ones."""
    config = internvl("Qwen2ForCausalLM", "qwen2", num_hidden_layers=3, vision={"num_hidden_layers": 3})
    hf = make_directory(tmp_path / "hf", config | {"select_layer": -2})
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 600, (1, 12), generator=generator)
    ids[0, 3:7] = 705
    inputs = tmp_path / "case.safetensors"
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    save_file({"input_ids": ids, "labels": ids.clone(), "pixel_values": pixels}, inputs)
    found = {}
    for name, layout in {
        "one": Layout(), "pp2": Layout(pipeline=2), "vpp2": Layout(pipeline=2, virtual=2)
    }.items():  # fmt: skip
        request = Request("", str(inputs), layout, True, 705, hf=str(hf))
        found[name] = results(pool, request, tmp_path / f"{name}.safetensors")
        assert ("split by work into" in pool.outputs[0]) is (name != "one")
    one = found["one"]
    weights = set(load_file(hf / "model.safetensors"))
    assert set(one.no_gradient) == {n for n in weights if n.startswith("vision_model.encoder.layers.2.")}
    outputs = {"logits", "loss", "vit_last_hidden_state", "projector_output"}
    assert set(one.tensors) == weights - set(one.no_gradient) | outputs
    assert one.tensors["vision_model.encoder.layers.1.attn.qkv.weight"].any()
    for other in (found["pp2"], found["vpp2"]):
        assert other.no_gradient == one.no_gradient
        assert other.tensors.keys() == one.tensors.keys()
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(other.tensors[name], tensor, rtol=1e-4, atol=1e-5)


def test_no_gradient_is_a_gradient_of_zeros() -> None:
    """What is expected of a layer that does not run: nothing, or zeros; anything else is a difference."""
    case = load_case(MODELS / "qwen2_tiny" / "case_single.inputs.safetensors")
    case = replace(case, expected={"a": torch.zeros(2), "b": torch.tensor([0.0, 0.5]), "c": torch.ones(1)})
    found = {d.name: d.worst for d in compare(case, {}, ("a", "b", "d"))}
    assert found == {"a": 0.0, "b": 0.5}


def keys_for_values(folder: Path) -> Path:
    """A directory with keys and values of one layer swapped: all shapes fit."""
    source = MODELS / "qwen2_tiny"
    weights = load_file(source / "model.safetensors")
    layer = "language_model.model.layers.1.self_attn."
    for kind in ("weight", "bias"):
        k, v = f"{layer}k_proj.{kind}", f"{layer}v_proj.{kind}"
        weights[k], weights[v] = weights[v], weights[k]
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def test_a_wrong_conversion_is_seen(pool: Pool, tmp_path: Path) -> None:
    inputs = MODELS / "qwen2_tiny" / "case_single.inputs.safetensors"
    wrong = keys_for_values(tmp_path / "hf")
    request = Request("", str(inputs), Layout(), False, None, hf=str(wrong))
    found = run(pool, request, tmp_path / "out.safetensors")
    worst = {d.name: d.worst for d in compare(load_case(inputs), found)}
    assert worst["logits"] > 100 * TOLERANCE
    assert worst["projector_output"] < TOLERANCE


# ------------------------------------------------------------------------------------- the command


def test_command_on_two_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In processes of its own, with a table for people and the tensors in a file."""
    source, out = MODELS / "internlm2_tiny", tmp_path / "out.safetensors"
    inputs = source / "case_train.inputs.safetensors"
    token = load_case(inputs).image_token(4, None)
    command = ["verify", "--hf", str(source), "--inputs", str(inputs), "--out", str(out), "--grads"]
    assert main([*command, "--pipeline-model-parallel-size", "2", "--image-token-id", str(token)]) == 0
    said = capsys.readouterr().out
    for name in ("logits", "loss", "vit_last_hidden_state", "projector_output"):
        assert re.search(rf"^{name} +\d\.\d\de[+-]\d\d +\d", said, re.M), said
    (count,) = re.findall(r"^all (\d+) expected tensors agree within 0.0001$", said, re.M)
    assert int(count) == 4 + len(load_file(source / "case_train.grads.safetensors"))
    assert f"{out}: {len(load_file(out))} tensors" in said


def test_command_on_a_wrong_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = MODELS / "qwen2_tiny" / "case_single.inputs.safetensors"
    command = ["verify", "--hf", str(keys_for_values(tmp_path / "hf")), "--inputs", str(inputs)]
    assert main([*command, "--out", str(tmp_path / "a.safetensors")]) == 1
    assert "2 of 4 tensors differ by more than 0.0001" in capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / "b.safetensors"), "--tolerance", "100"]) == 0
    assert "all 4 expected tensors agree within 100" in capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / "c.safetensors"), "--image-token-id", "3"]) == 2
    assert "image placeholders (id 3)" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["case_mismatch_fewer_ctx", "case_mismatch_more_ctx"])
def test_placeholders_that_do_not_fit_the_tiles(tmp_path: Path, case: str) -> None:
    request = request_for("internlm2_tiny", case, Layout())
    with pytest.raises(ConversionError, match="tiles of 4 tokens"):
        verify(request, tmp_path / "out.safetensors", start=lambda *_: pytest.fail("ranks were started"))
    assert not list(tmp_path.iterdir())


def test_ranks_that_do_not_fit_the_layout(tmp_path: Path) -> None:
    request = request_for("internlm2_tiny", "case_train", Layout(tensor=2, pipeline=2))
    with pytest.raises(ConversionError, match="--nproc 2 for TP 2 x PP 2"):
        verify(request, tmp_path / "out.safetensors", ranks=2)


def test_a_rank_that_fails_says_why(tmp_path: Path) -> None:
    """In real processes: the layout has two of the four layers."""
    request = request_for("internlm2_tiny", "case_train", Layout(pipeline=2, stages="Et|tL"))
    with pytest.raises(ConversionError, match="layers"):
        verify(request, tmp_path / "out.safetensors")


def test_a_killed_rank_is_told(monkeypatch) -> None:
    """Nothing is waited for that cannot come."""
    monkeypatch.setattr(verify_module, "_rank_process", _killed_rank)
    with pytest.raises(ConversionError, match="rank 1 was killed, perhaps because memory was full"):
        verify_module.start_ranks(request_for("qwen2_tiny", "case_single", Layout()), 2)


def _killed_rank(request: Request, rank: int, ranks: int, port: int, report: Connection) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"pixel_values": t["pixel_values"][..., :28]}, r"pixel_values are \[5, 3, 56, 28\].*3, 56, 56"),
        (lambda t: {"input_ids": t["input_ids"] + 10**6}, "input_ids range from .* the vocabulary has 711 tokens"),
        (lambda t: {"labels": t["labels"].clamp(min=900)}, "labels range from 900 .* the vocabulary has 711"),
        (lambda t: {"input_ids": t["input_ids"].float()}, "input_ids must contain whole numbers"),
        (lambda t: {"input_ids": t["input_ids"][:, :0].new_ones(1, 4000)}, "do not match"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_the_model(tmp_path: Path, change, message: str) -> None:
    """Said at once, instead of by a rank in the middle."""
    held = load_file(MODELS / "internlm2_tiny" / "case_train.inputs.safetensors")
    changed = {name: tensor.contiguous() for name, tensor in (held | change(held)).items()}
    save_file(changed, tmp_path / "case.safetensors")
    request = Request(
        "", str(tmp_path / "case.safetensors"), Layout(), False, None, hf=str(MODELS / "internlm2_tiny")
    )
    with pytest.raises(ConversionError, match=message):
        verify(request, tmp_path / "out.safetensors", start=lambda *_: pytest.fail("ranks were started"))
    assert [path.name for path in tmp_path.iterdir()] == ["case.safetensors"]


@pytest.mark.parametrize("shape", [(0, 4), (1, 0)])
def test_inputs_without_rows_or_tokens(tmp_path: Path, shape: tuple[int, int]) -> None:
    save_file({"input_ids": torch.ones(*shape, dtype=torch.int64)}, tmp_path / "case.safetensors")
    with pytest.raises(ConversionError, match=r"must contain input_ids \[rows, tokens\], with at least one"):
        load_case(tmp_path / "case.safetensors")


def test_rows_longer_than_the_model_takes(tmp_path: Path) -> None:
    save_file({"input_ids": torch.ones(1, 2049, dtype=torch.int64)}, tmp_path / "case.safetensors")
    request = Request(
        "", str(tmp_path / "case.safetensors"), Layout(), False, None, hf=str(MODELS / "internlm2_tiny")
    )
    with pytest.raises(ConversionError, match="a row has 2049 tokens, but max_position_embeddings is 2048"):
        verify(request, tmp_path / "out.safetensors", start=lambda *_: pytest.fail("ranks were started"))


def test_expected_logits_of_another_shape_are_a_difference() -> None:
    case = load_case(MODELS / "qwen2_tiny" / "case_single.inputs.safetensors")
    (found,) = compare(case, {"logits": torch.zeros(1, 3, 5)})
    assert found.worst == float("inf")
