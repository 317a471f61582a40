"""Normalization layers of the local (CPU) spec, and the choice between them and Transformer Engine's.

Megatron's torch norm refuses sequence parallelism; the only thing it lacks is the mark on the weights that
makes Megatron sum their gradients over the tensor-parallel group, so these carry it.

Shapes: H hidden size, `...` any leading dimensions.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_internvlx.platform import kernels

NormBuilder = Callable[..., nn.Module]


def _parameter(config: TransformerConfig, size: int, value: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.full((size,), value, dtype=config.params_dtype))
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


def _check(config: TransformerConfig) -> None:
    if config.layernorm_zero_centered_gamma:
        raise ValueError(
            "zero-centered norm weights (--apply-layernorm-1p) need --transformer-impl transformer_engine"
        )


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, `[..., H] -> [..., H]`.

    Statistics are in fp32; the result is cast back to the input's type *before* the weight is applied, as
    in the released InternVL, InternLM2 and Qwen2 code.

    Args:
        config: gives the parameter type and `sequence_parallel`.
        hidden_size: H.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        _check(config)
        self.eps = eps
        self.weight = _parameter(config, hidden_size, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x`."""
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last dimension, `[..., H] -> [..., H]`, by `torch.nn.functional.layer_norm`.

    Args:
        config: gives the parameter type and `sequence_parallel`.
        hidden_size: H.
        eps: added to the variance.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        _check(config)
        self.eps = eps
        self.weight = _parameter(config, hidden_size, 1.0)
        self.bias = _parameter(config, hidden_size, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x`."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class KernelNorm(nn.Module):
    """Parameters of a norm that a fused kernel applies together with neighbouring operations.

    The module must be called to get them: Megatron's hooks wait in the call for weights that are still being
    gathered.

    Args:
        config: gives the parameter type, `sequence_parallel` and `gradient_accumulation_fusion`.
        hidden_size: H.
        eps: added to the mean square or the variance.
        normalization: "RMSNorm" or "LayerNorm".
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, normalization: str
    ) -> None:
        super().__init__()
        self.eps, self.accumulate = eps, config.gradient_accumulation_fusion
        self.weight = _parameter(config, hidden_size, 1.0)
        self.bias = _parameter(config, hidden_size, 0.0) if normalization == "LayerNorm" else None

    def forward(self) -> kernels.Norm:
        """Parameters of the norm, for the kernel."""
        return kernels.Norm(self.weight, self.bias, self.eps, self.accumulate)


def norm_builder(normalization: str, transformer_impl: str) -> NormBuilder:
    """Builder of a norm, to be called with `config=`, `hidden_size=`, `eps=`.

    Args:
        normalization: "RMSNorm" or "LayerNorm"; it has priority over `config.normalization`, because the vision
            encoder has RMS norms on queries and keys beside layer norms.
        transformer_impl: "local" or "transformer_engine".

    Raises:
        ValueError: for another normalization or implementation.
    """
    local = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
    if normalization not in local:
        raise ValueError(f"unknown normalization {normalization!r}: use one of {', '.join(local)}")
    if transformer_impl == "local":
        return local[normalization]
    if transformer_impl != "transformer_engine":
        raise ValueError(f"unknown transformer_impl {transformer_impl!r}: use local or transformer_engine")

    def build(config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> nn.Module:
        from megatron.core.extensions.transformer_engine import TENorm

        config = copy.copy(config)
        config.normalization = normalization
        return TENorm(config=config, hidden_size=hidden_size, eps=eps)

    return build
