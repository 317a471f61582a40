"""Command lines of whole training steps at small widths that FP8 admits, vision encoder and projectors included."""

from benchmarks.step_time import argv
from tests.golden_weights import GOLDEN

# 16x16 patches: 16 shallow and 64 deep tokens per tile. 257 rows per tile need tiles in multiples of 16.
SIZE = {
    "image": 224, "patch": 14, "vision_hidden": 256, "vision_layers": 2, "vision_heads": 4, "vision_ffn": 512,
    "hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 512, "vocab": 512, "expand": 2,
}  # fmt: skip
MICRO_BATCHES = [[(1, 64), (2, 32)], [(0, 96), (3, 48)]]
STILL = ("--projector-drop-path", "0")
TORCH = ("--vision-attention", "torch")
# Tiles of 448 pixels have 1,025 rows, which 128 does not divide; 32 x 32 patches, 64 shallow and 256 deep tokens.
WIDE = (
    "--image-size",
    "448",
    "--seq-length",
    "4096",
    "--shallow-seq-length",
    "1024",
    "--max-tiles-per-pack",
    "16",
)
GRAPH_CASES: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "frozen": ("bf16", ("--freeze-vision", *STILL), True),
    "trained": ("bf16", (*TORCH, *STILL), True),
    "trained, 1,025 rows": ("bf16", (*TORCH, *STILL, *WIDE), True),
    "drop path": ("bf16", (*TORCH, "--projector-drop-path", "0.2", "--vision-drop-path", "0.2"), False),
    "tensorwise": ("fp8_tensorwise", (*TORCH, *STILL), True),
    "delayed": ("fp8_delayed", (*TORCH, *STILL), True),
}
"""Precision, arguments, and whether a graph draws the same numbers as steps without one (of drop path unknown)."""
TOKENIZER = GOLDEN / "data" / "tokenizers" / "qwen2_fast"


def arguments(precision: str) -> list[str]:
    """pretrain_vlm.py's arguments: LVTC and a further injection, static budgets, all that can be in `precision`."""
    words = argv(SIZE, "pvtc", 1, TOKENIZER)
    words += ["--precision", precision, "--transformer-impl", "transformer_engine", "--inject-layers", "3"]
    words += [
        "--boundary",
        "static",
        "--packing",
        "--loader",
        "energon",
        "--seq-length",
        "1024",
        "--shallow-seq-length",
        "512",
    ]
    words += ["--max-tiles-per-pack", "32", "--global-batch-size", "2", "--lr", "1e-3", "--min-lr", "1e-3"]
    # As in every recipe the first step's rate is 0. With delayed scaling that step has no history: its scales are 1,
    # under which small gradients vanish, and Adam's first update, of full size for any gradient, would follow them.
    words += ["--lr-warmup-iters", "1"]
    if precision != "bf16":
        # MXFP8 wants 32 rows per tile, and the first projector gives 16.
        projectors = [] if precision == "mxfp8" else ["projectors"]
        words += ["--fp8-parts", "decoder", "vision", *projectors]
    return words
