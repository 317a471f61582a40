"""Counts of a config.json against the tensors beside it, before anything is made of so many layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice

from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.model.sizes import ModelSizes

_DECODER = r"(?:model\.)?language_model\.(?:model\.)?layers\.(\d{1,9})\."
# What is counted: (key of config.json, a word for it, the numbers in the names of tensors).
_LAYERS = re.compile(_DECODER)
_EXPERTS = re.compile(_DECODER + r"mlp\.experts\.(\d{1,9})\.")
_VISION = re.compile(
    r"(?:vision_model\.encoder\.layers|(?:model\.)?vision_tower\.encoder\.layer)\.(\d{1,9})\."
)


def check_counts(sizes: ModelSizes, layout: str, names: Iterable[str]) -> None:
    """Layers of decoder and encoder, and experts, are as many as the weights have.

    Args:
        sizes: of config.json.
        layout: of the directory; see mapping.py.
        names: of its tensors.

    Raises:
        ConversionError: with both numbers and what to do.
    """
    decoder = "text_config" if layout.startswith("native") else "llm_config"
    names = list(names)
    for key, what, said, pattern in (
        (f"{decoder}.num_hidden_layers", "decoder layers", sizes.layers, _LAYERS),
        ("vision_config.num_hidden_layers", "layers of the vision encoder", sizes.vision.num_layers, _VISION),
        (f"{decoder}.num_experts", "experts", sizes.experts, _EXPERTS),
    ):
        there = {int(match.groups()[-1]) for name in names if (match := pattern.match(name))}
        if len(there) == said:
            continue
        lacking = list(islice((i for i in range(min(said, len(there) + 10)) if i not in there), 10))
        absent = f" (number {', '.join(map(str, lacking))} {'is' if len(lacking) == 1 else 'are'} not)"
        few = absent if lacking and said - len(there) <= 10 else ""
        raise ConversionError(
            f"config.json: {key} is {said}, and {len(there)} {what} are among the weights{few}: correct config.json, "
            "or complete the weights; both must be of the same model"
        )
