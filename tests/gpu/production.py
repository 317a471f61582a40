"""Command lines of whole training steps at small widths that FP8 admits, vision encoder and projectors included."""

from benchmarks.step_time import argv
from tests.golden_weights import GOLDEN

# 16x16 patches: 16 shallow and 64 deep tokens per tile. 257 rows per tile need tiles in multiples of 16.
SIZE = {
    "image": 224, "patch": 14, "vision_hidden": 256, "vision_layers": 2, "vision_heads": 4, "vision_ffn": 512,
    "hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 512, "vocab": 512, "expand": 2,
}  # fmt: skip
MICRO_BATCHES = [[(1, 64), (2, 32)], [(0, 96), (3, 48)]]
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
    if precision != "bf16":
        # MXFP8 wants 32 rows per tile, and the first projector gives 16.
        projectors = [] if precision == "mxfp8" else ["projectors"]
        words += ["--fp8-parts", "decoder", "vision", *projectors]
    return words
