"""The layouts that must agree with one process: what is trained (`SETTINGS`), on which ranks (`CASES`).

`Runner` runs a case and its reference, which is computed once per setting, from the same file of full
weights and on the same global batch of four micro-batches. `layout_table.py` writes what all cases measure.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests import layouts
from tests.distributed import Pool

STEPS = 20  # of a loss curve

# A step of Adam is lr * m / (sqrt(v) + eps). With the usual eps of 1e-8 it turns a gradient of 1e-9 (rounding
# noise where the true gradient is zero) into a tenth of a full step; with eps 1e-4 a weight differs by
# lr / eps = 10 times what its gradient differs by, so 2e-6 admits no wrong gradient above 2e-7.
ALWAYS = "--adam-eps 1e-4"

EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 24 --moe-token-dispatcher-type alltoall "
    "--qk-layernorm --moe-router-load-balancing-type"
)
LORA = "--lora-rank 3 --lora-alpha 9"
STATIC = "--boundary static --seq-length 160 --shallow-seq-length 80 --max-tiles-per-pack 8 --max-tiles 4"


@dataclass(frozen=True)
class Setting:
    """A model and its data; `drop` removes a flag of layouts.ARGUMENTS."""

    arguments: str = ""
    kind: str = "packed"
    same_weights: str = ""
    """Another setting with the same parameters, whose weights serve here too."""
    loose: bool = False
    """bf16: compared with bf16 on one process, within what its 8 bits leave."""


SETTINGS = {
    "lvtc": Setting(),
    "frozen": Setting("--freeze-vision", same_weights="lvtc"),
    "three": Setting("--expand-layer 2 --inject-layers 4 6"),
    "crowded": Setting("--expand-layer 4 --inject-layers 5 6"),
    "expand at 1": Setting("--expand-layer 1 no=--inject-layers"),
    "expand at 4": Setting("--expand-layer 4 --inject-layers 6"),
    "expand at 5": Setting("--expand-layer 5 no=--inject-layers"),
    "expand at 7": Setting("--expand-layer 7 no=--inject-layers"),
    "off": Setting("no=--expand-layer no=--inject-layers"),
    "single": Setting(kind="single", same_weights="lvtc"),
    "text": Setting(kind="text", same_weights="lvtc"),
    "tied": Setting("no=--untie-embeddings-and-output-weights"),
    "square": Setting("--loss-weighting square --projector mlp --upsample nearest"),
    "drop": Setting("--projector-drop-path 0.3", same_weights="lvtc"),
    "bf16": Setting("--bf16", same_weights="lvtc", loose=True),
    "experts": Setting(f"{EXPERTS} none"),
    "balanced": Setting(f"{EXPERTS} aux_loss --moe-aux-loss-coeff 1e-2", same_weights="experts"),
    # Of adapters; their layouts are ADAPTER_CASES.
    "adapters": Setting(f"{LORA} --freeze-vision"),
    "adapters everywhere": Setting(f"{LORA} --lora-targets decoder_attention decoder_mlp vision projectors"),
    "adapters of the decoder": Setting(f"{LORA} --freeze-vision --freeze-projectors"),
    "adapters beside experts": Setting(
        f"{EXPERTS} none {LORA} --freeze-vision --lora-targets decoder_attention"
    ),
}


@dataclass(frozen=True)
class Case:
    """One layout of one setting."""

    ranks: int
    setting: str
    layout: str
    """Short form; see `expand`."""

    @property
    def name(self) -> str:
        return f"{self.setting}: {self.layout} ({self.ranks})"


SHORT = {
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "per_stage": "--num-layers-per-virtual-pipeline-stage",
    "layers": "--pipeline-model-parallel-layout",
    "ep": "--expert-model-parallel-size",
    "etp": "--expert-tensor-parallel-size",
    "sp": "--sequence-parallel",
    "zero": "--use-distributed-optimizer",
    "overlap": "--overlap-grad-reduce --overlap-param-gather",
    "static": STATIC,
    # Three samples of a pack supervise 6 to 15 tokens.
    "few": "--max-supervised-tokens-per-pack 16",
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
    "--vision-recompute",
    "selective": "--recompute-granularity selective --recompute-modules core_attn mlp",
    "moe": "--recompute-granularity selective --recompute-modules moe",
    "batched": "--no-overlap-p2p-communication",
    "flush": "--overlap-p2p-communication-warmup-flush",
}


def expand(layout: str) -> list[str]:
    """ "tp=2 sp pp=2" -> Megatron's arguments."""
    words: list[str] = []
    for word in layout.split():
        name, _, value = word.partition("=")
        words += [*SHORT[name].split(), *([value] if value else [])]
    return words


CASES = [
    Case(2, "lvtc", "tp=2"),
    Case(2, "lvtc", "tp=2 sp selective"),
    Case(4, "lvtc", "tp=4 sp"),
    Case(2, "lvtc", "pp=2"),
    Case(2, "lvtc", "pp=2 static"),
    Case(2, "lvtc", "pp=2 full"),
    Case(2, "lvtc", "pp=2 per_stage=2"),
    Case(2, "lvtc", "pp=2 per_stage=2 flush static"),
    Case(2, "lvtc", "pp=2 layers=E|tttttttt,L"),
    Case(2, "lvtc", "pp=2 layers=E|tttt|ttt|tL"),
    Case(2, "lvtc", "zero overlap"),
    Case(4, "lvtc", "pp=4"),
    Case(4, "lvtc", "pp=4 layers=E|ttt|ttttt|L"),
    Case(4, "lvtc", "pp=4 per_stage=1"),
    Case(4, "lvtc", "pp=4 per_stage=1 batched"),
    Case(4, "lvtc", "tp=2 pp=2"),
    Case(4, "lvtc", "tp=2 sp pp=2 full"),
    Case(4, "lvtc", "tp=2 sp pp=2 per_stage=2 static few"),
    Case(4, "lvtc", "pp=2 per_stage=2 zero overlap"),
    Case(8, "lvtc", "pp=8"),
    Case(8, "lvtc", "tp=2 sp pp=2 per_stage=2 zero overlap"),
    Case(8, "lvtc", "tp=4 sp pp=2 static"),
    Case(2, "frozen", "pp=2 full"),
    Case(2, "frozen", "pp=2 layers=E|ttt|tttt|tL static"),
    Case(4, "frozen", "pp=4 per_stage=1"),
    Case(4, "frozen", "tp=2 sp pp=2"),
    Case(2, "expand at 1", "pp=2"),
    Case(2, "expand at 4", "pp=2"),
    Case(4, "expand at 4", "pp=4 per_stage=1"),
    Case(2, "expand at 5", "pp=2 per_stage=2"),
    Case(4, "expand at 7", "pp=4 static"),
    Case(2, "three", "pp=2 per_stage=2"),
    Case(4, "three", "pp=4 static"),
    Case(4, "three", "tp=2 sp pp=2"),
    Case(2, "crowded", "pp=2"),
    Case(2, "off", "pp=2 static"),
    Case(4, "off", "tp=2 sp pp=2 per_stage=2"),
    Case(2, "single", "pp=2 per_stage=2"),
    Case(2, "single", "tp=2 sp"),
    Case(4, "single", "pp=2 zero overlap"),
    Case(2, "text", "overlap zero"),
    Case(4, "text", "pp=2"),
    Case(2, "tied", "pp=2 per_stage=2"),
    Case(4, "tied", "tp=2 sp pp=2"),
    Case(2, "square", "tp=2 sp"),
    Case(2, "drop", "tp=2 sp full"),
    Case(4, "drop", "tp=2 sp pp=2 layers=Etttttt|ttL"),
    Case(2, "bf16", "pp=2"),
    Case(4, "bf16", "tp=2 sp pp=2 zero overlap"),
    Case(4, "experts", "ep=2 pp=2 zero overlap"),
    Case(4, "balanced", "tp=2 sp ep=2 etp=1"),
    Case(4, "balanced", "pp=2 per_stage=2 ep=2"),
    Case(2, "balanced", "pp=2 moe"),
]

# Measured: gradients 1e-6, elements 2e-6 at most, PP 2 and VPP bit-equal; LIMITS of the other layouts hold here too.
# Without the sums of replicated adapters' gradients, or with those of another projection, 0.1 and more.
ADAPTER_CASES = [
    Case(2, "adapters", "tp=2"),
    Case(2, "adapters", "pp=2 per_stage=2 full"),
    Case(4, "adapters", "tp=2 pp=2"),
    Case(4, "adapters everywhere", "tp=2 sp pp=2 selective"),
    Case(4, "adapters everywhere", "tp=2 sp pp=2 per_stage=2 static full"),
    Case(2, "adapters of the decoder", "pp=2 layers=E|tttttttt,L full"),
    Case(4, "adapters of the decoder", "pp=2 zero overlap"),
    Case(4, "adapters beside experts", "tp=2 sp ep=2 etp=1"),
]

CURVES = [
    Case(2, "lvtc", "pp=2 per_stage=2"),
    Case(4, "frozen", "tp=2 sp pp=2 static"),
    Case(4, "three", "pp=4 static"),
    Case(4, "single", "pp=2 zero overlap"),
    Case(2, "text", "zero overlap"),
]


@dataclass
class Difference:
    """Worst differences from one process. Gradients: of all tensors, each relative to its own size."""

    loose: bool = False
    """Limits of bf16."""
    loss: float = 0.0
    """Relative."""
    norm: float = 0.0
    """Of the gradient norm that Megatron reports and clips by; relative."""
    gradient: float = 0.0
    """Norm of the difference by the norm of the gradient."""
    element: float = 0.0
    """Largest difference of an element by the largest element of the gradient."""
    weight: float = 0.0
    """Largest difference of an element, absolute."""
    replicas: float = 0.0
    """Largest difference between TP ranks of a gradient that all have; see layouts._replica_difference."""
    worst: str = ""
    """The parameter whose gradient differs most."""

    def exceeded(self) -> list[str]:
        """Which limits are broken."""
        limits = LOOSE if self.loose else LIMITS
        return [
            f"{name} {getattr(self, name):.2e} > {limit} ({self.worst})"
            for name, limit in limits.items()
            if not getattr(self, name) <= limit
        ]


# Measured: at most 3e-6 of gradients and elements (experts; else 2e-6), 2e-7 of all else, replicas bit-equal.
# The mistakes of parallel/test_mutations.py change a gradient by more than 1e-2.
LIMITS = {
    "loss": 2e-6, "norm": 2e-6, "gradient": 2e-5, "element": 2e-5, "weight": 2e-6, "replicas": 0.0,
}  # fmt: skip
# bf16 keeps 8 bits, and tensor parallelism rounds partial sums: half of the gradients are 1e-2 off, those of
# some norms of the vision encoder, which are sums of thousands of terms of both signs, 7e-2. So a gradient is
# compared by its norm or by FLOOR of the whole gradient's, whichever is larger: measured 2e-2 at most, and an
# error of 5 % in one layer shows. Measured of the others: 2e-4, 2e-3, element 8e-2, weight 1e-3.
FLOOR = 0.01
LOOSE = {
    "loss": 5e-4, "norm": 4e-3, "gradient": 2.5e-2, "element": 0.12, "weight": 2e-3, "replicas": 0.0,
}  # fmt: skip


def compare(found: dict[str, Any], expected: dict[str, Any], loose: bool = False) -> Difference:
    """Results of `layouts.train` with grads and weights kept; `loose`: see FLOOR."""
    assert found["grads"].keys() == expected["grads"].keys(), "not the same parameters have gradients"
    assert found["weights"].keys() == expected["weights"].keys(), "not the same parameters"
    result = Difference(
        loose,
        loss=relative(found["losses"][1], expected["losses"][1]),
        norm=relative(found["norms"][1], expected["norms"][1]),
        replicas=found["replicas"],
    )
    squares = sum(want.float().square().sum().item() for want in expected["grads"].values())
    least = max(FLOOR * squares**0.5 if loose else 0.0, 1e-12)
    for name, want in expected["grads"].items():
        error = (found["grads"][name] - want).float()
        norm = error.norm().item() / max(want.norm().item(), least)
        if not norm <= result.gradient:
            result.gradient, result.worst = norm, name
        element = (error.abs().max() / want.abs().max().clamp(min=1e-12)).item()
        result.element = max(result.element, element)
    for name, want in expected["weights"].items():
        result.weight = max(result.weight, (found["weights"][name] - want).abs().max().item())
    return result


def relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected)


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What rank 0 kept, with the losses of the last stage and the worst difference of replicas."""
    ranks = [result for result in results if result["losses"]]
    replicas = max(result.get("replicas", 0.0) for result in results)
    return {
        **results[0],
        "losses": ranks[-1]["losses"],
        "valid": ranks[-1]["valid"],
        "replicas": replicas,
    }


@dataclass
class Runner:
    """Runs cases in a pool; references are kept."""

    pool: Pool
    folder: Path
    kept: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def weights(self, setting: str) -> str:
        """File of full weights that all layouts of a setting start from."""
        setting = SETTINGS[setting].same_weights or setting
        path = self.folder / f"{setting.replace(' ', '-')}.pt"
        if not path.exists():
            self.pool.run(1, layouts.save_start, SETTINGS[setting].arguments.split(), str(path))
        return str(path)

    def run(self, ranks: int, setting: str, extra: list[str], function: Any = layouts.train, **options: Any):
        """Trains a setting on so many ranks."""
        arguments = [*ALWAYS.split(), *SETTINGS[setting].arguments.split(), *extra]
        job = partial(function, weights=self.weights(setting), kind=SETTINGS[setting].kind, **options)
        return merged(self.pool.run(ranks, job, arguments))

    def reference(self, setting: str, extra: str = "", **options: Any) -> dict[str, Any]:
        """The same on one process, once per session."""
        if (setting, extra) not in self.kept:
            self.kept[setting, extra] = self.run(1, setting, extra.split(), **options)
        return self.kept[setting, extra]

    def difference(self, case: Case, reference: str = "", **options: Any) -> Difference:
        """One step in the case's layout, against one process, to which `reference` gives more arguments."""
        keep = ("grads", "weights")
        expected = self.reference(case.setting, reference, keep=keep)
        found = self.run(case.ranks, case.setting, expand(case.layout), keep=keep, **options)
        return compare(found, expected, SETTINGS[case.setting].loose)

    def curve(self, case: Case) -> float:
        """Largest relative difference of a loss within STEPS steps."""
        steps = f"--train-iters {STEPS}"
        expected = self.reference(case.setting, steps)["losses"]
        found = self.run(case.ranks, case.setting, [*expand(case.layout), *steps.split()])["losses"]
        assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
        return max(relative(found[step], expected[step]) for step in expected)
