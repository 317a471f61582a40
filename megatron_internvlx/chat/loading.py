"""The model of a chat: a Hugging Face directory, or a checkpoint that is exported first."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_internvlx import platform
from megatron_internvlx.chat.session import About, Chat
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.export_plan import plan_export
from megatron_internvlx.checkpoint.exporter import export_checkpoint
from megatron_internvlx.checkpoint.remote_code import tokenizer_problem
from megatron_internvlx.data.conversation import get_template
from megatron_internvlx.evaluation.hf_model import load_model
from megatron_internvlx.files import checkpoint_directory


@dataclass(frozen=True)
class Source:
    """Model of a chat, and how it is loaded."""

    directory: Path
    """Hugging Face directory, checkpoint directory, or the folder of one iteration."""
    iteration: int | None = None
    """Iteration of a checkpoint directory; None: the latest."""
    tokenizer_model: Path | None = None
    """Directory of a tokenizer for a checkpoint; None: that of its training."""
    keep: Path | None = None
    """Directory to write a checkpoint's export to; None: a temporary one."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """Type of the weights; auto: bfloat16 on a GPU, float32 on a CPU."""
    max_tiles: int | None = None
    """Tiles of a prompt's pictures; None: as in training."""


def load_chat(source: Source, report: Callable[[str], None] = lambda line: None) -> Chat:
    """Load a model for a chat.

    Args:
        source: model and options.
        report: called with a line before each slow step.

    Raises ValueError (ConversionError) with the remedy; nothing is left of a temporary export.
    """
    start = time.perf_counter()
    device, dtype = _place(source)
    if (source.directory / "config.json").is_file():
        report(f"loading {source.directory} ...")
        model, processor, template = load_model(source.directory, dtype)
        where = str(source.directory)
    else:
        model, processor, template, where = _load_checkpoint(source, dtype, report)
    if source.max_tiles is not None:
        processor.max_tiles = source.max_tiles
        processor.min_tiles = min(processor.min_tiles, source.max_tiles)
    model = model.to(device)
    about = _about(model, processor, template, where, time.perf_counter() - start)
    return Chat(model, processor, about)


def _place(source: Source) -> tuple[torch.device, torch.dtype]:
    """Device and type of the weights. Raises ValueError if there is no GPU."""
    found = platform.device()
    if source.device == "cuda" and found.type != "cuda":
        raise ValueError("--device cuda: PyTorch finds no GPU here; leave the option out to use the CPU")
    device = torch.device("cpu") if source.device == "cpu" else found
    name = source.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return device, getattr(torch, name)


def _load_checkpoint(
    source: Source, dtype: torch.dtype, report: Callable[[str], None]
) -> tuple[Any, Any, str, str]:
    """(model, processor, template, description of the checkpoint), through an export."""
    load = source.directory
    if source.iteration is not None:
        load = checkpoint_directory(load, source.iteration)
        if not load.is_dir():
            raise ValueError(f"--iteration {source.iteration}: {load}: no such directory")
    plan = plan_export(load, like=source.tokenizer_model)
    if plan.side is None:
        trained = plan.arguments.get("tokenizer_model")
        raise ValueError(
            f"{load}: its tokenizer{f' {trained}' if trained else ''} is not found from here: set "
            "--tokenizer-model to the tokenizer's directory"
        )
    if problem := tokenizer_problem(plan.side):
        raise ValueError(f"{plan.side}: {problem}; set --tokenizer-model to another directory")
    where = f"{load}, iteration {plan.iteration}" if plan.iteration else str(load)
    report(f"converting {where} ...")
    with tempfile.TemporaryDirectory(prefix="ivlx-chat-") as folder:
        target = source.keep or Path(folder) / (source.directory.absolute().name or "model")
        # One process: the weights are read once more at once, and workers would take seconds to start.
        export_checkpoint(load, target, like=source.tokenizer_model, processes=1, quiet=True)
        try:
            model, processor, template = load_model(target, dtype)
        except ConversionError as error:
            raise ValueError(f"{where}: the export cannot be loaded: {error}") from error
    return model, processor, template, where


def _about(model: Any, processor: Any, template: str, where: str, seconds: float) -> About:
    config = model.config
    layers = config.injection_layers
    weight = next(model.parameters())
    return About(
        name="InternVL-X" if layers or config.compression["projector"] == "pvtc" else "InternVL",
        source=where,
        template=template,
        system=get_template(template).system,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(weight.dtype).removeprefix("torch."),
        device=platform.device_name() if weight.device.type == "cuda" else "CPU",
        layers=config.llm_config.num_hidden_layers,
        expand_layer=layers[0] if layers else None,
        shallow_per_tile=config.low_grid**2,
        deep_per_tile=config.high_grid**2,
        tile_size=processor.tile_size,
        max_tiles=processor.max_tiles if processor.dynamic_image_size else 1,
        rvtc=processor.rvtc,
        max_tokens=config.llm_config.max_position_embeddings,
        seconds=seconds,
    )
