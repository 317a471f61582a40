"""Deterministic mode: a step uses only operations that are deterministic on GPUs too, and gives the same bits."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gpu.models import VISION, VOCABULARY, batch, build
from tests.whole_model import whole_model

aten = torch.ops.aten

# No deterministic CUDA kernel, whatever the arguments: what `torch.use_deterministic_algorithms` says it
# raises for, by the operations that autograd runs. Antialiased interpolation shares a kernel with the plain.
REFUSED = {
    aten.upsample_linear1d_backward,
    aten.upsample_bilinear2d_backward,
    aten.upsample_bicubic2d_backward,
    aten.upsample_trilinear3d_backward,
    aten._upsample_bilinear2d_aa_backward,
    aten._upsample_bicubic2d_aa_backward,
    aten.grid_sampler_2d_backward,
    aten.grid_sampler_3d_backward,
    aten.avg_pool3d_backward,
    aten._adaptive_avg_pool2d_backward,
    aten._adaptive_avg_pool3d_backward,
    aten.adaptive_max_pool2d_backward,
    aten.adaptive_max_pool3d_backward,
    aten.fractional_max_pool2d_backward,
    aten.fractional_max_pool3d_backward,
    aten.max_unpool2d,
    aten.max_unpool3d,
    aten.reflection_pad1d_backward,
    aten.reflection_pad2d_backward,
    aten.reflection_pad3d_backward,
    aten.nll_loss2d_forward,
    aten.nll_loss2d_backward,
    aten._ctc_loss_backward,
    aten._embedding_bag_dense_backward,
    aten.put,
    aten.put_,
    aten.histc,
}


def _floating(x: torch.Tensor, _dim: int, *, dtype: torch.dtype | None = None, **_: Any) -> bool:
    dtype = dtype or x.dtype
    return dtype.is_floating_point or dtype.is_complex


def _weighted(_x: torch.Tensor, weights: torch.Tensor | None = None, *_: Any) -> bool:
    return weights is not None


def _product(_x: Any, _dim: int, _index: Any, _source: Any, reduce: str, **_: Any) -> bool:
    return reduce == "prod"


def _with_indices(_x: torch.Tensor, *dim: Any, **_: Any) -> bool:
    return bool(dim)


# Refused with some arguments only.
REFUSED_IF: dict[Any, Callable[..., bool]] = {
    aten.cumsum: _floating,
    aten.cumsum_: _floating,
    aten.bincount: _weighted,
    aten.scatter_reduce: _product,
    aten.scatter_reduce_: _product,
    aten.median: _with_indices,
    aten.nanmedian: _with_indices,
}


class Recorder(TorchDispatchMode):
    """Names of all operations run inside, forward and backward, and of those without a deterministic kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()
        self.refused: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        packet, name = op.overloadpacket, op.overloadpacket.__name__
        self.used.add(name)
        if packet in REFUSED or (packet in REFUSED_IF and REFUSED_IF[packet](*args, **kwargs)):
            self.refused.add(name)
        return op(*args, **kwargs)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """What Megatron's --deterministic-mode asks torch for."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def bits() -> list[torch.Tensor]:
    """Losses and gradients of a model with LVTC and a further injection."""
    torch.manual_seed(1)
    model = build("local", torch.float32, deterministic_mode=True).train()
    losses = model(batch(model))
    losses.mean().backward()
    return [losses.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.usefixtures("deterministic")
def test_two_steps_give_the_same_bits() -> None:
    """Merge, expansion, injections and attention of a pack with deterministic algorithms only."""
    first, second = bits(), bits()
    assert len(first) == len(second) > 50
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].abs().sum() > 0


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(
    ("projector", "upsample", "version"), [("pvtc", "bilinear", "v2"), ("mlp", "nearest", "v1")]
)
def test_a_step_uses_no_operation_that_cuda_refuses(projector: str, upsample: str, version: str) -> None:
    """Vision encoder, projectors, merge, expansion and one more injection.

    Transformer Engine's own kernels, and what torch chooses by device, are left to GPUs.
    """
    model = whole_model(
        VISION,
        vocab_size=VOCABULARY,
        rotary_base=10000,
        compression={
            "injection_layers": (1, 2),
            "low_grid": 4,
            "projector": projector,
            "upsample": upsample,
            "pixel_shuffle_version": version,
            "projector_drop_path": 0.1,
        },
        num_layers=3,
        hidden_size=64,
        ffn_hidden_size=64,
        deterministic_mode=True,
    ).train()
    packed = batch(model)
    with Recorder() as record:
        model(packed).mean().backward()
    assert record.refused == set()
    # The patches' convolution, merge, expansion, injection and attention, and backward as well as forward.
    assert record.used >= {
        "convolution_backward",
        "index_select",
        "baddbmm",
        "index_add",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    }
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def _bilinear(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x[None], size=(8, 8), mode="bilinear")


@pytest.mark.parametrize(
    ("function", "refused"),
    [
        (_bilinear, "upsample_bilinear2d_backward"),
        (lambda x: F.adaptive_avg_pool2d(x, 2), "_adaptive_avg_pool2d_backward"),
        (lambda x: x.cumsum(0), "cumsum"),
        (lambda x: x.median(0).values, "median"),
        (lambda x: x + x.detach().long().cumsum(0), None),
        (lambda x: x * x.detach().median(), None),
    ],
)
def test_what_cuda_refuses_is_noticed(
    function: Callable[[torch.Tensor], torch.Tensor], refused: str | None
) -> None:
    x = torch.randn(1, 4, 4, requires_grad=True)
    with Recorder() as record:
        function(x).sum().backward()
    assert record.refused == ({refused} if refused else set())
