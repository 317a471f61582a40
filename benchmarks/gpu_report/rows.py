"""The rows of the report as data: what is measured, how long it takes, and what goes first when time is short.

Every step row uses real widths, the whole InternViT-300M and packs of 4,096 deep rows; `2b` has all of its 24 layers,
`8b` four of 32 (the optimizer of all of them does not fit one GPU).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT

TOKENIZER = ROOT / "tests" / "golden" / "data" / "tokenizers" / "qwen2_fast"
DEEP, TILES, SAVED = 4096, 8, 256 - 64
"""Deep rows and tiles of a pack; rows that a tile has fewer before the expansion."""
PACKS = [[(5, 900), (3, 1100)], [(4, 1000), (4, 1000)], [(6, 700), (2, 1300)], [(8, 1900), (0, 100)]]
"""Four packs of two samples (tiles, text tokens) that fill the rows but for a few."""
WIDE_PACKS = [[(16, 1800), (0, 2200)], [(9, 2100), (7, 1900)]]
"""Two packs of 8,192 rows with 16 tiles, which FP8 in the vision encoder needs."""
EXACT_ROWS, EXACT_TILES, EXACT_SAMPLES = 1024, 2, 2
EXACT_PACKS = [[(1, 250), (1, 250)], [(2, 300), (0, 200)], [(2, 480), (0, 20)], [(0, 500), (1, 220)]]
"""Packs of the deterministic curves: on Hopper attention takes memory by samples x rows^2 (`planning/graph.py`)."""
CURVE_STEPS, GRAPH_STEPS = 100, 50
TESTS = 110  # seconds of a file of tests, which is ended after 1.6 times as many
GRAPH = ("--cuda-graph-impl", "full_iteration")
FROZEN = ("--freeze-vision",)
FIRST_WITHOUT_UPDATE = ("--lr-warmup-iters", "1")
"""A first step at a learning rate of 0, as every recipe has it: delayed scaling knows no scales before it."""
EXACT = ("--deterministic-mode", "--max-samples-per-pack", str(EXACT_SAMPLES))
FP8_PARTS = ("decoder", "projectors")
"""What runs in FP8, as in every FP8 recipe (`examples/recipes`)."""
EVERYWHERE = ("decoder", "vision", "projectors")
TORCH_ATTENTION = ("--vision-attention", "torch")
"""What a graph needs to hold a trained vision encoder (docs/performance.md); rows without a graph or `-torch` have
Transformer Engine's attention."""
DETERMINISTIC = {
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
# Seconds that no row is charged for: imports before the first one, the last table.
AROUND = 25.0
LEAST_IMPORTANT = 4
"""Largest priority of timed rows in the default eight minutes: every figure with a goal, and what explains it."""


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        name: what `--only` picks.
        kind: "step", "plain", "curve", "images" or "tests".
        priority: rows with the smallest number are kept longest when `--minutes` trims.
        seconds: estimate, from the start signal to the end, imports left out.
        argv: arguments of pretrain_vlm.py.
        packs: samples of each micro-batch.
        settings: what else the kind needs.
        environment: variables of its process.
    """

    name: str
    kind: str
    priority: int
    seconds: float
    argv: tuple[str, ...] = ()
    packs: list[list[tuple[int, int]]] = field(default_factory=lambda: PACKS)
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def beside(self) -> bool:
        """Whether it may run beside others, because nothing in it is timed."""
        return self.kind in ("tests", "curve")


def model_arguments(
    preset: str,
    layers: int,
    precision: str,
    lvtc: bool,
    *,
    packs: int = 4,
    deep: int = DEEP,
    tiles: int = TILES,
    fp8_parts: Sequence[str] = FP8_PARTS,
) -> list[str]:
    """Arguments of a stack with static budgets of so many deep rows and tiles per pack; `fp8_parts` if in FP8."""
    shallow = deep - tiles * SAVED if lvtc else deep
    words = f"""
    --model-preset {preset} --precision {precision} --transformer-impl transformer_engine
    --num-layers {layers} --seq-length {deep} --boundary static --packing --loader energon
    --max-tiles-per-pack {tiles} --max-tiles {min(tiles - 1, 7)}
    --shallow-seq-length {shallow} --micro-batch-size 1 --global-batch-size {packs}
    --tokenizer-model {TOKENIZER} --data none --lr 1e-4 --min-lr 1e-4
    --lr-decay-style constant --clip-grad 1.0 --train-iters 1000 --projector-drop-path 0
    """.split()
    words += ["--expand-layer", str(layers // 3)] if lvtc else []
    return words + (["--fp8-parts", *fp8_parts] if "fp8" in precision else [])


SHAPES = {"2b": ("internvlx_2b_released", 24), "8b": ("internvlx_8b_released", 4)}

# Name, priority, estimated seconds, model, precision, LVTC, one CUDA graph per step, more arguments.
STEPS: tuple[tuple[str, int, float, str, str, bool, bool], ...] = (
    ("2b-bf16-graph", 0, 40, "2b", "bf16", True, True),
    ("2b-bf16-eager", 2, 45, "2b", "bf16", True, False),
    ("8b-bf16-graph", 3, 32, "8b", "bf16", True, True),
    ("8b-fp8-graph", 3, 32, "8b", "fp8_tensorwise", True, True),
    ("2b-bf16-graph-no-lvtc", 4, 40, "2b", "bf16", False, True),
    ("8b-bf16-graph-no-lvtc", 4, 32, "8b", "bf16", False, True),
    ("2b-fp8-graph", 6, 40, "2b", "fp8_tensorwise", True, True),
    ("8b-bf16-eager", 7, 35, "8b", "bf16", True, False),
    ("8b-fp8-eager", 7, 35, "8b", "fp8_tensorwise", True, False),
    ("8b-fp8-graph-no-lvtc", 8, 32, "8b", "fp8_tensorwise", False, True),
    ("2b-fp8-eager", 8, 45, "2b", "fp8_tensorwise", True, False),
    ("8b-fp8_blockwise-graph", 9, 32, "8b", "fp8_blockwise", True, True),
    ("2b-bf16-eager-no-lvtc", 9, 45, "2b", "bf16", False, False),
)

# Name, priority, precision, graph, steps, deterministic: loss curves at 2B widths, beside each other.
CURVES: tuple[tuple[str, int, str, bool, int, bool], ...] = (
    ("curve-bf16", 2, "bf16", False, CURVE_STEPS, False),
    ("curve-fp8_tensorwise", 2, "fp8_tensorwise", False, CURVE_STEPS, False),
    ("curve-bf16-graph", 3, "bf16", True, GRAPH_STEPS, False),
    ("curve-exact-eager", 3, "bf16", False, GRAPH_STEPS, True),
    ("curve-exact-graph", 3, "bf16", True, GRAPH_STEPS, True),
    ("curve-fp8_delayed", 6, "fp8_delayed", False, CURVE_STEPS, False),
    ("curve-fp8_blockwise", 8, "fp8_blockwise", False, CURVE_STEPS, False),
)

CURVE_SIZE = """--hidden-size 1024 --ffn-hidden-size 4096 --num-attention-heads 8 --num-query-groups 4
--vocab-size 16384""".split()  # noqa: SIM905

# InternVL with Qwen2's layers and half of them, for transformers' own class.
PLAIN_SIZE = {
    "image": 448, "patch": 14, "vision_hidden": 1024, "vision_layers": 24, "vision_heads": 16, "vision_ffn": 4096,
    "hidden": 2048, "layers": 12, "heads": 16, "kv_heads": 8, "ffn": 8192, "vocab": 92553,
}  # fmt: skip


def all_rows() -> list[Row]:
    """Every row, those that run beside each other first."""
    return [*test_rows(), *curve_rows(), *step_rows(), *plain_rows(), Row("images", "images", 4, 25)]


def test_rows() -> list[Row]:
    """One row, which is one process, per file of tests/gpu."""
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    return [
        Row(path.stem.replace("test_", "tests-", 1), "tests", 2, TESTS, settings={"file": _relative(path)})
        for path in files
    ]


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def step_rows() -> list[Row]:
    """Step time, busy share, kernels and memory."""
    rows = []
    for name, priority, seconds, size, precision, lvtc, graph in STEPS:
        argv = model_arguments(*SHAPES[size], precision, lvtc)
        rows.append(
            Row(name, "step", priority, seconds, (*argv, *((*GRAPH, *TORCH_ATTENTION) if graph else ())))
        )
    argv = model_arguments(*SHAPES["2b"], "bf16", True)
    rows.append(Row("2b-bf16-eager-torch", "step", 6, 45, (*argv, *TORCH_ATTENTION)))
    # First of those that wait for time: a graph of a trained encoder that fails leaves enough for both.
    frozen = (*model_arguments(*SHAPES["2b"], "bf16", True), *FROZEN)
    rows.append(Row("2b-bf16-graph-frozen", "step", 5, 40, (*frozen, *GRAPH)))
    rows.append(Row("2b-bf16-eager-frozen", "step", 5, 40, frozen))
    wide: dict[str, Any] = {"packs": 2, "deep": 2 * DEEP, "tiles": 2 * TILES}
    argv = model_arguments(*SHAPES["8b"], "fp8_tensorwise", True, fp8_parts=EVERYWHERE, **wide)
    argv += [*GRAPH, *TORCH_ATTENTION, "--vision-recompute"]  # 16 tiles a pack do not fit otherwise
    rows.append(Row("8b-fp8_everywhere-graph", "step", 9, 32, tuple(argv), WIDE_PACKS))
    return rows


def curve_rows() -> list[Row]:
    """Losses of 50 or 100 steps over the same packs; half of 2B's widths and 4 layers, so that all fit at once."""
    rows = []
    for name, priority, precision, graph, steps, exact in CURVES:
        sizes = {"deep": EXACT_ROWS, "tiles": EXACT_TILES} if exact else {}
        argv = model_arguments("internvlx_2b_released", 4, precision, True, packs=1, **sizes)
        argv += [*CURVE_SIZE, "--vision-overrides", json.dumps({"num_layers": 4})]
        argv += [*FROZEN, *FIRST_WITHOUT_UPDATE, *(GRAPH if graph else ()), *(EXACT if exact else ())]
        environment = DETERMINISTIC if exact else {}
        packs, settings = EXACT_PACKS if exact else PACKS, {"steps": steps}
        rows.append(Row(name, "curve", priority, 100, tuple(argv), packs, settings, environment))
    return rows


def plain_rows() -> list[Row]:
    """The same samples through a plain Hugging Face loop and here: InternVL with the MLP projector, no compression."""
    argv = model_arguments("internvlx_2b_released", PLAIN_SIZE["layers"], "bf16", False)
    argv += ["--projector", "mlp"]
    plain = {"model": "internvl", "size": PLAIN_SIZE}
    return [
        Row("plain-loop", "plain", 3, 45, settings=plain),
        Row("plain-ours-graph", "step", 3, 32, (*argv, *GRAPH, *TORCH_ATTENTION)),
        Row("plain-ours-eager", "step", 8, 35, tuple(argv)),
    ]


def pick(rows: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    """The rows that a shell pattern names. Raises ValueError for a pattern that names none."""
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            known = ", ".join(row.name for row in rows)
            raise ValueError(f"no row is called {pattern!r}; there are {known}")
    return [row for row in rows if any(fnmatchcase(row.name, pattern) for pattern in patterns)]


def estimate(rows: Sequence[Row]) -> float:
    """Seconds of the whole command: the longest of those beside each other, then the sum of the others."""
    beside = max((row.seconds for row in rows if row.beside), default=0.0)
    return AROUND + beside + sum(row.seconds for row in rows if not row.beside)


def trim(rows: Sequence[Row], seconds: float) -> tuple[list[Row], list[Row]]:
    """(kept, left out), both in the order of `rows`: by priority, whatever still fits into `seconds`."""
    kept: list[Row] = []
    for row in sorted(
        rows, key=lambda row: row.priority
    ):  # stable: the table's order decides within a priority
        if estimate([*kept, row]) <= seconds:
            kept.append(row)
    names = {row.name for row in kept}
    return [row for row in rows if row.name in names], [row for row in rows if row.name not in names]


def tiny(row: Row) -> Row:
    """The row on CPU within seconds, to try the code where there is no GPU; its numbers mean nothing."""
    if not row.argv:
        small = {
            "image": 112, "vision_hidden": 64, "vision_layers": 2, "vision_heads": 4, "vision_ffn": 128,
            "hidden": 64, "layers": 3, "heads": 4, "kv_heads": 2, "ffn": 128, "vocab": 512,
        }  # fmt: skip
        size = {**row.settings.get("size", {}), **small}
        settings = {**row.settings, "size": size, "tiny": True}
        return replace(row, packs=TINY_PACKS, settings=settings, seconds=TINY_SECONDS)
    settings = {**row.settings, "tiny": True, "steps": 4}
    argv = tuple(_tiny_arguments(row.argv))
    return replace(row, argv=argv, packs=TINY_PACKS, settings=settings, seconds=TINY_SECONDS)


TINY_SECONDS = 100.0  # a few, but none is ended on a busy machine
TINY_PACKS = [[(1, 40), (0, 60)], [(2, 30)]]
_TINY = {
    "--precision": "bf16", "--transformer-impl": "local", "--num-layers": "3", "--seq-length": "160",
    "--max-tiles-per-pack": "2", "--max-tiles": "1", "--shallow-seq-length": "160", "--global-batch-size": "2",
    "--vision-overrides": json.dumps(
        {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_hidden_size": 128}
    ),
    "--vocab-size": "512",
}  # fmt: skip
_TINY_MORE = (
    *("--hidden-size", "64", "--ffn-hidden-size", "128", "--num-attention-heads", "4"),
    *("--num-query-groups", "2", "--image-size", "112"),
)


def _tiny_arguments(argv: Sequence[str]) -> list[str]:
    """The same flags with small values; FP8, TE and graphs, which a CPU does not have, go."""
    words = list(argv)
    if GRAPH[0] in words:  # there is nothing to record on a CPU
        at = words.index(GRAPH[0])
        del words[at : at + len(GRAPH)]
    if "--fp8-parts" in words:
        at = words.index("--fp8-parts")
        parts = takewhile(lambda word: not word.startswith("--"), words[at + 1 :])
        del words[at : at + 1 + len(list(parts))]
    if "--expand-layer" in words:
        words[words.index("--expand-layer") + 1] = "1"
    for flag, value in _TINY.items():
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    return [*words, *_TINY_MORE]
