"""Load a Hugging Face directory as a generating model, run by our remote code.

Directories exported with LVTC contain this code. For released InternVL and InternVL-X directories and for
exports without LVTC, the conversion table renames the tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.hf_config import model_config, read_config
from megatron_internvlx.checkpoint.hf_write import remote_code_config
from megatron_internvlx.checkpoint.importer import plan_import
from megatron_internvlx.checkpoint.mapping import output_names, table
from megatron_internvlx.checkpoint.remote_code import (
    generation_config,
    load_tokenizer,
    processor_settings,
    token_ids,
)
from megatron_internvlx.checkpoint.safetensors_io import WeightFiles
from megatron_internvlx.data.conversation import get_template
from megatron_internvlx.hf.configuration_internvlx import InternVLXConfig
from megatron_internvlx.hf.modeling_internvlx import InternVLXForConditionalGeneration
from megatron_internvlx.hf.processing_internvlx import InternVLXProcessor
from megatron_internvlx.model.sizes import model_sizes


def conversation_template(directory: Path) -> str:
    """Name of the chat template of an exported or released directory, without loading its weights."""
    found = model_config(read_config(directory), WeightFiles(directory))
    return found.arguments["conversation_template"]


def load_model(directory: Path, dtype: torch.dtype) -> tuple[Any, InternVLXProcessor, str]:
    """Load (model in evaluation mode on the host, processor, name of the chat template).

    Raises ConversionError for a directory that cannot be loaded.
    """
    from transformers import GenerationConfig

    weights = WeightFiles(directory)
    plan = plan_import(directory, weights, {})
    found = model_config(read_config(directory), weights)
    name = found.arguments["conversation_template"]
    ids = token_ids(directory, get_template(name))
    config = remote_code_config(found.arguments, found.family, found.tied, found.dtype, ids)
    with torch.device("meta"):
        model = InternVLXForConditionalGeneration(InternVLXConfig(**config))
    sizes = model_sizes(found.arguments)
    targets = {entry.ours: entry for entry in table(sizes, found.family, "internvlx")}
    tensors: dict[str, torch.Tensor] = {}
    for source in plan.sources:
        ours = source.entry.op.to_ours([weights.read(name) for name in source.entry.theirs])
        target = targets[source.entry.ours]
        for theirs, tensor in zip(target.theirs, target.op.to_theirs(ours), strict=True):
            tensors[theirs] = tensor.to(dtype).clone()
    if sizes.tied:
        head, embedding = output_names(found.family, "internvlx")
        tensors[head] = tensors[embedding]
    left = model.load_state_dict(tensors, assign=True, strict=False)
    if left.missing_keys or left.unexpected_keys:
        raise ConversionError(f"{directory}: {left}")
    model.generation_config = GenerationConfig(**generation_config(ids))
    processor = InternVLXProcessor(load_tokenizer(directory), **processor_settings(found.arguments, sizes))
    return model.eval(), processor, name
