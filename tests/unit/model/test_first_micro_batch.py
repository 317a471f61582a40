"""Weights in FP8 are cast once per step: every part of the model hears which micro-batch is the first."""

from tests.whole_model import whole_model  # isort: skip  (sets Megatron up)
from torch import nn

from megatron_internvlx.model.internvit_config import InternViTConfig

VISION = InternViTConfig(hidden_size=32, num_layers=1, num_heads=4, ffn_hidden_size=32, image_size=112)


def test_every_part_hears_of_the_first_micro_batch() -> None:
    """Transformer Engine's layers, for which the local ones stand here, keep their cast weight until told so."""
    model = whole_model(
        VISION,
        vocab_size=64,
        rotary_base=10000,
        compression={"injection_layers": (1,), "low_grid": 2},
        ffn_hidden_size=32,
    )
    parts = {"vision_model.", "projector.", "language_model.", ".injection."}
    marked: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
        and name.split(".")[-1].startswith("linear_")
    }
    for module in marked.values():
        module.is_first_microbatch = False  # type: ignore[assignment]
    model.config.fp8 = "hybrid"
    model.set_is_first_microbatch()
    assert all(module.is_first_microbatch for module in marked.values())
    assert all(any(part in f"{name}." for name in marked) for part in parts), marked.keys()
