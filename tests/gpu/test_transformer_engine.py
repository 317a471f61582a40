"""Transformer Engine on one GPU: same outputs as the local modules, packs isolated, FP8 near bf16.

No figure here was measured yet. Bounds are relative to the error that bf16 itself makes against fp32 in
the same run, or, for FP8, what three bits of mantissa admit; the errors found are printed.
"""

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)
# Without it nothing here would be tested, which must not look like success on a GPU.
import transformer_engine.pytorch as te  # noqa: E402

from tests.gpu.models import batch, build, copy_weights  # noqa: E402


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())


def gradients(model) -> torch.Tensor:
    """All gradients in one vector, by local name, norms' own included."""
    from tests.gpu.models import local_name

    named = {local_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return torch.cat([named[n].double().flatten() for n in sorted(named)])


@pytest.fixture(scope="module")
def reference():
    """The local model in fp32, its logits, losses and gradients."""
    model = build("local", torch.float32)
    rows = batch(model)
    with torch.no_grad():
        logits = model.eval()(rows, return_logits=True)
    model.train()
    losses = model(rows)
    losses.mean().backward()
    return model, logits, losses.detach(), gradients(model)


def run(model, rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, losses and gradients."""
    with torch.no_grad():
        logits = model.eval()(rows, return_logits=True)
    model.train()
    losses = model(rows)
    losses.float().mean().backward()
    return logits, losses.detach(), gradients(model)


def test_a_linear_layer_can_be_trusted() -> None:
    """Before anything else: the build fits this torch and this GPU."""
    torch.manual_seed(0)
    ours = te.Linear(256, 384, bias=False, params_dtype=torch.bfloat16)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    wanted = x.double() @ ours.weight.double().t()
    assert relative(ours(x), wanted) < 2**-8


def test_same_outputs_as_the_local_modules(reference, capsys) -> None:
    """TE in bf16 is at most twice as far from fp32 as the local modules in bf16 are."""
    model, *wanted = reference
    found = {}
    for implementation in ("local", "transformer_engine"):
        low = build(implementation, torch.bfloat16)
        copy_weights(model, low)
        found[implementation] = run(low, batch(low))
    for name, local, fused, exact in zip(
        ("logits", "losses", "gradients"), *found.values(), wanted, strict=True
    ):
        own, theirs = relative(local, exact), relative(fused, exact)
        with capsys.disabled():
            print(f"\n{name} in bf16, from fp32: local {own:.2e}, Transformer Engine {theirs:.2e}")
        assert theirs < 2 * own + 1e-3, name


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_samples_of_a_pack_do_not_see_each_other(reference, changed: int) -> None:
    """Words and pixels of one sample change; the logits of the others stay bit for bit."""
    model = build("transformer_engine", torch.bfloat16).eval()
    copy_weights(reference[0], model)
    before, after = batch(model), batch(model, changed)
    with torch.no_grad():
        a, b = model(before, return_logits=True), model(after, return_logits=True)
    start = 0
    for number, length in enumerate(before.plan.deep.segment_lengths[:3]):
        same = torch.equal(a[start : start + length], b[start : start + length])
        assert same == (number != changed)
        start += length


@pytest.mark.parametrize(
    "recipe,bound", [("tensorwise", 0.1), ("delayed", 0.15), ("blockwise", 0.1), ("mxfp8", 0.1)]
)
def test_fp8_stays_near_bf16(reference, recipe: str, bound: float, capsys) -> None:
    """E4M3 keeps 3 bits: 6 % per element at worst, averaging out over a row. It must not be bf16 itself."""
    capability = torch.cuda.get_device_capability()
    if recipe == "mxfp8" and capability < (10, 0):
        pytest.skip("MXFP8 needs Blackwell")
    if recipe == "blockwise" and capability[0] != 9:
        pytest.skip("the blockwise recipe is Hopper's")
    formats = {"tensorwise": "hybrid", "delayed": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
    plain = build("transformer_engine", torch.bfloat16)
    low = build("transformer_engine", torch.bfloat16, fp8=formats[recipe], fp8_recipe=recipe)
    for model in (plain, low):
        copy_weights(reference[0], model)
    for _ in range(3 if recipe == "delayed" else 0):  # fills the history of maxima
        low.train()(batch(low)).float().mean().backward()
    low.zero_grad()
    for name, fp8, bf16 in zip(
        ("logits", "losses", "gradients"), run(low, batch(low)), run(plain, batch(plain)), strict=True
    ):
        error = relative(fp8, bf16)
        with capsys.disabled():
            print(f"\n{name} in FP8 {recipe}, from bf16: {error:.4f}")
        assert 1e-5 < error < (3 * bound if name == "gradients" else bound), f"{name}: {error:.3f}"


def test_projectors_stay_in_bf16_unless_named(reference) -> None:
    """Inside a decoder layer that runs in FP8, an injection gives bit for bit what it gives in bf16."""
    plain = build("transformer_engine", torch.bfloat16).eval()
    low = build("transformer_engine", torch.bfloat16, fp8="hybrid", fp8_recipe="tensorwise").eval()
    for model in (plain, low):
        copy_weights(reference[0], model)
    seen = {}
    for name, model in (("plain", plain), ("low", low)):
        projector = model.language_model.decoder.layers[2].injection.projector
        projector.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
        with torch.no_grad():
            model(batch(model), return_logits=True)
    assert torch.equal(seen["plain"], seen["low"])


def test_deterministic_mode_repeats_every_bit(reference, monkeypatch) -> None:
    """What --deterministic-mode sets, then the same step twice: logits, losses and gradients."""
    from megatron.training.determinism import apply_determinism_env

    environment: dict[str, str] = {}
    apply_determinism_env(environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    torch.use_deterministic_algorithms(True)
    try:
        model = build("transformer_engine", torch.bfloat16, deterministic_mode=True)
        copy_weights(reference[0], model)
        first = run(model, batch(model))
        model.zero_grad()
        second = run(model, batch(model))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
