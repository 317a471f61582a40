"""Adapters in a model on one rank: what they compute, what they leave alone, and what is trained and saved."""

from tests.whole_model import micro_batch, plan_for, whole_model  # isort: skip  (sets Megatron up)
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name
from torch import Tensor

from megatron_internvlx.checkpoint.ops import GateUp, Op, Same, SplitQKV
from megatron_internvlx.data.plan import IGNORE
from megatron_internvlx.lora_settings import TARGETS, LoraSettings
from megatron_internvlx.model import lora
from megatron_internvlx.model.builder import freeze
from megatron_internvlx.model.internvit_config import InternViTConfig
from megatron_internvlx.model.internvlx import InternVLX
from megatron_internvlx.model.lora import Adapter, add_adapters, base_checkpoint, trained_names
from megatron_internvlx.parallel.batch import MicroBatch

RANK = 3
VISION = InternViTConfig(
    hidden_size=16, num_layers=2, num_heads=2, ffn_hidden_size=24, patch_size=4, image_size=32, select_layer=1
)
EVERYWHERE = LoraSettings(lora_rank=RANK, lora_alpha=5, lora_targets=list(TARGETS))
NATURAL = LoraSettings(lora_rank=RANK)
LAYER = "language_model.decoder.layers.0."


def build(**decoder: Any) -> InternVLX:
    """A model of two decoder layers, an injection at the second, and a vision layer that does not run."""
    return whole_model(
        VISION,
        vocab_size=61,
        rotary_base=1000,
        compression={"injection_layers": (1,), "low_grid": 2},
        num_query_groups=2,
        ffn_hidden_size=40,
        hetereogenous_dist_checkpoint=True,  # as in training
        **decoder,
    ).train()


def batch(model: InternVLX) -> MicroBatch:
    """A sample of two tiles and six tokens of text, two of which have a loss."""
    ids = np.concatenate([np.zeros(32, int), np.arange(1, 7)])
    labels = np.where(np.arange(38) >= 36, ids, IGNORE)
    tiles = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return micro_batch(plan_for(model, [ids], [labels], [np.arange(38) < 32]), tiles)


@pytest.fixture(scope="module")
def adapted() -> Iterator[InternVLX]:
    """A model with adapters everywhere, whose second matrices are random."""
    model = build()
    add_adapters(model, EVERYWHERE)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_(generator=generator)
    yield model


def layers(model: InternVLX) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "adapter")}


def test_every_named_layer_has_one(adapted: InternVLX) -> None:
    """Two in attention, two in an MLP, all of a projector's, and none in norms, embeddings or the output layer."""
    names = list(layers(adapted))
    ends = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    blocks = [f"language_model.decoder.layers.{i}." for i in range(2)]
    blocks += [f"vision_model.encoder.layers.{i}." for i in range(2)]
    wanted = {block + end for block in blocks for end in ends}
    projectors = ("projector.", "language_model.decoder.layers.1.injection.projector.")
    linear = [f"{part}_proj.linear" for part in ("query", "cls", "kv")]
    for branch in ("attn_local.", "attn_global."):
        linear += [f"{branch}linear_{x}" for x in ("q", "k", "v", "proj", "gate", "up", "down")]
    wanted |= {place + end for place in projectors for end in linear}
    assert set(names) == wanted and len(names) == len(wanted)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_its_own_layers(target: str) -> None:
    model = build()
    add_adapters(model, replace(EVERYWHERE, lora_targets=[target]))
    names = list(layers(model))
    marks = {
        "decoder_attention": ("language_model.", ".self_attention."),
        "decoder_mlp": ("language_model.", ".mlp."),
        "vision": ("vision_model.", ".layers."),
        "projectors": ("", "projector."),
    }
    start, inside = marks[target]
    assert names and all(name.startswith(start) and inside in name for name in names)


def delta(adapter: Adapter, op: Op) -> Tensor:
    """What is added to the weight, from the Hugging Face projections' own products."""
    with torch.no_grad():
        parts = op.to_theirs(adapter.lora_b)
        products = [b @ a for a, b in zip(adapter.lora_a, parts, strict=True)]
        return 5 / RANK * op.to_ours(products)


@pytest.mark.parametrize(
    ("name", "op"),
    [
        (f"{LAYER}self_attention.linear_qkv", SplitQKV(4, 2)),
        (f"{LAYER}self_attention.linear_proj", Same()),
        (f"{LAYER}mlp.linear_fc1", GateUp()),
        (f"{LAYER}mlp.linear_fc2", Same()),
        ("vision_model.encoder.layers.0.self_attention.linear_qkv", SplitQKV(2, 2)),
        ("vision_model.encoder.layers.0.mlp.linear_fc1", Same()),
        ("projector.attn_local.linear_gate", Same()),
    ],
)
def test_output_is_that_of_a_merged_weight(adapted: InternVLX, name: str, op: Op) -> None:
    """Each projection has its own first matrix, and rows in the order of the weight's conversion."""
    linear: Any = adapted.get_submodule(name)
    x = torch.randn(5, linear.weight.shape[1], generator=torch.Generator().manual_seed(4))
    out, bias = linear(x)
    with torch.no_grad():
        merged = linear.weight + delta(linear.adapter, op)
        wanted = x @ merged.t()
    if bias is None and linear.bias is not None:
        wanted = wanted + linear.bias
    assert linear.adapter.lora_a.shape == (len(op.to_theirs(linear.weight)), RANK, linear.weight.shape[1])
    # Measured: 1e-6 of the largest output. Swapped rows of keys and values exceed 0.1.
    assert (out - wanted).abs().max() <= 5e-6 * wanted.abs().max()


def test_nothing_changes_at_first() -> None:
    """Loss, logits and the gradients of what is trained whole, bit for bit."""
    model = build()
    data = batch(model)
    frozen = frozenset({"vision", "llm"})
    freeze(model, frozen)
    found = []
    for step in range(2):
        if step:
            add_adapters(model, EVERYWHERE)
        loss = model(data)
        loss.sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and lora.MARK not in n}
        with torch.no_grad():
            found.append((loss.detach(), model(data, return_logits=True), grads))
        model.zero_grad()
    (loss, logits, grads), (then_loss, then_logits, then_grads) = found
    assert torch.equal(loss, then_loss) and torch.equal(logits, then_logits)
    assert grads and grads.keys() == then_grads.keys()
    assert all(torch.equal(grads[name], then_grads[name]) for name in grads)


def test_parts_with_adapters_are_frozen() -> None:
    model = build()
    add_adapters(model, NATURAL)
    freeze(model, frozenset({"vision", "llm"}))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kinds = {lora.MARK in name or name.startswith("projector.") or ".injection." in name for name in trained}
    assert kinds == {True}
    assert {name for name, _ in model.named_parameters() if lora.MARK in name} <= trained
    model(batch(model)).sum().backward()
    zero = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not zero


def test_layers_that_do_not_run_are_not_trained_and_still_saved(adapted: InternVLX) -> None:
    """The vision encoder's layers are one tensor in a checkpoint: one that lacks a layer cannot be saved."""
    unused = "vision_model.encoder.layers.1.mlp.linear_fc2.adapter.lora_a"
    assert not adapted.get_parameter(unused).requires_grad
    assert adapted.get_parameter(unused.replace("layers.1", "layers.0")).requires_grad
    assert unused in trained_names(adapted)


def test_a_checkpoint_has_what_is_trained_and_the_base_the_rest() -> None:
    model = build()
    plain = set(model.sharded_state_dict())
    add_adapters(model, NATURAL)
    freeze(model, frozenset({"vision", "llm"}))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(model.sharded_state_dict()) == trained
    with base_checkpoint([model]):
        assert set(model.sharded_state_dict()) == plain
    assert set(model.sharded_state_dict()) == trained


def test_keys_follow_the_full_names(adapted: InternVLX) -> None:
    """Vision layers are stacked as their weights are."""
    found = {}
    for name, entry in adapted.sharded_state_dict().items():
        built = entry.build() if hasattr(entry, "build") else entry
        found |= {part.key: name for part in (built if isinstance(built, list) else [built])}
    assert found[f"{LAYER}mlp.linear_fc1.adapter.lora_b"] == f"{LAYER}mlp.linear_fc1.adapter.lora_b"
    stacked = "vision_model.encoder.layers.mlp.linear_fc1.adapter.lora_b"
    assert stacked in found and adapted.sharded_state_dict()[found[stacked]].global_shape == (2, 24, RANK)


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputed_layers_train_their_adapters_below_nothing_trained(granularity: str) -> None:
    """The first layer's rows need no gradient: recomputation would end there without those of the adapters."""
    method = {"recompute_method": "uniform", "recompute_num_layers": 1} if granularity == "full" else {}
    modules = {} if granularity == "full" else {"recompute_modules": ["mlp"]}
    grads = []
    for settings in ({}, {"recompute_granularity": granularity, **method, **modules}):
        model = build(**settings)
        add_adapters(model, replace(NATURAL, lora_targets=["decoder_mlp"]))
        freeze(model, frozenset({"vision", "llm", "projectors"}))
        model(batch(model)).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, again = grads
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)
    assert plain[f"{LAYER}mlp.linear_fc1.adapter.lora_b"].abs().max() > 0


def test_dropout_is_of_the_input_and_in_training_only(adapted: InternVLX) -> None:
    linear: Any = adapted.get_submodule(f"{LAYER}mlp.linear_fc2")
    adapter = Adapter(linear, replace(EVERYWHERE, lora_dropout=0.5), None).train()
    adapter.load_state_dict(linear.adapter.state_dict())
    x = torch.randn(400, 40)
    torch.manual_seed(3)
    dropped = adapter(x)
    torch.manual_seed(3)
    assert torch.equal(dropped, linear.adapter(torch.nn.functional.dropout(x, 0.5)))
    assert not torch.equal(dropped, adapter(x))
    assert torch.equal(adapter.eval()(x), linear.adapter(x))


def test_dropout_draws_for_what_a_rank_holds(adapted: InternVLX) -> None:
    """Rows that all tensor-parallel ranks hold must lose the same inputs on each of them; columns of one, its own."""
    alike, own = get_data_parallel_rng_tracker_name(), "model-parallel-rng"
    assert {alike, own} <= get_cuda_rng_tracker().get_states().keys()
    for name, linear in layers(adapted).items():
        row = name.endswith(("linear_proj", "linear_fc2", "linear_down"))
        wanted = own if name.startswith("vision_model.") or row else alike
        assert linear.adapter.generator == wanted, name
        if "decoder" in name and "projector" not in name:
            with mock.patch.object(linear, "sequence_parallel", True):
                assert lora._dropout_generator(name, linear) is None


def test_the_first_matrix_is_drawn_alike_in_every_layout(adapted: InternVLX) -> None:
    """As torch.nn.Linear draws it, from the seed and the layer's full name."""
    names = ("self_attention.linear_proj", "mlp.linear_fc2")
    matrices = [adapted.get_submodule(LAYER + name).adapter.lora_a for name in names]
    for matrix in matrices:
        bound = matrix.shape[-1] ** -0.5
        assert 0.8 * bound < matrix.abs().max() <= bound
    again, other, shifted = build(), build(), build()
    shifted.layers = SimpleNamespace(first=1)  # of a later pipeline stage
    add_adapters(again, NATURAL)
    add_adapters(other, NATURAL, seed=2)
    add_adapters(shifted, NATURAL)
    place, above = f"{LAYER}mlp.linear_fc2", "language_model.decoder.layers.1.mlp.linear_fc2"
    mine = matrices[1]
    assert torch.equal(again.get_submodule(place).adapter.lora_a, mine)
    assert not torch.equal(other.get_submodule(place).adapter.lora_a, mine)
    assert torch.equal(shifted.get_submodule(place).adapter.lora_a, again.get_submodule(above).adapter.lora_a)


def test_shards_are_cut_from_the_whole(adapted: InternVLX) -> None:
    linear: Any = adapted.get_submodule(f"{LAYER}mlp.linear_fc2")
    whole = Adapter(linear, NATURAL, None)
    whole.reset_parameters(5)
    parts = []
    for rank in range(2):
        part = Adapter(linear, NATURAL, None)
        part.lora_a = torch.nn.Parameter(torch.empty(1, RANK, 20))
        part.group = SimpleNamespace(size=lambda: 2, rank=lambda rank=rank: rank)
        part.reset_parameters(5)
        parts.append(part.lora_a)
    assert torch.equal(torch.cat(parts, dim=2), whole.lora_a)


def test_transformer_engines_normed_input_is_the_adapters() -> None:
    """Its fused layer returns it last, with the bias or without."""
    out, normed, bias, raw = torch.ones(2, 3), torch.full((2, 4), 2.0), torch.zeros(3), torch.zeros(2, 4)
    layer = SimpleNamespace(return_layernorm_output=True, adapter=lambda x: x[:, :3])
    for output, kept in (((out, bias, normed), bias), (((out, normed), None), None)):
        found, found_bias = lora._add_output(layer, (raw,), output)
        assert torch.equal(found, torch.full((2, 3), 3.0)) and found_bias is kept


def test_without_a_rank_nothing_is_added() -> None:
    model = build()
    add_adapters(model, LoraSettings())
    assert not layers(model) and "sharded_state_dict" not in vars(model)
