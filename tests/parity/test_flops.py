"""FLOPs and parameters against published figures and against torch's counter on models really built.

Golden figures agree exactly. Against torch's counter the worst difference is 0.25 %: PVTC computes its
window attention elementwise, which that counter does not see; everything else agrees exactly.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tests.single import single  # isort: skip  (sets Megatron up)
from megatron.training.arguments import parse_args, validate_args

from megatron_internvlx.arguments import add_our_arguments
from megatron_internvlx.data.plan import IGNORE, PlanSettings, SequencePlan, build_plan
from megatron_internvlx.model.internvlx import InternVLX
from megatron_internvlx.model.presets import preset
from megatron_internvlx.model.sizes import ModelSizes, model_sizes
from megatron_internvlx.parallel.batch import MicroBatch
from megatron_internvlx.parallel.device_plan import device_plan
from megatron_internvlx.planning.flops import BackwardSettings, PlanStats, forward_flops, training_flops
from megatron_internvlx.planning.parameters import parameters
from megatron_internvlx.training.builder import ModelProvider
from tests.golden_weights import GOLDEN

FIGURES = json.loads((GOLDEN / "flops_params.json").read_text())
TOLERANCE = 0.005


def released_sizes(size: str, projector: str) -> ModelSizes:
    return model_sizes(preset(f"internvlx_{size.lower()}_released") | {"projector": projector})


@pytest.mark.parametrize("size", ["2B", "8B"])
def test_golden_flops(size: str) -> None:
    sizes = released_sizes(size, "pvtc")
    widths = f"1024->{sizes.hidden}"
    one_tile = forward_flops(sizes, PlanStats(vision_tiles=1, projected_tiles=1)).by_part()
    assert one_tile["vision"] == FIGURES["internvit_300m_448"]["forward_flops_per_448_tile"]
    assert one_tile["entry_projector"] == FIGURES["pvtc"][widths]["forward_flops_per_448_tile"]
    mlp = forward_flops(released_sizes(size, "mlp"), PlanStats(projected_tiles=1))
    assert mlp.total == FIGURES["mlp1_baseline"][widths]["forward_flops_per_448_tile"]
    for n in (256, 512, 2048):
        text = PlanStats(deep_rows=n, deep_squares=n * n, output_rows=n)
        assert forward_flops(sizes, text, "full").total == FIGURES[f"llm_{size}"][f"llm_forward_flops_seq{n}"]


@pytest.mark.parametrize("size", ["2B", "8B"])
def test_golden_parameters(size: str) -> None:
    counts = parameters(released_sizes(size, "pvtc"))
    baseline = parameters(released_sizes(size, "mlp"))
    llm = FIGURES[f"llm_{size}"]
    widths = f"1024->{released_sizes(size, 'pvtc').hidden}"
    assert sum(counts.values()) == FIGURES[f"InternVL-X-{size}"]["total_params"]
    assert sum(baseline.values()) == FIGURES[f"InternVL2-{size}_baseline"]["total_params"]
    assert counts["vision"] == FIGURES["internvit_300m_448"]["params"]
    assert counts["entry_projector"] == FIGURES["pvtc"][widths]["params"]
    assert baseline["entry_projector"] == FIGURES["mlp1_baseline"][widths]["params"]
    assert counts["embedding"] == llm["params_tok_embeddings"]
    assert counts["output"] == llm["params_output"]
    assert counts["embedding"] + counts["deep"] + counts["final_norm"] + counts["output"] == llm["params_llm"]


@dataclasses.dataclass
class Built:
    """A tiny model made from command-line flags, and what counting needs."""

    model: InternVLX
    sizes: ModelSizes
    backward: BackwardSettings

    def plan(self, *, tiles: tuple[int, ...] = (2, 0, 1), alignment: int = 64) -> SequencePlan:
        """Samples with so many tiles, padding at the end, one blank tile."""
        grids = self.sizes
        per_tile = grids.high_grid**2
        rng = np.random.default_rng(0)
        ids, labels, visual = [], [], []
        for number, count in enumerate(tiles):
            mask = np.zeros(count * per_tile + 40 + 7 * number, bool)
            mask[3 : 3 + count * per_tile] = True
            tokens = rng.integers(1, 500, len(mask))
            label = np.where(np.arange(len(mask)) > len(mask) - 15, tokens, IGNORE)
            ids.append(tokens), labels.append(label), visual.append(mask)
        settings = PlanSettings(
            grids.low_grid, grids.high_grid, lvtc=grids.lvtc, alignment=alignment, tile_multiple=4
        )
        return build_plan(ids, labels, visual, settings)

    def batch(self, plan: SequencePlan) -> MicroBatch:
        side = self.sizes.vision.image_size
        return MicroBatch(
            device_plan(plan), torch.zeros(plan.tile_capacity, 3, side, side, dtype=torch.uint8)
        )


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Built]:
    def make(flags: str = "", model: str = "internvlx_tiny", **changes: object) -> Built:
        single()
        # window attention is the smaller a share of PVTC the wider the decoder
        common = (
            "--hidden-size 256 --kv-channels 32 --micro-batch-size 1 --seq-length 512 --train-iters 1 --lr 1"
        )
        monkeypatch.setattr(sys, "argv", ["test", "--model-preset", model, *common.split(), *flags.split()])
        args = parse_args(add_our_arguments)
        vars(args).update(changes)
        validate_args(args)
        args.padded_vocab_size = args.vocab_size + 64
        return Built(ModelProvider(args)(), model_sizes(args), BackwardSettings.from_args(args))

    return make


# What Megatron's local spec can build of every kind of decoder that the presets have.
MODELS = [
    ("internvlx_tiny", ""),
    ("internvlx_tiny", "--projector mlp"),
    ("internvlx_tiny", "--inject-layers 4 5 --upsample nearest --vision-preset internvit_tiny_rms"),
    ("internvlx_tiny", "--select-layer -2"),
    ("internvlx_tiny_internlm2", ""),
    ("internvlx_tiny_qwen3", ""),
    (
        "internvlx_tiny_qwen3",
        "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 --moe-layer-freq [1,0,1,1,0,1] "
        "--moe-shared-expert-intermediate-size 80 --moe-token-dispatcher-type alltoall",
    ),
]


def our_part(name: str) -> str:
    """The key of `parameters` that a parameter of a built model counts under."""
    layer = int(name.split("layers.")[1].split(".")[0]) if "decoder.layers." in name else -1
    tests = {
        "vision": name.startswith("vision_model."),
        "entry_projector": name.startswith("projector."),
        f"injection_{layer}": ".injection." in name,
        "embedding": ".embedding." in name,
        "shallow": 0 <= layer < 3,
        "deep": layer >= 3,
        "final_norm": "final_layernorm" in name,
        "output": "output_layer" in name,
    }
    return next(part for part, fits in tests.items() if fits)


@pytest.mark.parametrize(("model", "flags"), MODELS)
def test_parameters_of_built_models(model: str, flags: str, build) -> None:
    built = build(flags, model)
    real = dict.fromkeys(parameters(built.sizes), 0)
    for name, parameter in built.model.named_parameters():
        real[our_part(name)] += parameter.numel()
    assert parameters(built.sizes) == real


def test_parameters_with_biases(build) -> None:
    built = build(add_bias_linear=True)
    assert sum(parameters(built.sizes).values()) == sum(p.numel() for p in built.model.parameters())


def test_tied_embeddings_count_once() -> None:
    sizes = released_sizes("2B", "pvtc")
    tied = parameters(dataclasses.replace(sizes, tied=True))
    assert tied == parameters(sizes) | {"output": 0}


def counted(run: Callable[[], object]) -> int:
    """FLOPs by torch's counter, unmodified; attention as plain matrix products, which it knows on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(("model", "flags"), [*MODELS, ("internvlx_tiny", "LVTC off")])
def test_forward_of_each_part(model: str, flags: str, build) -> None:
    built = build("", model, expand_layer=None) if flags == "LVTC off" else build(flags, model)
    plan = built.plan()
    batch = built.batch(plan)
    ours = forward_flops(built.sizes, PlanStats.of(plan, padded=True), "full").by_part()
    layers = built.model.language_model.decoder.layers
    projectors = {"entry_projector": built.model.projector}
    for k in built.sizes.injection_layers:
        projectors[f"injection_{k}"] = layers[k].injection.projector

    features = built.model.encode(batch.tiles, batch.plan).detach()
    assert counted(lambda: built.model.encode(batch.tiles, batch.plan)) == ours["vision"]
    whole = counted(lambda: built.model(batch))
    assert whole == pytest.approx(sum(ours.values()), rel=TOLERANCE)
    decoder = whole - ours["vision"]
    for part, projector in projectors.items():
        alone = counted(lambda projector=projector: projector(features))
        assert alone == pytest.approx(ours[part], rel=TOLERANCE if "mlp" not in flags else 0)
        decoder -= alone
    # upsampling, both phases of the decoder, experts and the output layer
    assert decoder == sum(flops for part, flops in ours.items() if part not in {"vision", *projectors})


class NoModules(contextlib.nullcontext):
    """For the counter's module tracker, which fails in Megatron's recomputation: its hooks look for the
    gradient function of a view made without gradients."""

    parents = frozenset({"Global"})


def counted_training(built: Built, batch: MicroBatch) -> int:
    """Forward and backward by torch's counter, told that fused attention on a CPU counts as on a GPU."""
    aten = torch.ops.aten
    fused = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    built.model.train()
    counter = FlopCounterMode(display=False, custom_mapping=fused)
    counter.mod_tracker = NoModules()
    with counter:
        built.model(batch).sum().backward()
    return counter.get_total_flops()


def both_counts(built: Built) -> tuple[int, int]:
    """Forward and backward of a small micro-batch: torch's count and ours."""
    plan = built.plan(tiles=(1, 0), alignment=32)
    forward = forward_flops(built.sizes, PlanStats.of(plan, padded=True), "full")
    return counted_training(built, built.batch(plan)), training_flops(forward, built.backward).hardware


FULL = "--recompute-granularity full --recompute-method"


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--freeze-vision",
        "--freeze-llm",
        "--freeze-projectors",
        "--freeze-vision --freeze-llm",
        "--freeze-vision --freeze-projectors",
        "--freeze-llm --freeze-projectors",
        f"{FULL} uniform --recompute-num-layers 2",
        f"{FULL} uniform --recompute-num-layers 6 --freeze-vision --freeze-projectors",
        f"{FULL} block --recompute-num-layers 4 --freeze-llm",
        "--recompute-granularity selective",
        "--recompute-granularity selective --recompute-modules mlp core_attn",
        "--vision-recompute",
        "--vision-recompute --freeze-vision",
    ],
)
def test_forward_and_backward(flags: str, build) -> None:
    """Exactly, with a projector that torch's counter sees whole."""
    real, ours = both_counts(build(f"{flags} --projector mlp --inject-layers 4"))
    assert real == ours


@pytest.mark.parametrize(
    "flags",
    ["", "--freeze-vision --freeze-llm", f"{FULL} block --recompute-num-layers 4 --freeze-projectors"],
)
def test_forward_and_backward_with_pvtc(flags: str, build) -> None:
    real, ours = both_counts(build(f"{flags} --inject-layers 4"))
    assert real == pytest.approx(ours, rel=TOLERANCE)


def test_experts_forward_and_backward(build) -> None:
    model, flags = MODELS[-1]
    real, ours = both_counts(build(f"{flags} --projector mlp", model))
    assert real == ours


@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        ("--recompute-num-layers 1", {0, 4}),
        ("--recompute-num-layers 1 --num-virtual-stages-per-pipeline-rank 2", {0, 2, 4, 6}),
        ("--recompute-num-layers 2 --pipeline-model-parallel-layout Ettttt|tttL", {0, 1, 5, 6}),
    ],
)
def test_block_recompute_is_per_model_chunk(layout: str, layers: set[int], monkeypatch) -> None:
    flags = (
        "--model-preset internvlx_tiny --num-layers 8 --micro-batch-size 1 --seq-length 64 --train-iters 1 "
        f"--lr 1 {FULL} block --pipeline-model-parallel-size 2 {layout}"
    )
    monkeypatch.setattr(sys, "argv", ["test", *flags.split()])
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = parse_args(add_our_arguments)
    validate_args(args)
    assert BackwardSettings.from_args(args).full_layers == layers
