"""One part of a trained vision encoder as a CUDA graph: `python -m tests.gpu.graph_part PART`.

Forward and backward of eight tiles of 1,025 rows are recorded once and replayed on other values; exit code 0: the
gradients are those of the pass without a graph.
"""

import sys
from collections.abc import Callable

from tests.single import decoder_config, single  # isort: skip  (sets Megatron up)
import torch
from torch import Tensor

from megatron_internvlx.model.internvit import InternViT, internvit_transformer_config
from megatron_internvlx.model.internvit_config import internvit_preset

TILES = 8


def build(attention: str) -> InternViT:
    """One layer of InternViT-300M with Transformer Engine's modules, in bf16."""
    single()
    vit = internvit_preset("internvit_300m", num_layers=1)
    types = {"transformer_impl": "transformer_engine", "bf16": True, "params_dtype": torch.bfloat16}
    config = internvit_transformer_config(vit, decoder_config(**types))
    return InternViT(vit, config, attention=attention).to(device="cuda", dtype=torch.bfloat16)


def part(name: str) -> tuple[Callable[[Tensor], Tensor], list[Tensor], Tensor]:
    """(function, its parameters, an input that it takes)."""
    what, _, attention = name.partition(", ")
    encoder = build(attention or "torch")
    vit, layer = encoder.vit, encoder.encoder.layers[0]
    if what == "patches":
        pixels = torch.randn(TILES, 3, vit.image_size, vit.image_size, device="cuda", dtype=torch.bfloat16)
        return encoder.embeddings, list(encoder.embeddings.parameters()), pixels
    rows = torch.randn(vit.tokens_per_tile, TILES, vit.hidden_size, device="cuda", dtype=torch.bfloat16)
    module = {"attention": layer.self_attention, "layer": layer}[what]
    return lambda x: module(x)[0], list(module.parameters()), rows


def main(name: str) -> None:
    """Record, replay, compare."""
    function, parameters, x = part(name)
    x.requires_grad_()
    wanted = [x, *parameters]

    def gradients() -> tuple[Tensor, ...]:
        out = function(x)
        return torch.autograd.grad(out, wanted, torch.ones_like(out))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = gradients()
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        for ours, plain in zip(recorded, gradients(), strict=True):
            torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2 * float(plain.abs().max()))


if __name__ == "__main__":
    main(sys.argv[1])
