"""PVTC against tensors of the released code (fp32, CPU, one thread).

Measured worst differences: output 1.7e-6 (values up to 9.4), in training mode 1.2e-6, gradients 6.7e-7 of the
largest element of their tensor. In absolute terms that is 2.7e-5 and 5.8e-5 for small_v2 and geom448_v2, with
elements up to 50; the golden gradients themselves are 7.5e-5 and 7.8e-5 away from the same computation in
float64, ours 6.7e-5 and 7.1e-5. So gradients are compared relative to the largest element. An epsilon of 1e-5
instead of 1e-6 changes the output by 1.1e-4. bf16: 0.063 at most, 0.007 on average, where released bf16 and
fp32 outputs differ by 0.070 and 0.012.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.single import decoder_config, single  # isort: skip  (sets Megatron up)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_data_parallel_rng_tracker_name

from megatron_internvlx.model.pvtc import PVTC, tile_windows
from megatron_internvlx.platform import kernels
from tests.golden_weights import GOLDEN
from tests.parity.released import gradients, projector_as_released, projector_from_released

FOLDER = GOLDEN / "pvtc"
TOLERANCE = 1e-5
BF16_MEAN, BF16_MAX = 1e-2, 0.1


def released_pvtc(case: str, *, dtype: torch.dtype = torch.float32, **changes) -> PVTC:
    """The case's module in evaluation mode, in `dtype`."""
    single()
    meta = json.loads((FOLDER / "meta.json").read_text())[case]
    config = decoder_config(hidden_size=meta["llm_hidden"], params_dtype=dtype, bf16=dtype == torch.bfloat16)
    settings = {
        "patches": meta["patches_per_side"],
        "grid": int(meta["patches_per_side"] * meta["downsample_ratio"]),
        "pixel_shuffle_version": meta["ps_version"],
        **changes,
    }
    module = PVTC(config, meta["vit_hidden"], **settings).to(dtype)
    weights = projector_from_released(load_file(FOLDER / case / "weights.safetensors"))
    module.load_state_dict(weights, strict=True)
    return module.eval()


def worst(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a.float() - b.float()).abs().max().item()


@pytest.mark.parametrize("case", ["small_v2", "geom448_v2"])
def test_output_and_every_gradient(case: str) -> None:
    module = released_pvtc(case)
    io = load_file(FOLDER / case / "io.safetensors")
    features = io["input"].requires_grad_()
    output = module(features)
    assert worst(output, io["output"].flatten(1, 2)) < TOLERANCE
    (output * io["cotangent"].flatten(1, 2)).sum().backward()
    expected = load_file(FOLDER / case / "param_grads.safetensors") | {"input": io["input_grad"]}
    ours = projector_as_released(gradients(module)) | {"input": features.grad}
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert worst(ours[name], gradient) < TOLERANCE * gradient.abs().max().item(), name


@pytest.mark.parametrize("error", ["eps", "windows", "gate", "branches"])
def test_the_tolerance_sees_small_errors(error: str) -> None:
    """An epsilon of 1e-5, transposed windows, exchanged gate and up, exchanged branches are outside it."""
    module = released_pvtc("small_v2")
    if error == "eps":
        for part in module.modules():
            if hasattr(part, "eps"):
                part.eps = 1e-5
    elif error == "windows":
        module.transpose_query = True
    elif error == "gate":
        branch = module.attn_local
        branch.linear_gate, branch.linear_up = branch.linear_up, branch.linear_gate
    else:
        module.attn_local, module.attn_global = module.attn_global, module.attn_local
    io = load_file(FOLDER / "small_v2" / "io.safetensors")
    assert worst(module(io["input"]), io["output"].flatten(1, 2)) > TOLERANCE


def test_intermediates() -> None:
    """Each projection by itself, so that a failure above names its place."""
    module = released_pvtc("small_v2")
    golden = load_file(FOLDER / "small_v2" / "intermediates.safetensors")
    for theirs, ours in (("mlp1", module.query_proj), ("mlp2", module.cls_proj), ("mlp3", module.kv_proj)):
        assert worst(ours(golden[f"{theirs}.in"]), golden[f"{theirs}.out"]) < TOLERANCE
    for name in ("attn_local", "attn_global"):
        branch = getattr(module, name)
        normed, _ = kernels.twin_norm(golden[f"{name}.kv_in"], branch.norm_kv(), branch.norm_kv())
        out = branch(golden[f"{name}.q_in"].squeeze(1), *normed)
        assert worst(out, golden[f"{name}.out"].squeeze(1)) < TOLERANCE


def test_drop_path_in_training() -> None:
    """From the same generator state the same windows are dropped, in the released order of the branches."""
    module = released_pvtc("small_v2", drop_path_rate=0.1).train()
    golden = load_file(FOLDER / "small_v2" / "train_mode.safetensors")
    torch.manual_seed(1234)
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    tracker.set_states(states | {get_data_parallel_rng_tracker_name(): torch.get_rng_state()})
    features = load_file(FOLDER / "small_v2" / "io.safetensors")["input"]
    output = module(features)
    assert worst(output, golden["output_train"].flatten(1, 2)) < TOLERANCE
    # Far away from the result without drop path, so that the comparison is one.
    assert worst(module.eval()(features), golden["output_train"].flatten(1, 2)) > 1000 * TOLERANCE


def test_pixel_shuffle_orders() -> None:
    """The channels of a shuffled cell are its window's patches, row by row; v1 transposes the cells."""
    golden = load_file(FOLDER / "pixel_shuffle.safetensors")
    x = golden["x"]
    features = torch.cat([torch.full((2, 1, x.shape[-1]), 9.0), x.flatten(1, 2)], dim=1)
    windows = {block: tile_windows(features, block)[0] for block in (1, 2, 4)}
    assert torch.equal(windows[1], golden["windows1x1"])
    assert torch.equal(windows[2], golden["windows2x2"])
    assert torch.equal(windows[2].reshape(2, 2, 2, 12), golden["v2_r05"])
    assert torch.equal(windows[2].reshape(2, 2, 2, 12).transpose(1, 2), golden["v1_r05"])
    assert torch.equal(windows[4].reshape(2, 1, 1, 48), golden["v2_r025"])
    assert torch.equal(tile_windows(features, 2)[1], features[:, 0])


def test_v1_transposes_the_local_queries_only() -> None:
    """A cell off the diagonal hears of two blocks of patches: 8 patches and CLS; with v2 of 4 and CLS."""
    features = load_file(FOLDER / "small_v2" / "io.safetensors")["input"][:1].requires_grad_()
    heard = {}
    for version in ("v1", "v2"):
        module = released_pvtc("small_v2", pixel_shuffle_version=version)
        (gradient,) = torch.autograd.grad(module(features)[0, 1].sum(), features)  # row 0, column 1
        heard[version] = gradient[0].abs().sum(-1).nonzero().flatten().tolist()
    own, transposed = [3, 4, 11, 12], [17, 18, 25, 26]
    assert heard == {"v1": [0, *own, *transposed], "v2": [0, *own]}


@pytest.mark.parametrize("case", ["small_v2", "geom448_v2"])
def test_bf16_output(case: str) -> None:
    """bf16 has 8 bits: both are as far from fp32 as from each other."""
    io = load_file(FOLDER / case / "io.safetensors")
    output = released_pvtc(case, dtype=torch.bfloat16)(io["input"].bfloat16())
    assert output.dtype == torch.bfloat16
    difference = (output.float() - io["output_bf16"].flatten(1, 2).float()).abs()
    assert difference.mean().item() < BF16_MEAN
    assert difference.max().item() < BF16_MAX
