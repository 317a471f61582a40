"""Check the layer and expert counts of a config.json against the tensors, before a table of them is built."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice

from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.model.sizes import ModelSizes

_DECODER = r"(?:model\.)?language_model\.(?:model\.)?layers\.(\d{1,9})\."
# Names of counted tensors; the last group is the number of the layer or expert.
_LAYERS = re.compile(_DECODER)
_EXPERTS = re.compile(_DECODER + r"mlp\.experts\.(\d{1,9})\.")
_VISION = re.compile(
    r"(?:vision_model\.encoder\.layers|(?:model\.)?vision_tower\.encoder\.layer)\.(\d{1,9})\."
)


def check_counts(sizes: ModelSizes, layout: str, names: Iterable[str]) -> None:
    """Check that config.json has as many layers and experts as the weights.

    Args:
        sizes: of config.json.
        layout: of the directory; see mapping.py.
        names: of its tensors.

    Raises:
        ConversionError: with both numbers and what to do.
    """
    decoder = "text_config" if layout.startswith("native") else "llm_config"
    names = list(names)
    for key, what, stated, pattern in (
        (f"{decoder}.num_hidden_layers", "decoder layers", sizes.layers, _LAYERS),
        ("vision_config.num_hidden_layers", "layers of the vision encoder", sizes.vision.num_layers, _VISION),
        (f"{decoder}.num_experts", "experts", sizes.experts, _EXPERTS),
    ):
        there = {int(match.groups()[-1]) for name in names if (match := pattern.match(name))}
        if len(there) == stated:
            continue
        lacking = list(islice((i for i in range(min(stated, len(there) + 10)) if i not in there), 10))
        absent = f" (without number {', '.join(map(str, lacking))})"
        few = absent if lacking and stated - len(there) <= 10 else ""
        raise ConversionError(
            f"config.json: {key} is {stated}, but the weights have {len(there)} {what}{few}: correct config.json, "
            "or complete the weights; both must be of the same model"
        )
