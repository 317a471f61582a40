"""The vision encoder's parts that a GPU records in a graph, built and run small on the CPU without one."""

import json

import pytest
import torch

from megatron_internvlx.model.internvit_config import InternViTConfig
from tests.gpu import graph_part
from tests.gpu.graph_part import PARTS, Part, Size

VISION = InternViTConfig(hidden_size=64, num_layers=1, num_heads=4, ffn_hidden_size=96, image_size=56)
SMALL = Size(VISION, tiles=2, hidden=32, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("name", PARTS)
def test_every_part_gives_gradients_that_follow_its_input(name: str) -> None:
    part = PARTS[name](SMALL)
    before = [gradient.clone() for gradient in part.gradients()]
    again = part.gradients()
    assert len(again) == len(part.parameters) + part.learns
    assert part.parameters or name == "split"
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(before, again, strict=True))
    with torch.no_grad():
        part.x.copy_(torch.randn_like(part.x))
    assert any(not torch.allclose(a, b) for a, b in zip(before, part.gradients(), strict=True))


def test_names_say_what_is_inside() -> None:
    """The rows of attention, separate queries and keys, the tiles of `patches`, the two layers of `whole`."""
    assert PARTS["attention, megatron, 1157 rows"](SMALL).x.shape[0] == 1157
    assert PARTS["patches, 12 tiles"](SMALL).x.shape[0] == 12
    normed = PARTS["attention, megatron, qk norm"](SMALL)
    assert len(normed.parameters) == len(PARTS["attention, megatron"](SMALL).parameters) + 2
    whole = PARTS["whole, torch"](SMALL)
    assert len(whole.function.encoder.layers) == whole.passes == 2


def test_gradients_of_kernels_that_add_to_main_grad() -> None:
    """Neither added twice nor lost, whether a kernel has added them or the hook does."""
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    weight.main_grad = torch.full((1,), 7.0)
    weight.register_post_accumulate_grad_hook(graph_part._add_to_main_grad)
    part = Part(lambda x: x * weight, [weight], torch.tensor([3.0]), fused=True)
    assert [float(g) for g in part.gradients()] == [2.0, 3.0]
    weight.grad_added_to_main_grad = True
    assert [float(g) for g in part.gradients()] == [2.0, 0.0]


def test_a_part_that_fails_names_its_error_and_the_versions(capsys) -> None:
    assert graph_part.main("no such part") == 1
    said = json.loads(capsys.readouterr().out)
    assert (
        said["error"] == "KeyError: 'no such part'" and said["torch"] == torch.__version__ and "cudnn" in said
    )
