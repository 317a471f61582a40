"""Run a converted model on given inputs in any layout, and compare its outputs with the original's.

`verify` runs in the caller: it reads the inputs, starts the ranks and gathers their results from a
folder. `run_rank` runs in each rank: it imports Megatron, builds its stage, loads the converted
weights and runs Megatron's own pipeline schedule.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import TCPStore

from megatron_internvlx.checkpoint.case import Case, check_case, load_case
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.export_plan import plan_export
from megatron_internvlx.checkpoint.importer import plan_import, recipe_of
from megatron_internvlx.checkpoint.mapping import Entry, vision_layer
from megatron_internvlx.checkpoint.request import GRADIENTS, RECIPE, Layout, Request
from megatron_internvlx.checkpoint.safetensors_io import WeightFiles
from megatron_internvlx.checkpoint.target import end_with_parent
from megatron_internvlx.files import atomic_path
from megatron_internvlx.model.sizes import model_sizes

MOST_RANKS = 256  # each loads PyTorch and Megatron, on one machine


def model_of(request: Request) -> tuple[dict[str, Any], list[Entry]]:
    """Read (arguments, table) of the model to run. Raises ConversionError."""
    if request.hf:
        weights = WeightFiles(Path(request.hf), allow_pickle=request.allow_pickle)
        plan = plan_import(Path(request.hf), weights, {})
        return recipe_of(plan, Path(request.hf)), [s.entry for s in plan.sources]
    assert request.load is not None
    exported = plan_export(Path(request.load))
    if exported.adapters and request.gradients:
        raise ConversionError(
            f"--grads: {request.load} holds adapters, and the weights under them have no gradients; verify its merged "
            "weights, which ivlx export --save writes"
        )
    return exported.weights.arguments, list(exported.entries)


_ARCHITECTURE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "group_query_attention",
    "num_query_groups", "kv_channels", "normalization", "swiglu", "add_bias_linear", "add_qkv_bias",
    "qk_layernorm", "position_embedding_type", "rotary_base", "use_rope_scaling", "rope_scaling_factor",
    "layernorm_epsilon", "max_position_embeddings", "vocab_size", "untie_embeddings_and_output_weights",
    "num_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_router_pre_softmax",
    "moe_token_dispatcher_type", "vision_preset", "image_size", "patch_size", "select_layer",
    "vision_overrides", "projector", "pixel_shuffle_version", "expand_layer", "inject_layers", "low_ratio",
    "high_ratio", "upsample", "lora_rank", "lora_alpha", "lora_targets", "lora_rslora",
)  # fmt: skip


def write_recipe(arguments: Mapping[str, Any], folder: Path) -> None:
    """Write the ranks' recipe: the architecture without randomness and auxiliary losses."""
    recipe = {name: arguments[name] for name in _ARCHITECTURE if arguments.get(name) is not None}
    if recipe.get("num_experts"):
        recipe["moe_aux_loss_coeff"] = [0.0]
    recipe |= {
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "projector_drop_path": 0.0,
        "seq_length": recipe["max_position_embeddings"],
        "tokenizer_model": "none",
        "data": "none",
        "train_iters": 1,
        "lr": 0.0,
        "calculate_per_token_loss": True,
    }
    (folder / RECIPE).write_text(yaml.safe_dump(recipe))


def start_ranks(request: Request, ranks: int) -> None:
    """Run `run_rank` in `ranks` new processes. Raises ConversionError with the first failure."""
    context = get_context("spawn")
    # This process serves the store and the ranks connect to it, as under torchrun: a port chosen here for rank 0
    # to serve on could be taken by another program while the rank imports Megatron.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, readers = [], []
    for rank in range(ranks):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_rank_process, args=(request, rank, ranks, store.port, writer))
        process.start()
        writer.close()  # otherwise the reader would not notice that a rank was killed
        processes.append(process)
        readers.append(reader)
    failure, waiting = None, dict(enumerate(readers))
    while waiting and not failure:
        ready = wait(list(waiting.values()))
        for rank in [rank for rank, reader in waiting.items() if reader in ready]:
            try:
                failure = failure or waiting.pop(rank).recv()
            except EOFError:
                failure = f"rank {rank} was killed, perhaps because memory was full: use fewer rows or tiles"
    for process in processes:
        if failure:
            process.terminate()
        process.join()
    if failure:
        raise ConversionError(failure)


def _rank_process(request: Request, rank: int, ranks: int, port: int, report: Any) -> None:
    end_with_parent()
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    try:
        from megatron_internvlx.checkpoint.verify_rank import run_rank

        run_rank(request)
    except ValueError as error:
        report.send(str(error))
    except BaseException:
        report.send(f"rank {rank} failed:\n{traceback.format_exc()}")
    else:
        report.send(None)


def check_ranks(layout: Layout, ranks: int) -> None:
    """Check the number of processes for a layout. Raises ConversionError."""
    if ranks > MOST_RANKS:
        raise ConversionError(f"{ranks} processes on one machine are too many: use at most {MOST_RANKS}")
    if ranks < layout.ranks or ranks % (layout.tensor * layout.pipeline):
        raise ConversionError(
            f"--nproc {ranks} for TP {layout.tensor} x PP {layout.pipeline}, EP {layout.expert}: must be at least "
            f"{layout.ranks} and a multiple of {layout.tensor * layout.pipeline}"
        )


@dataclass(frozen=True)
class Results:
    """Outputs and gradients of a model for a case."""

    tensors: dict[str, Tensor]
    """Outputs, and gradients under their Hugging Face names."""
    no_gradient: tuple[str, ...] = ()
    """Weights without a gradient: the vision encoder's layers above the selected hidden state."""


def gather(folder: Path, case: Case, entries: list[Entry], gradients: bool, *, vision_layers: int) -> Results:
    """Read the ranks' results, named as in the golden cases; only `vision_layers` of the encoder are run."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("part*.safetensors")):
        found |= load_file(path)
    if "logits" in found:
        rows = found["logits"]
        logits = torch.zeros((*case.input_ids.shape, rows.shape[-1]))
        logits[case.attention_mask.bool()] = rows
        found["logits"] = logits
    none: list[str] = []
    if gradients:
        ours = load_file(folder / GRADIENTS)
        for entry in entries:
            if (layer := vision_layer(entry.ours)) is not None and layer >= vision_layers:
                none += entry.theirs
                continue
            parts = entry.op.to_theirs(ours[entry.ours])
            found |= {name: part.contiguous() for name, part in zip(entry.theirs, parts, strict=True)}
    return Results(found, tuple(none))


def verify(request: Request, out: Path, *, ranks: int | None = None, start=start_ranks) -> Results:
    """Run the model on a case, and write and return its outputs.

    Args:
        request: model, inputs and layout; its folder is replaced by a temporary one.
        out: safetensors file for logits, loss, vit_last_hidden_state, projector_output, and gradients under
            their Hugging Face names.
        ranks: number of processes; None: the minimum of the layout.
        start: function that starts the ranks (a test uses its own).

    Raises:
        ConversionError: inputs, model and layout do not match, or a rank failed.
    """
    check_ranks(request.layout, ranks or request.layout.ranks)
    if out.exists():
        raise ConversionError(f"{out} exists already; remove it, or choose another name")
    case = load_case(Path(request.inputs))
    arguments, entries = model_of(request)
    check_case(case, arguments)
    out.parent.mkdir(parents=True, exist_ok=True)
    sizes = model_sizes(arguments)
    token = case.image_token(sizes.high_grid**2, request.image_token)
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        write_recipe(arguments, Path(folder))
        changed = replace(request, folder=folder, image_token=token)
        start(changed, ranks or request.layout.ranks)
        found = gather(Path(folder), case, entries, request.gradients, vision_layers=sizes.vision.layers_run)
    with atomic_path(out) as partial:
        save_file(found.tensors, partial, metadata={"format": "pt"})
    return found
