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

from megatron_internvlx.model.attention import GraphSafeAttention, PackedDotProductAttention
from megatron_internvlx.model.internvit_config import InternViTConfig
from megatron_internvlx.model.norm import KernelNorm, NormBuilder
from megatron_internvlx.platform import kernels
from megatron_internvlx.platform.packed_attention import attend_packed

_TP_RNG = "model-parallel-rng"


class InternViTLayer(TransformerLayer):
    """A transformer layer whose residuals, branch ends and norms are one kernel wherever they meet.

    When `unused`, it only has its weights, for the checkpoint.

    Args:
        unused: whether the layer lies above the selected hidden state.
    """

    def __init__(self, *args: Any, unused: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unused = unused
        if unused:
            self.requires_grad_(False)

    def forward(self, hidden_states: Tensor, **_unused: Any) -> tuple[Tensor, Tensor | None]:
        """Map `hidden_states` `[S, T, C]` to `([S, T, C], None)`."""
        if self.unused:
            return hidden_states, None
        residual = hidden_states.float() if self.config.fp32_residual_connection else hidden_states
        normed, residual = kernels.norm_and_pass(residual, self.input_layernorm())
        branch, _ = self.self_attention(normed)
        normed, residual = self.self_attn_bda(residual, branch, self.pre_mlp_layernorm())
        branch, _ = self.mlp(normed)
        return self.mlp_bda(residual, branch), None


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

    def forward(self, hidden_states: Tensor, **_unused: Any) -> tuple[Tensor, None]:
        """Map `hidden_states` `[S, T, C]` to `([S, T, C], None)`; the bias is in the result."""
        qkv_STc, _ = self.linear_qkv(hidden_states)
        qkv_STN3D = qkv_STc.unflatten(-1, (-1, 3, self.hidden_size_per_attention_head))
        if self.q_norm is None or self.k_norm is None:
            attended = attend_packed(self.core_attention, qkv_STN3D)
        else:
            q_STND, k_STND, v_STND = kernels.cut_packed(qkv_STN3D, -2)
            q_STC, _ = kernels.norm_and_pass(q_STND.flatten(2), self.q_norm())
            k_STC, _ = kernels.norm_and_pass(k_STND.flatten(2), self.k_norm())
            qkv = q_STC.view(q_STND.shape), k_STC.view(k_STND.shape), v_STND
            del qkv_STc, qkv_STN3D, q_STND, k_STND  # a frozen layer needs them no longer
            attended = self.core_attention(*qkv, None, attn_mask_type=self.attn_mask_type)
        return self.linear_proj(attended)[0], None


class LayerScaleDropPath(nn.Module):
    """End of a branch: `residual + drop_path(branch * layer_scale)`; takes the place of bias-dropout-add.

    Args:
        hidden_size: C.
        init: initial value of the factor.
        drop_path_rate: probability that a tile skips the branch while training; kept ones are scaled by
            1 / (1 - rate). 0: off.
        config: gives the type of the factor and `gradient_accumulation_fusion`.
    """

    def __init__(
        self, hidden_size: int, init: float, drop_path_rate: float, config: TransformerConfig
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.accumulate = config.gradient_accumulation_fusion
        self.layer_scale = nn.Parameter(torch.full((hidden_size,), init, dtype=config.params_dtype))

    def forward(
        self, residual_STC: Tensor, branch_STC: Tensor, norm: kernels.Norm | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Add the branch, `[S, T, C]`; with `norm`, returns its norm as well: `(norm, sum)`."""
        keep_1T1 = None
        if self.training and self.drop_path_rate > 0:
            with _rng_of_this_rank():
                keep_1T1 = branch_STC.new_empty(1, branch_STC.size(1), 1).bernoulli_(1 - self.drop_path_rate)
        parts: dict[str, Any] = {
            "scale": self.layer_scale,
            "keep": keep_1T1,
            "keep_rate": 1 - self.drop_path_rate,
        }
        if norm is None:
            return kernels.add_branch(residual_STC, branch_STC, **parts, accumulate=self.accumulate)
        return kernels.add_branch_and_norm(residual_STC, branch_STC, norm, **parts)


def _rng_of_this_rank() -> AbstractContextManager:
    """Generator of this tensor-parallel rank, which full recompute restores like the default one (not in a graph).

    Tensor-parallel ranks encode different tiles, and different numbers of them: draws from the default
    generator would leave it in different states, and the decoder needs it equal on these ranks.
    """
    tracker = get_cuda_rng_tracker()
    return tracker.fork(_TP_RNG) if _TP_RNG in tracker.get_states() else nullcontext()


def _column_linear_with_bias(column: Callable[..., nn.Module], **settings: bool) -> Callable[..., nn.Module]:
    """Builder of a column-parallel layer, also for Megatron's row-parallel ones.

    Over one rank both are the same, but Transformer Engine adds the bias of a row-parallel layer, and sums its
    gradient, in kernels of their own: between product and bias it would sum over the ranks.
    """

    def build(*args: Any, input_is_parallel: bool = True, **kwargs: Any) -> nn.Module:
        return column(*args, **{"gather_output": False, **kwargs, "skip_bias_add": False, **settings})

    return build


def _core_attention(config: TransformerConfig, attention: str) -> type[nn.Module]:
    """Class of the attention itself, between the projections; none has parameters."""
    if attention == "torch":
        return GraphSafeAttention
    impl = config.transformer_impl
    return PackedDotProductAttention if impl == "local" else get_backend(impl).core_attention()


def internvit_block_spec(
    vit: InternViTConfig, config: TransformerConfig, attention: str = "megatron"
) -> TransformerBlockSubmodules:
    """Layers of an InternViT, without a final norm.

    Norms and linear layers stay separate modules in both implementations, so that their parameters have
    the same names. Every linear layer adds its own bias: Transformer Engine does so at the end of the matrix
    product, and sums the bias's gradient at the end of another.

    Args:
        vit: the architecture.
        config: Megatron's config of it; its `transformer_impl` chooses the implementation.
        attention: `megatron`, that of the implementation, or `torch`; see `VisionSettings`.
    """
    linear = get_backend(config.transformer_impl).column_parallel_linear()
    self_attention = ModuleSpec(
        module=InternViTSelfAttention,
        params={
            "attn_mask_type": AttnMaskType.no_mask,
            "qk_norm": partial(KernelNorm, normalization="RMSNorm") if vit.qk_normalization else None,
        },
        submodules=SelfAttentionSubmodules(
            # Megatron gives all projections of a layer a bias or none.
            linear_qkv=_column_linear_with_bias(linear, **({} if vit.qkv_bias else {"bias": False})),
            core_attention=_core_attention(config, attention),
            linear_proj=_column_linear_with_bias(linear),
        ),
    )
    norm = partial(KernelNorm, normalization=config.normalization)
    linears = MLPSubmodules(
        linear_fc1=_column_linear_with_bias(linear), linear_fc2=_column_linear_with_bias(linear)
    )
    mlp = partial(MLP.as_mlp_submodule, submodules=linears)

    def layer(index: int, drop_path_rate: float) -> ModuleSpec:
        end_of_branch = ModuleSpec(
            module=LayerScaleDropPath,
            params={
                "hidden_size": vit.hidden_size,
                "init": vit.layer_scale_init,
                "drop_path_rate": drop_path_rate,
                "config": config,
            },
        )
        return ModuleSpec(
            module=InternViTLayer,
            params={"unused": index >= vit.layers_run},
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm,
                self_attention=self_attention,
                self_attn_bda=end_of_branch,
                pre_mlp_layernorm=norm,
                mlp=mlp,
                mlp_bda=end_of_branch,
            ),
        )

    # As torch.linspace(0, rate, layers) in the released code.
    step = vit.drop_path_rate / max(1, vit.num_layers - 1)
    return TransformerBlockSubmodules(layer_specs=[layer(i, i * step) for i in range(vit.num_layers)])
