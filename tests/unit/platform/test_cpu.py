"""The patches that let Megatron run without CUDA, and what they leave alone."""

import argparse
import importlib.util
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_internvlx import platform

pytestmark = pytest.mark.skipif(platform.backend() != "gloo", reason="nothing is patched with CUDA")

platform.setup()

from megatron.core.tensor_parallel import random  # noqa: E402
from megatron.training.arguments import add_megatron_arguments  # noqa: E402


def test_setup_can_be_repeated() -> None:
    factory = torch.empty
    assert platform.setup() == "cpu"
    assert torch.empty is factory
    assert platform.device() == torch.device("cpu")


def test_other_libraries_still_see_no_cuda() -> None:
    assert not torch.cuda.is_available()
    assert torch.cuda.device_count() == 0


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 0), torch.cuda.current_device()])
def test_cuda_means_cpu(device: str | torch.device) -> None:
    made = [
        torch.empty(2, device=device),
        torch.tensor([1], device=device),
        torch.arange(3, device=device, pin_memory=True),
        torch.zeros_like(torch.ones(2), device=device),
        torch.ones(2).new_full((2,), 3.0, device=device),
        torch.ones(2).to(device),
        torch.ones(2).to(device=device, dtype=torch.bfloat16),
        torch.ones(2).cuda(device, non_blocking=True).pin_memory(),
        torch.nn.Linear(2, 2).to(device).weight,
        torch.nn.Linear(2, 2).cuda().weight,
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}


def test_device_contexts_and_torchscript_still_work() -> None:
    with torch.device("meta"):
        assert torch.empty(2).is_meta
        assert torch.nn.Linear(2, 2).weight.is_meta

    @torch.jit.script
    def scripted(size: int) -> torch.Tensor:
        return torch.zeros(size) + torch.arange(size)

    assert scripted(3).tolist() == [0, 1, 2]


def test_tensor_types_are_named_as_on_cuda() -> None:
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).long().type() == "torch.LongTensor"
    assert torch.ones(1).long().type(torch.ones(1).type()).dtype == torch.float32
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


def test_streams_and_events() -> None:
    stream = torch.cuda.Stream(device="cuda", priority=torch.cuda.Stream.priority_range()[1])
    with torch.cuda.stream(stream):
        event = stream.record_event()
    torch.cuda.current_stream().wait_event(event)
    torch.cuda.current_stream().wait_stream(stream)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    end.record()
    assert event.query() and 0 <= start.elapsed_time(end) < 1000


def test_memory_is_that_of_the_process() -> None:
    before = torch.cuda.memory_allocated()
    # Pages of its own: what an allocator hands out may have been the process's already.
    with mmap.mmap(-1, 64 << 20) as held:
        held.write(bytes([1]) * len(held))
        assert torch.cuda.memory_allocated() - before > len(held) // 2
    assert torch.cuda.max_memory_allocated() > before + (32 << 20)
    assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] >= before


def test_nothing_is_compiled() -> None:
    def function(x: int) -> int:
        return x

    assert torch.compile(function) is function
    assert torch.compile(dynamic=True)(function) is function


@pytest.mark.slow
def test_torch_compiler_can_be_imported() -> None:
    """It checks all of torch's functions when imported, and refused some replacements."""
    code = "from megatron_internvlx import platform; platform.setup(); import torch._dynamo"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.slow
@pytest.mark.parametrize("imported", ["", "import transformer_engine.pytorch.optimizers, apex; "])
def test_megatron_takes_torchs_optimizer_where_fused_ones_are_installed(
    tmp_path: Path, imported: str
) -> None:
    """As in a container for GPUs, whose kernels refuse tensors of the CPU; also if something imported them."""
    refuse = "def __getattr__(name):\n    return name\n"
    for package in ("transformer_engine", "transformer_engine/pytorch", "apex", "apex/optimizers"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(refuse)
    (tmp_path / "transformer_engine" / "pytorch" / "optimizers.py").write_text(refuse)
    code = (
        f"{imported}from megatron_internvlx import platform; platform.setup(); "
        "import torch; from megatron.core import optimizer; "
        "from megatron.core.optimizer import clip_grads, distrib_optimizer as distributed; "
        "assert optimizer.Adam is torch.optim.AdamW and optimizer.USING_PYTORCH_OPTIMIZER; "
        "assert distributed.Adam is torch.optim.Adam and not distributed.HAVE_APEX_OR_TE; "
        "assert clip_grads.l2_norm_impl.__module__ == 'megatron.core.utils', clip_grads.l2_norm_impl"
    )
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3], env=os.environ | paths
    )


def test_argument_defaults_are_arguments_of_megatron() -> None:
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = {action.dest for action in parser._actions}
    assert set(platform.args_defaults()) <= known
    platform.set_args_defaults(parser)
    assert parser.parse_args([]).transformer_impl == "local"
    chosen = parser.parse_args(["--transformer-impl", "transformer_engine"])
    assert chosen.transformer_impl == "transformer_engine"


def test_a_gpu_takes_what_is_installed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "_CUDA", True)
    assert platform.args_defaults() == {}
    assert not platform.output_layer_fuses_accumulation()
    installed = {"fused_weight_gradient_mlp_cuda"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    assert platform.args_defaults() == {}
    assert platform.output_layer_fuses_accumulation()


def test_fork_keeps_both_streams() -> None:
    """The tracker's stream goes on where it was, and the default one is untouched by what happens inside."""
    tracker = random.CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("model", 77)
    expected = [torch.rand(3) for _ in range(2)]
    alone = torch.Generator().manual_seed(77)
    expected_inside = [torch.rand(3, generator=alone) for _ in range(2)]

    torch.manual_seed(1)
    for outside, inside in zip(expected, expected_inside, strict=True):
        with tracker.fork("model"):
            assert torch.equal(torch.rand(3), inside)
        assert torch.equal(torch.rand(3), outside)


def test_cuda_and_cpu_random_state_are_one() -> None:
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state("cuda")
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.cuda.initial_seed() == 5
    assert torch.cuda.default_generators[torch.cuda.current_device()] is torch.default_generator


class _Noise(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(1)


def test_loaders_draw_from_their_own_stream() -> None:
    def draws() -> tuple[list[float], list[float]]:
        """Values of the loader and of the model, one after the other."""
        torch.manual_seed(3)
        loaded, model = [], []
        for noise in torch.utils.data.DataLoader(_Noise(), batch_size=1, shuffle=True):
            loaded.append(noise.item())
            model.append(torch.rand(1).item())
        return loaded, model

    loaded, model = draws()
    assert draws() == (loaded, model)
    assert len(set(loaded)) == len(loaded)
    torch.manual_seed(3)
    assert model == [torch.rand(1).item() for _ in model]
