"""Names in a distributed checkpoint: local modules and Transformer Engine's agree, also with experts.

Transformer Engine cannot be imported here. Its modules are replaced by local ones with the parameters that
its documentation names: `weight`, `bias`, and `layer_norm_weight` and `layer_norm_bias` where a norm is fused
into a linear layer. Which module stands where is decided by the code under test, Megatron's as well as ours.
That the real modules have these parameters is left to `make test-gpu`; their `_extra_state` and grouped
experts are not compared.
"""

from tests.gpu.models import build  # isort: skip  (sets Megatron up)
import pytest
import torch
from megatron.core.extensions import transformer_engine, transformer_engine_spec_provider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import layers as tensor_layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_internvlx.model import layer_specs
from megatron_internvlx.model.attention import PackedDotProductAttention
from megatron_internvlx.model.norm import norm_builder

EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 64,
    "moe_layer_freq": [0, 1, 0, 1],
}
LAYER = (
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "self_attention.linear_proj.weight",
)
DENSE = ("mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight")
SPARSE = (
    "pre_mlp_layernorm.weight",  # before the router, no linear layer
    "mlp.router.weight",
    "mlp.experts.experts.linear_fc1.weight",
    "mlp.experts.experts.linear_fc2.weight",
)
WINDOW_ATTENTION = (
    *("norm_query", "norm_kv", "norm_mlp"),
    *(f"linear_{name}" for name in ("q", "k", "v", "proj", "gate", "up", "down")),
)
PVTC = {
    "cls_scale",
    *(f"{name}_proj.{part}.weight" for name in ("query", "cls", "kv") for part in ("norm", "linear")),
    *(f"attn_{reach}.{part}.weight" for reach in ("local", "global") for part in WINDOW_ATTENTION),
}
# Its norms stay modules of their own in both implementations; layers are stacked, so they have no number.
VISION = {
    *(
        f"embeddings.{name}"
        for name in (
            "class_embedding",
            "position_embedding",
            "patch_embedding.weight",
            "patch_embedding.bias",
        )
    ),
    *(f"encoder.layers.{name}.layer_scale" for name in ("self_attn_bda", "mlp_bda")),
    *(
        f"encoder.layers.{name}.{kind}"
        for name in (
            "input_layernorm",
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "pre_mlp_layernorm",
            "mlp.linear_fc1",
            "mlp.linear_fc2",
        )
        for kind in ("weight", "bias")
    ),
}


class FusedNormLinear(ColumnParallelLinear):
    """Parameters of Transformer Engine's `LayerNormLinear`."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **more) -> None:
        super().__init__(input_size, output_size, config=config, **more)
        norm = norm_builder(config.normalization, "local")(config, input_size)
        for name, parameter in norm.named_parameters():
            self.register_parameter(f"layer_norm_{name}", parameter)


class Norm:
    """Parameters of Transformer Engine's norms; as Megatron's `TENorm`, not itself the module it makes."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_) -> nn.Module:
        return norm_builder(config.normalization, "local")(config, hidden_size, eps)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the Transformer Engine specs buildable."""
    modules = {
        "TENorm": Norm,
        "TEColumnParallelLinear": ColumnParallelLinear,
        "TELayerNormColumnParallelLinear": FusedNormLinear,
        "TERowParallelLinear": RowParallelLinear,
        "TEDotProductAttention": PackedDotProductAttention,
    }
    for name, module in modules.items():
        monkeypatch.setattr(transformer_engine, name, module)
        monkeypatch.setattr(transformer_engine_spec_provider, name, module)
    monkeypatch.setattr(transformer_engine_spec_provider, "TEActivationOp", None)
    # Versions decide who norms queries and keys, and how experts are built.
    monkeypatch.setattr(transformer_engine_spec_provider, "is_te_min_version", lambda *_: True)
    monkeypatch.setattr(gpt_layer_specs, "TENorm", Norm)
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", transformer_engine_spec_provider.TESpecProvider)


def stored(implementation: str, **decoder: object) -> dict[str, tuple[int, ...]]:
    """Whole shapes of all parameters by key, as a training run saves them."""
    model = build(implementation, torch.float32, hetereogenous_dist_checkpoint=True, **decoder)
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in model.sharded_state_dict().values():
        if not entry.key.endswith("._extra_state"):
            parts = entry.build() if hasattr(entry, "build") else entry
            whole = parts[0] if isinstance(parts, list) else parts
            assert shapes.setdefault(entry.key, whole.global_shape) == whole.global_shape
    return shapes


def expected(sparse: tuple[int, ...]) -> set[str]:
    """Keys of a model with injections at layers 2 and 3 and experts in the `sparse` layers."""
    decoder = "language_model.decoder."
    layers = {
        f"{decoder}layers.{i}.{name}"
        for i in range(4)
        for name in (*LAYER, *(SPARSE if i in sparse else DENSE))
    }
    injections = {f"{decoder}layers.{i}.injection.projector.{name}" for i in (2, 3) for name in PVTC}
    return {
        "language_model.embedding.word_embeddings.weight",
        "language_model.output_layer.weight",
        f"{decoder}final_layernorm.weight",
        *layers,
        *injections,
        *(f"projector.{name}" for name in PVTC),
        *(f"vision_model.{name}" for name in VISION),
    }


@pytest.mark.parametrize(("sparse", "decoder"), [((), {}), ((1, 3), EXPERTS)], ids=["dense", "experts"])
def test_local_modules_have_the_fused_names(sparse: tuple[int, ...], decoder: dict) -> None:
    """A norm carries the name of the linear layer after it; one before a router keeps its own."""
    assert set(stored("local", **decoder)) == expected(sparse)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    "decoder",
    [{}, EXPERTS, {"qk_layernorm": True}, {"normalization": "LayerNorm", "add_bias_linear": True}],
    ids=["dense", "experts", "qk_norm", "layer_norm"],
)
def test_both_implementations_store_the_same(decoder: dict) -> None:
    """Same keys, same shapes."""
    engine = stored("transformer_engine", **decoder)
    assert stored("local", **decoder) == engine
    assert any(".linear_qkv.layer_norm_weight" in key for key in engine)


def test_the_output_layer_alone_is_built_without_the_fused_accumulation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without apex it could not be built with it; Transformer Engine's layers, local ones here, could."""
    monkeypatch.setattr(tensor_layers, "_grad_accum_fusion_available", True)
    for apex in (False, True):
        monkeypatch.setattr(layer_specs, "output_layer_fuses_accumulation", lambda apex=apex: apex)
        model = build("local", torch.float32, gradient_accumulation_fusion=True)
        fused = {
            name: module.gradient_accumulation_fusion
            for name, module in model.named_modules()
            if hasattr(module, "gradient_accumulation_fusion")
        }
        assert fused.pop("language_model.output_layer") is apex
        assert all(fused.values())
        assert {name.split(".")[0] for name in fused} == {"language_model", "vision_model", "projector"}
