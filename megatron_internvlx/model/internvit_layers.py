"""The layer of InternViT as a Megatron layer spec.

What Megatron's transformer layer lacks: queries and keys normalized over all heads together, and a
per-channel factor and drop path on each branch. Source: modeling_intern_vit.py of the released InternVL.

Shapes: S tokens of a tile, T tiles (Megatron's batch), C width, N heads, D width of a head (C = N*D).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.models.backends import get_backend
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_internvlx.model.attention import PackedDotProductAttention
from megatron_internvlx.model.internvit_config import InternViTConfig
from megatron_internvlx.model.norm import NormBuilder, norm_builder

_TP_RNG = "model-parallel-rng"


class InternViTLayer(TransformerLayer):
    """A transformer layer; when `unused`, it only holds its weights for the checkpoint.

    Args:
        unused: whether the layer lies above the selected hidden state.
    """

    def __init__(self, *args: Any, unused: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Megatron ends branches under enable_grad, harmless without parameters there; ours has one, and
        # would keep activations in evaluation.
        self.bias_dropout_add_exec_handler = nullcontext
        self.unused = unused
        if unused:
            self.requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Maps `hidden_states` `[S, T, C]` to `([S, T, C], None)`."""
        if self.unused:
            return kwargs["hidden_states"], None
        return super().forward(*args, **kwargs)


class InternViTSelfAttention(SelfAttention):
    """Self-attention with an optional RMS norm of queries and keys over the full width, before the scale.

    The norms are not called `q_layernorm`: Megatron sums gradients of that name over the tensor-parallel
    group, and norms each head by itself.

    Args:
        qk_norm: builder of the two norms. None: off.
    """

    def __init__(self, *args: Any, qk_norm: NormBuilder | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.q_norm = self.k_norm = None
        if qk_norm is not None:
            build = partial(qk_norm, config=self.config, eps=self.config.layernorm_epsilon)
            self.q_norm = build(hidden_size=self.query_projection_size)
            self.k_norm = build(hidden_size=self.kv_projection_size)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values, each `[S, T, N, D]`."""
        q_STND, k_STND, v_STND = super().get_query_key_value_tensors(*args, **kwargs)
        if self.q_norm is not None and self.k_norm is not None:
            q_STND = self.q_norm(q_STND.flatten(2)).view_as(q_STND)
            k_STND = self.k_norm(k_STND.flatten(2)).view_as(k_STND)
        return q_STND, k_STND, v_STND


class LayerScaleDropPath(nn.Module):
    """Ends a branch: `residual + drop_path((x + bias) * layer_scale)`; takes the place of bias-dropout-add.

    Args:
        hidden_size: C.
        init: initial value of the factor.
        drop_path_rate: probability that a tile skips the branch while training; kept ones are scaled by
            1 / (1 - rate). 0: off.
        dtype: type of the factor.
    """

    def __init__(self, hidden_size: int, init: float, drop_path_rate: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.layer_scale = nn.Parameter(torch.full((hidden_size,), init, dtype=dtype))

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Returns the function that Megatron applies to `((x, bias), residual, dropout)`, all `[S, T, C]`."""
        return partial(self._add, training)

    def _add(
        self, training: bool, x_bias: tuple[Tensor, Tensor | None], residual_STC: Tensor, dropout: float
    ) -> Tensor:
        x_STC, bias_C = x_bias
        branch_STC = (x_STC if bias_C is None else x_STC + bias_C) * self.layer_scale
        if training and self.drop_path_rate > 0:
            keep = 1 - self.drop_path_rate
            with _rng_of_this_rank():
                kept_1T1 = branch_STC.new_empty(1, branch_STC.size(1), 1).bernoulli_(keep)
            branch_STC = branch_STC * kept_1T1.div_(keep)
        return residual_STC + branch_STC


def _rng_of_this_rank() -> AbstractContextManager:
    """Draws from Megatron's tensor-parallel generator, which full recompute restores like the default one.

    Tensor-parallel ranks encode different tiles, and different numbers of them: draws from the default
    generator would leave it in different states, and the decoder needs it equal on these ranks.
    """
    tracker = get_cuda_rng_tracker()
    return tracker.fork(_TP_RNG) if _TP_RNG in tracker.get_states() else nullcontext()


def _without_bias(linear: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Megatron gives all projections of a layer a bias or none; here only the qkv projection lacks it."""

    def build(*args: Any, **kwargs: Any) -> nn.Module:
        return linear(*args, **{**kwargs, "bias": False})

    return build


def internvit_block_spec(vit: InternViTConfig, config: TransformerConfig) -> TransformerBlockSubmodules:
    """Returns the layers of an InternViT; there is no final norm.

    Norms and linear layers stay separate modules in both implementations, so that their parameters have
    the same names.

    Args:
        vit: the architecture.
        config: the same as Megatron sees it; its `transformer_impl` chooses the implementation.
    """
    impl = config.transformer_impl
    backend = get_backend(impl)
    column, row = backend.column_parallel_linear(), backend.row_parallel_linear()
    attention = ModuleSpec(
        module=InternViTSelfAttention,
        params={
            "attn_mask_type": AttnMaskType.no_mask,
            "qk_norm": norm_builder("RMSNorm", impl) if vit.qk_normalization else None,
        },
        submodules=SelfAttentionSubmodules(
            linear_qkv=column if vit.qkv_bias else _without_bias(column),
            core_attention=PackedDotProductAttention if impl == "local" else backend.core_attention(),
            linear_proj=row,
        ),
    )
    norm = norm_builder(config.normalization, impl)
    mlp = partial(MLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row))

    def layer(index: int, drop_path_rate: float) -> ModuleSpec:
        end_of_branch = ModuleSpec(
            module=LayerScaleDropPath,
            params={
                "hidden_size": vit.hidden_size,
                "init": vit.layer_scale_init,
                "drop_path_rate": drop_path_rate,
                "dtype": config.params_dtype,
            },
        )
        return ModuleSpec(
            module=InternViTLayer,
            params={"unused": index >= vit.layers_run},
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm,
                self_attention=attention,
                self_attn_bda=end_of_branch,
                pre_mlp_layernorm=norm,
                mlp=mlp,
                mlp_bda=end_of_branch,
            ),
        )

    # As torch.linspace(0, rate, layers) in the released code.
    step = vit.drop_path_rate / max(1, vit.num_layers - 1)
    return TransformerBlockSubmodules(layer_specs=[layer(i, i * step) for i in range(vit.num_layers)])
