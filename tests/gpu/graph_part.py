"""One part of a trained vision encoder as a CUDA graph: `python -m tests.gpu.graph_part PART`.

A forward and backward pass is recorded once and replayed on other values. The last line of the output is JSON: `part`,
`error` (null: the gradients are those of the pass without a graph) and the versions that decide. A trained encoder's
first replay ended with an illegal memory access; each part separates one guess at its cause from the others:

| part | what fails if it fails |
|---|---|
| `attention, megatron` | cuDNN's fused backward, 1,025 keys, packed layout: with `layer, megatron` what was seen |
| `..., 962 rows`, `..., 1157 rows`, `..., 1152 rows` | above 1,024 keys: 962 alone passes; 128 must divide: 1,152 |
| `attention, megatron, qk norm` | with it fails the kernel; without it the packed layout or its joined gradients |
| `split` | `_SplitPacked` alone, without an attention |
| `attention, torch`, `layer, torch` | torch's flash kernel, which `--vision-attention torch` counts on |
| `patches`, `patches, 12 tiles` | the convolution's weight gradient; the second without one of pixels |
| `linear`, `mlp` | cuBLASLt's bias epilogue: gradients added to `main_grad`; GELU between two products |
| `norms` | our backward kernels of LayerNorm, LayerScale and residual |
| `features, slice`, `features, pvtc`, `features, mlp` | the way of the gradient from a projector into the encoder |
| `whole, torch`, `whole, megatron` | nothing smaller: two layers, two passes by `.backward()` |
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tests.single import decoder_config, single  # isort: skip  (sets Megatron up)
import torch
from torch import Tensor

from megatron_internvlx.model.internvit import InternViT, internvit_transformer_config
from megatron_internvlx.model.internvit_config import InternViTConfig, internvit_preset
from megatron_internvlx.model.pvtc import PROJECTORS
from megatron_internvlx.platform import kernels

REPLAYS = 3


@dataclass(frozen=True)
class Size:
    """Of every part; the default is what failed on a GPU."""

    vision: InternViTConfig = field(default_factory=lambda: internvit_preset("internvit_300m", num_layers=1))
    tiles: int = 8
    hidden: int = 2048
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


@dataclass
class Part:
    """What is recorded.

    Attributes:
        function: of `x`, differentiable.
        parameters: whose gradients are compared.
        x: the input, filled with other values before each replay.
        learns: whether the gradient of `x` is wanted.
        passes: forward and backward passes of a recording.
        fused: gradients are added to `main_grad`, fp32, as Transformer Engine's matrix products do.
    """

    function: Callable[[Tensor], Tensor]
    parameters: list[Tensor]
    x: Tensor
    learns: bool = True
    passes: int = 1
    fused: bool = False

    def gradients(self) -> tuple[Tensor, ...]:
        """Of `x`, if it learns, and of the parameters, summed over the passes."""
        wanted = ([self.x] if self.learns else []) + self.parameters
        self.x.requires_grad_(self.learns)
        for one in wanted:
            one.grad = None
            if self.fused and one is not self.x:
                one.main_grad.zero_()  # type: ignore[attr-defined]
        for _ in range(self.passes):
            out = self.function(self.x)
            out.backward(torch.ones_like(out))
        found = [one.main_grad if self.fused and one is not self.x else one.grad for one in wanted]  # type: ignore[attr-defined]
        assert all(gradient is not None for gradient in found)
        return tuple(found)


def encoder_of(size: Size, attention: str, *, fused: bool = False, **changes: Any) -> InternViT:
    """With Transformer Engine's modules on a GPU, elsewhere with local ones."""
    single()
    vision = internvit_preset_changed(size.vision, **changes)
    config = internvit_transformer_config(vision, settings(size, gradient_accumulation_fusion=fused))
    encoder = InternViT(vision, config, attention=attention).to(device=size.device, dtype=size.dtype)
    encoder.train()
    return encoder


def internvit_preset_changed(vision: InternViTConfig, **changes: Any) -> InternViTConfig:
    """The same encoder with other fields."""
    return type(vision)(**{**vars(vision), **changes})


def settings(size: Size, **changes: Any) -> Any:
    """Language model settings, whose implementation and types encoder and projector take over."""
    implementation = "transformer_engine" if size.on_gpu else "local"
    types = {"params_dtype": size.dtype, "bf16": size.dtype == torch.bfloat16}
    widths = {"hidden_size": size.hidden, "num_attention_heads": 16, "normalization": "RMSNorm"}
    return decoder_config(transformer_impl=implementation, **types, **widths, **changes)


def rows_of(size: Size, count: int | None = None) -> Tensor:
    """Random `[S, T, C]`; S is a tile's patches and its CLS row unless `count` says otherwise."""
    shape = (count or size.vision.tokens_per_tile, size.tiles, size.vision.hidden_size)
    return torch.randn(*shape, device=size.device, dtype=size.dtype)


def pixels_of(size: Size, tiles: int) -> Tensor:
    side = size.vision.image_size
    return torch.randn(tiles, 3, side, side, device=size.device, dtype=size.dtype)


def _attention(size: Size, kind: str, count: int | None = None, **changes: Any) -> Part:
    module = encoder_of(size, kind, **changes).encoder.layers[0].self_attention
    return Part(lambda x: module(x)[0], list(module.parameters()), rows_of(size, count))


def _layer(size: Size, kind: str) -> Part:
    layer = encoder_of(size, kind).encoder.layers[0]
    return Part(lambda x: layer(x)[0], list(layer.parameters()), rows_of(size))


def _split(size: Size) -> Part:
    heads = size.vision.num_heads

    def function(x: Tensor) -> Tensor:
        q, k, v = kernels.split_packed(x.unflatten(-1, (heads // 2, 3, -1)), -2)
        return q * k + v

    width = size.vision.hidden_size // heads
    x = torch.randn(64, size.tiles, heads // 2 * 3 * width, device=size.device, dtype=size.dtype)
    return Part(function, [], x)


def _patches(size: Size, tiles: int, learns: bool) -> Part:
    embeddings = encoder_of(size, "torch").embeddings
    return Part(embeddings, list(embeddings.parameters()), pixels_of(size, tiles), learns=learns)


def _linear(size: Size) -> Part:
    """Weight and bias gradient of one product; fused only where Transformer Engine's kernel does it."""
    linear = encoder_of(size, "torch", fused=size.on_gpu).encoder.layers[0].self_attention.linear_qkv
    parameters = list(linear.parameters())
    if size.on_gpu:
        for one in parameters:
            one.main_grad = torch.zeros_like(one, dtype=torch.float32)  # type: ignore[attr-defined]
            one.register_post_accumulate_grad_hook(_add_to_main_grad)
    return Part(lambda x: linear(x)[0], parameters, rows_of(size), fused=size.on_gpu)


def _add_to_main_grad(parameter: Tensor) -> None:
    """What Megatron's hook does: gradients that no kernel has added are added, then dropped."""
    if not getattr(parameter, "grad_added_to_main_grad", False):
        assert parameter.grad is not None
        parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None


def _mlp(size: Size) -> Part:
    mlp = encoder_of(size, "torch").encoder.layers[0].mlp
    return Part(lambda x: mlp(x)[0], list(mlp.parameters()), rows_of(size))


def _norms(size: Size) -> Part:
    layer = encoder_of(size, "torch").encoder.layers[0]
    ends = (layer.input_layernorm, layer.self_attn_bda, layer.pre_mlp_layernorm, layer.mlp_bda)

    def function(x: Tensor) -> Tensor:
        normed, residual = kernels.norm_and_pass(x, layer.input_layernorm())
        normed, residual = layer.self_attn_bda(residual, normed, layer.pre_mlp_layernorm())
        return layer.mlp_bda(residual, normed)

    return Part(function, [p for end in ends for p in end.parameters()], rows_of(size))


def _features(size: Size, kind: str) -> Part:
    """An encoder, and what a projector does with its features; torch's attention, so that cuDNN's is not in it."""
    encoder = encoder_of(size, "torch")
    side = size.vision.patches_per_side
    parameters = list(encoder.parameters())
    after: Callable[[Tensor], Tensor] = lambda features: features[:, 1:]  # noqa: E731
    if kind != "slice":
        grids = {"grid": side // 2, "patches": side, "drop_path_rate": 0.0}
        after = PROJECTORS[kind](settings(size), size.vision.hidden_size, **grids)
        after.to(device=size.device, dtype=size.dtype)  # type: ignore[attr-defined]
        parameters += after.parameters()  # type: ignore[attr-defined]
    return Part(lambda x: after(encoder(x)), parameters, pixels_of(size, size.tiles), learns=False)


def _whole(size: Size, kind: str) -> Part:
    encoder = encoder_of(size, kind, num_layers=2)
    return Part(encoder, list(encoder.parameters()), pixels_of(size, size.tiles), learns=False, passes=2)


PARTS: dict[str, Callable[[Size], Part]] = {
    "whole, torch": lambda size: _whole(size, "torch"),
    "whole, megatron": lambda size: _whole(size, "megatron"),
    "attention, megatron": lambda size: _attention(size, "megatron"),
    "attention, megatron, 962 rows": lambda size: _attention(size, "megatron", 962),
    "attention, megatron, 1157 rows": lambda size: _attention(size, "megatron", 1157),
    "attention, megatron, 1152 rows": lambda size: _attention(size, "megatron", 1152),
    "attention, megatron, qk norm": lambda size: _attention(size, "megatron", qk_normalization=True),
    "attention, torch": lambda size: _attention(size, "torch"),
    "layer, torch": lambda size: _layer(size, "torch"),
    "layer, megatron": lambda size: _layer(size, "megatron"),
    "patches": lambda size: _patches(size, size.tiles, True),
    "patches, 12 tiles": lambda size: _patches(size, 12, False),
    "split": _split,
    "linear": _linear,
    "mlp": _mlp,
    "norms": _norms,
    "features, slice": lambda size: _features(size, "slice"),
    "features, pvtc": lambda size: _features(size, "pvtc"),
    "features, mlp": lambda size: _features(size, "mlp"),
}
"""Builders by name, those that decide most first."""


def replay(part: Part) -> None:
    """Record on a stream of its own, replay on other values, compare. Raises what CUDA or the comparison does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            part.gradients()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # as Megatron records
        recorded = part.gradients()
    for _ in range(REPLAYS):
        with torch.no_grad():
            part.x.copy_(torch.randn_like(part.x))
        graph.replay()
        torch.cuda.synchronize()
        ours = [gradient.clone() for gradient in recorded]
        for mine, plain in zip(ours, part.gradients(), strict=True):
            torch.testing.assert_close(mine, plain, rtol=2e-2, atol=2e-2 * float(plain.abs().max()))


def versions() -> dict[str, Any]:
    """What decides which kernels run."""
    cudnn = torch.backends.cudnn
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cudnn": cudnn.version() if cudnn.is_available() else None,
    }
    try:
        found["transformer-engine"] = version("transformer-engine")
    except PackageNotFoundError:
        found["transformer-engine"] = None
    return found


def main(name: str) -> int:
    """Print the result; returns 0 if the part replays."""
    error = None
    try:
        replay(PARTS[name](Size()))
    except Exception as problem:  # whatever it is, it is this part's answer
        error = f"{type(problem).__name__}: {problem}"
    print(json.dumps({"part": name, "error": error, **versions()}), flush=True)
    return int(error is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
