"""Adapters beside Transformer Engine's layers on one GPU: gradients as beside the local modules, FP8 near bf16.

No figure here was measured yet; the errors found are printed.
"""

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)
import transformer_engine.pytorch  # noqa: F401, E402  (without it nothing here would be tested)

from megatron_internvlx.lora_settings import TARGETS, LoraSettings  # noqa: E402
from megatron_internvlx.model.builder import freeze  # noqa: E402
from megatron_internvlx.model.internvlx import InternVLX  # noqa: E402
from megatron_internvlx.model.lora import MARK, add_adapters  # noqa: E402
from tests.gpu.models import batch, build, copy_weights  # noqa: E402

PARTS = frozenset({"vision", "llm", "projectors"})


def adapted(implementation: str, dtype: torch.dtype, **decoder: object) -> InternVLX:
    """A model with adapters everywhere, second matrices random, all else frozen."""
    model = build(implementation, dtype, **decoder)
    add_adapters(model, LoraSettings(lora_rank=16, lora_targets=list(TARGETS)))
    freeze(model, PARTS)
    generator = torch.Generator("cuda").manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            drawn = torch.randn(parameter.shape, device="cuda", generator=generator)
            parameter.data.copy_(0.02 * drawn)
    return model


def gradients(model: InternVLX) -> torch.Tensor:
    """Those of all adapters in one vector; nothing else has any."""
    model.train()(batch(model)).float().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads and all(MARK in name for name in grads)
    return torch.cat([grads[name].double().flatten() for name in sorted(grads)])


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def reference() -> tuple[InternVLX, torch.Tensor]:
    model = adapted("local", torch.float32)
    return model, gradients(model)


def test_gradients_beside_transformer_engines_layers(
    reference: tuple[InternVLX, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """In bf16 at most twice as far from fp32 as beside the local modules; an unnormed input would be far off."""
    model, exact = reference
    found = []
    for implementation in ("local", "transformer_engine"):
        low = adapted(implementation, torch.bfloat16)
        copy_weights(model, low)
        found.append(relative(gradients(low), exact))
    with capsys.disabled():
        print(
            f"\nadapters' gradients in bf16, from fp32: local {found[0]:.2e}, Transformer Engine {found[1]:.2e}"
        )
    assert found[1] < 2 * found[0] + 1e-3


def test_adapters_of_an_fp8_base_stay_near_bf16(
    reference: tuple[InternVLX, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = adapted("transformer_engine", torch.bfloat16)
    low = adapted("transformer_engine", torch.bfloat16, fp8="hybrid", fp8_recipe="tensorwise")
    for model in (plain, low):
        copy_weights(reference[0], model)
        assert {p.dtype for name, p in model.named_parameters() if MARK in name} == {torch.bfloat16}
    error = relative(gradients(low), gradients(plain))
    with capsys.disabled():
        print(f"\nadapters' gradients beside an FP8 base, from bf16: {error:.4f}")
    assert 1e-5 < error < 0.3  # as `test_fp8_stays_near_bf16` allows gradients
