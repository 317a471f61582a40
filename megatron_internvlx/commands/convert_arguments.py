"""Arguments of `ivlx import`, `export` and `verify`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_internvlx.commands.help import CommandParser
from megatron_internvlx.commands.values import float_in_range, int_in_range, parse_size
from megatron_internvlx.exit_codes import DONE, FAILED, INTERRUPTED, MISTAKE

CONTINUES = "The result gets its name when it is complete; the same command continues one that was killed."
EXITS = {
    DONE: "done",
    MISTAKE: "wrong arguments or files, with one message and no incomplete output",
    INTERRUPTED: "Ctrl-C; the same command continues",
}


def _add_common_arguments(it: argparse.ArgumentParser) -> None:
    work = it.add_argument_group("Work")
    work.add_argument(
        "--processes", type=int_in_range(1), default=min(4, os.cpu_count() or 1),
        help="number of processes: one per core, at most four",
    )  # fmt: skip
    work.add_argument("--quiet", action="store_true", help="no progress bar")


def _import_parser() -> argparse.ArgumentParser:
    it = CommandParser(
        "import",
        "Convert a Hugging Face directory, or adapters of PEFT, to a checkpoint that training starts from, in any "
        "layout.",
        about=f"{CONTINUES} CKPT/recipe.yaml has the model's arguments, and settings to fine-tune it.",
        examples=(
            "hf download OpenGVLab/InternVL2-8B --local-dir InternVL2-8B   # a hub's name is not a directory",
            "ivlx import --hf InternVL2-8B --save imported --projector pvtc --expand-layer 10 \\",
            "    --inject-layers 16 --init-missing                         # new compressors for an InternVL",
            "ivlx import --peft adapter --base imported --save lora        # adapters, to train on",
        ),
        exits=EXITS,
    )
    source = it.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf", type=Path, metavar="DIR", help="directory with config.json and weights")
    source.add_argument(
        "--peft", type=Path, metavar="DIR", help="directory with adapter_config.json: adapters of PEFT"
    )
    add = it.add_argument
    add("--base", type=Path, metavar="CKPT", help="with --peft: checkpoint of the model under the adapters")
    add("--save", type=Path, metavar="CKPT", required=True, help="checkpoint directory to write")
    add("--allow-pickle", action="store_true", help="read pytorch_model*.bin; trust their author")
    add("--init-missing", action="store_true",
        help="initialise projectors that are missing or of another kind in the directory, and list them")  # fmt: skip
    add("--list-tensors", action="store_true",
        help="list every tensor that was initialised or not taken over (also in CKPT/hf/conversion.json)")  # fmt: skip
    add("--seed", type=int_in_range(0), default=1234, help="random seed of initialised tensors")
    add = it.add_argument_group("Compression of the new model (unset: that of the directory)").add_argument
    add("--projector", choices=("pvtc", "mlp"), help="projector of the visual tokens")
    layer = int_in_range(0, 65_536)
    add("--expand-layer", type=layer, help="LVTC: 0-based decoder layer of the expansion")
    add("--inject-layers", type=layer, nargs="*", help="LVTC: further layers with a projection")
    share = float_in_range(0, 1, above=True)
    add("--low-ratio", type=share, help="side ratio of tokens to patches before the expansion")
    add("--high-ratio", type=share, help="the same from the expansion on")
    add("--upsample", choices=("bilinear", "nearest"), help="LVTC: enlargement of the grid of tokens")
    _add_common_arguments(it)
    return it


def _export_parser() -> argparse.ArgumentParser:
    it = CommandParser(
        "export",
        "Convert a checkpoint to a Hugging Face directory, for AutoModel, AutoProcessor and generate; adapters are "
        "merged into their base, or written for PEFT.",
        about=CONTINUES,
        examples=(
            "ivlx export --load runs/demo/checkpoints --hf demo-model",
            "ivlx export --load stage2/iter_0004000 --hf InternVL-X-8B --dtype bfloat16",
            "ivlx export --load lora --peft adapter            # adapters alone (--hf: merged into their base)",
            "ivlx export --load lora --save merged             # merged, to train on",
        ),
        exits=EXITS,
    )
    add = it.add_argument
    add(
        "--load",
        type=Path,
        metavar="CKPT",
        required=True,
        help="checkpoint directory, or one iteration's folder",
    )
    made = it.add_mutually_exclusive_group(required=True)
    made.add_argument(
        "--hf", type=Path, metavar="DIR", help="directory to write; adapters are merged into their base"
    )
    made.add_argument("--peft", type=Path, metavar="DIR", help="directory to write: adapters alone, for PEFT")
    made.add_argument(
        "--save", type=Path, metavar="CKPT", help="checkpoint to write: adapters merged into their base"
    )
    add("--base", type=Path, metavar="CKPT",
        help="checkpoint of the base of adapters (unset: where it was in training)")  # fmt: skip
    add("--base-name", metavar="NAME",
        help="with --peft: directory of the exported base, or its name on a hub, for adapter_config.json")  # fmt: skip
    add("--like", type=Path, metavar="DIR",
        help="directory with a tokenizer and, after an import, the original's other files "
        "(unset: CKPT/hf, or the tokenizer used in training)")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="type of the weights (unset: the original's, or that of training)")  # fmt: skip
    add("--remote-code", action="store_true",
        help="without LVTC too, write our names and code, for transformers serve and our vLLM plugin")  # fmt: skip
    add("--max-shard-size", type=parse_size, metavar="SIZE", default=MAX_SHARD, help="largest weight file")
    _add_common_arguments(it)
    return it


def _verify_parser() -> argparse.ArgumentParser:
    it = CommandParser(
        "verify",
        "Run the Megatron model on given inputs, and compare it with the expected outputs.",
        examples=(
            "ivlx verify --hf InternVL2-8B --inputs CASE.safetensors --out OUT.safetensors",
            "ivlx verify --load imported --inputs CASE.safetensors --out OUT.safetensors \\",
            "    --tensor-model-parallel-size 2 --grads",
        ),
        exits={DONE: "done", FAILED: "a difference above the tolerance", MISTAKE: EXITS[MISTAKE]},
    )
    source = it.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--hf", type=Path, metavar="DIR", help="Hugging Face directory, converted while loading"
    )
    source.add_argument("--load", type=Path, metavar="CKPT", help="checkpoint")
    add = it.add_argument
    add("--inputs", type=Path, metavar="FILE", required=True,
        help="safetensors: pixel_values, input_ids, labels, attention_mask, image_flags, and expected values "
        "(or CASE.outputs.safetensors and CASE.grads.safetensors next to CASE.inputs.safetensors)")  # fmt: skip
    add("--out", type=Path, metavar="FILE", required=True, help="safetensors file to write")
    add("--grads", action="store_true", help="compute gradients of the loss too, under Hugging Face names")
    add("--tolerance", type=float_in_range(0), default=1e-4, help="largest absolute difference")
    add(
        "--image-token-id", type=int_in_range(0), help="id of the image placeholder (unset: found in the ids)"
    )
    add("--allow-pickle", action="store_true", help="read pytorch_model*.bin; trust their author")
    add = it.add_argument_group("Layout").add_argument
    for kind, name in (("tensor", "TP"), ("pipeline", "PP"), ("expert", "EP")):
        add(f"--{kind}-model-parallel-size", type=int_in_range(1), default=1, help=f"{name}: number of ranks")
    add("--pipeline-model-parallel-layout", help="Megatron's layout string, such as 'Et|ttL'")
    add("--num-virtual-stages-per-pipeline-rank", type=int_in_range(1), help="model chunks per pipeline rank")
    add("--sequence-parallel", action="store_true", help="split the rows between layers over the TP ranks")
    add("--nproc", type=int_in_range(1), help="number of processes (unset: the fewest that the layout needs)")
    return it


MAX_SHARD = "5GB"
"""Largest weight file, as it is typed."""
COMPRESSION = ("projector", "expand_layer", "inject_layers", "low_ratio", "high_ratio", "upsample")
PARSERS = {"import": _import_parser, "export": _export_parser, "verify": _verify_parser}
