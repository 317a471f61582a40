"""Convert checkpoints between Hugging Face directories and Megatron, and verify the result.

    python tools/convert_checkpoint.py import --hf DIR --save CKPT
    python tools/convert_checkpoint.py export --load CKPT --hf DIR
    python tools/convert_checkpoint.py verify --hf DIR --inputs CASE.safetensors --out OUT.safetensors

Imported checkpoints load into any layout and contain `recipe.yaml`, the arguments to train them. A result gets
its final name only when it is complete; the same command continues a killed conversion.

Exit codes: 0 done; 1 verify found a difference above the tolerance; 2 wrong arguments or files, with one
message and no incomplete output.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from megatron_internvlx.checkpoint.checks import check_model_directory
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.target import preload_workers
from megatron_internvlx.commands.values import float_in_range, int_in_range

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Parse a size such as '5GB' or '800MB'; returns bytes."""
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB|)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a size such as 5GB or 800MB")
    return int(match[1]) * _UNITS[match[2]]


def parser() -> argparse.ArgumentParser:
    """Create the parser of the command line."""
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = top.add_subparsers(dest="command", required=True)
    _import_parser(commands)
    _export_parser(commands)
    _verify_parser(commands)
    return top


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes", type=int_in_range(1), default=min(4, os.cpu_count() or 1),
        help="number of processes (default: one per core, at most four)",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _import_parser(commands: Any) -> None:
    it = commands.add_parser(
        "import", help="Hugging Face directory -> torch_dist checkpoint", allow_abbrev=False
    )
    it.add_argument("--hf", type=Path, required=True, help="directory with config.json and weights")
    it.add_argument("--save", type=Path, required=True, help="checkpoint directory to write")
    it.add_argument("--allow-pickle", action="store_true", help="read pytorch_model*.bin; trust their author")
    it.add_argument(
        "--init-missing", action="store_true",
        help="initialise projectors that are missing or of another kind in the directory, and list them",
    )  # fmt: skip
    it.add_argument(
        "--list-tensors", action="store_true",
        help="list every tensor that was initialised or not taken over (also in CKPT/hf/conversion.json)",
    )  # fmt: skip
    it.add_argument(
        "--seed",
        type=int_in_range(0),
        default=1234,
        help="random seed of initialised tensors (default: 1234)",
    )
    model = it.add_argument_group("compression of the new model (default: that of the directory)")
    model.add_argument("--projector", choices=("pvtc", "mlp"))
    model.add_argument(
        "--expand-layer", type=int_in_range(0, 65_536), help="LVTC: 0-based decoder layer of the expansion"
    )
    model.add_argument(
        "--inject-layers",
        type=int_in_range(0, 65_536),
        nargs="*",
        help="LVTC: further layers with a projection",
    )
    model.add_argument(
        "--low-ratio",
        type=float_in_range(0, 1, above=True),
        help="side ratio of tokens to patches before the expansion",
    )
    model.add_argument(
        "--high-ratio", type=float_in_range(0, 1, above=True), help="the same from the expansion on"
    )
    model.add_argument("--upsample", choices=("bilinear", "nearest"))
    _add_common_arguments(it)


def _export_parser(commands: Any) -> None:
    it = commands.add_parser(
        "export", help="torch_dist checkpoint -> Hugging Face directory", allow_abbrev=False
    )
    it.add_argument(
        "--load", type=Path, required=True, help="checkpoint directory, or one iteration's folder"
    )
    it.add_argument("--hf", type=Path, required=True, help="directory to write")
    it.add_argument(
        "--like", type=Path,
        help="directory with a tokenizer and, after an import, the original's other files "
        "(default: CKPT/hf, or the tokenizer used in training)",
    )  # fmt: skip
    it.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="type of the weights (default: the original's, or that of training)",
    )  # fmt: skip
    it.add_argument(
        "--max-shard-size",
        type=parse_size,
        default=parse_size("5GB"),
        help="maximum size of a weight file (default: 5GB)",
    )
    _add_common_arguments(it)


def _verify_parser(commands: Any) -> None:
    it = commands.add_parser("verify", help="run the Megatron model on given inputs", allow_abbrev=False)
    source = it.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf", type=Path, help="Hugging Face directory, converted while loading")
    source.add_argument("--load", type=Path, help="checkpoint")
    it.add_argument(
        "--inputs", type=Path, required=True,
        help="safetensors: pixel_values, input_ids, labels, attention_mask, image_flags, and expected values "
        "(or CASE.outputs.safetensors and CASE.grads.safetensors next to CASE.inputs.safetensors)",
    )  # fmt: skip
    it.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    it.add_argument("--tensor-model-parallel-size", type=int_in_range(1), default=1)
    it.add_argument("--pipeline-model-parallel-size", type=int_in_range(1), default=1)
    it.add_argument("--expert-model-parallel-size", type=int_in_range(1), default=1)
    it.add_argument("--pipeline-model-parallel-layout", help="Megatron's layout string, such as 'Et|ttL'")
    it.add_argument("--num-virtual-stages-per-pipeline-rank", type=int_in_range(1))
    it.add_argument("--sequence-parallel", action="store_true")
    it.add_argument(
        "--nproc", type=int_in_range(1), help="number of processes (default: minimum of the layout)"
    )
    it.add_argument(
        "--grads", action="store_true", help="compute gradients of the loss too, under Hugging Face names"
    )
    it.add_argument(
        "--image-token-id",
        type=int_in_range(0),
        help="id of the image placeholder (default: found in the ids)",
    )
    it.add_argument(
        "--tolerance",
        type=float_in_range(0),
        default=1e-4,
        help="largest absolute difference (default: 1e-4)",
    )
    it.add_argument("--allow-pickle", action="store_true", help="read pytorch_model*.bin; trust their author")


def run_import(options: argparse.Namespace) -> int:
    """Run the subcommand `import`; returns the exit code."""
    from megatron_internvlx.checkpoint.importer import import_checkpoint
    from megatron_internvlx.checkpoint.summary import import_summary

    names = ("projector", "expand_layer", "inject_layers", "low_ratio", "high_ratio", "upsample")
    changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    plan = import_checkpoint(
        options.hf, options.save, changes=changes, init_missing=options.init_missing, allow_pickle=options.allow_pickle,
        seed=options.seed, processes=options.processes, quiet=options.quiet,
    )  # fmt: skip
    lines = import_summary(plan, options.save, everything=options.list_tensors, compressed=bool(changes))
    print("\n".join(lines))
    return 0


def run_export(options: argparse.Namespace) -> int:
    """Run the subcommand `export`; returns the exit code."""
    from megatron_internvlx.checkpoint.exporter import export_checkpoint
    from megatron_internvlx.checkpoint.remote_code import tokenizer_problem

    plan = export_checkpoint(
        options.load, options.hf, like=options.like, dtype=options.dtype, max_shard_size=options.max_shard_size,
        processes=options.processes, quiet=options.quiet,
    )  # fmt: skip
    kinds = {"chat": "released InternVL layout", "internvlx": "with remote code (LVTC)"}
    total = sum(info.nbytes for info in plan.tensors.values())
    kind = kinds.get(plan.layout, "transformers' InternVL layout")
    if problem := tokenizer_problem(options.hf):
        print(
            f"{options.hf} cannot be used yet: {problem}. Export again with --like and a directory with a suitable "
            f"tokenizer, or copy the files of one to {options.hf}"
        )
    print(f"{options.hf}: {len(plan.tensors)} tensors, {total / 1e9:.2f} GB, {kind}")
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """Run the subcommand `verify`; returns the exit code."""
    from megatron_internvlx.checkpoint.case import compare, load_case
    from megatron_internvlx.checkpoint.request import Layout, Request
    from megatron_internvlx.checkpoint.verify import verify

    layout = Layout(
        options.tensor_model_parallel_size, options.pipeline_model_parallel_size, options.expert_model_parallel_size,
        options.pipeline_model_parallel_layout, options.num_virtual_stages_per_pipeline_rank,
        ("--sequence-parallel",) if options.sequence_parallel else (),
    )  # fmt: skip
    request = Request(
        "", str(options.inputs), layout, options.grads, options.image_token_id,
        hf=str(options.hf) if options.hf else None, load=str(options.load) if options.load else None,
        allow_pickle=options.allow_pickle,
    )  # fmt: skip
    results = verify(request, options.out, ranks=options.nproc)
    found = results.tensors
    print(f"{options.out}: {len(found)} tensors")
    if "loss" in found:
        print(f"loss {float(found['loss'][0]):.6f}")
    if results.no_gradient:
        print(
            f"{len(results.no_gradient)} weights have no gradient: they are in layers of the vision encoder above "
            f"its selected hidden state, which are not run ({results.no_gradient[0]}, ...)"
        )
    case = load_case(options.inputs)
    differences = compare(case, found, results.no_gradient)
    compared = {difference.name for difference in differences}
    left = sorted(name for name in case.expected if name not in compared)
    if left:
        grads = "" if options.grads else "; use --grads for gradients"
        print(f"{len(left)} expected tensors are not computed: {', '.join(left[:5])}{grads}")
    return _report(differences, options.tolerance) if differences else 0


def _report(differences: list, tolerance: float) -> int:
    outputs = ("logits", "loss", "vit_last_hidden_state", "projector_output")
    worst_first = sorted(differences, key=lambda d: -d.worst)
    shown = [d for d in worst_first if d.name in outputs]
    shown += [d for d in worst_first if d.name not in outputs][:5]
    width = max(len(d.name) for d in shown)
    print(f"{'':{width}}  {'worst difference':>16}  {'largest value':>13}")
    for d in shown:
        print(f"{d.name:{width}}  {d.worst:16.2e}  {d.largest:13.3g}")
    over = [d for d in differences if d.worst > tolerance]
    verdict = f"{len(over)} of {len(differences)} tensors differ by more than {tolerance:g}"
    print(verdict if over else f"all {len(differences)} expected tensors agree within {tolerance:g}")
    return 1 if over else 0


def check_paths(options: argparse.Namespace) -> None:
    """Check, before PyTorch is loaded, that inputs exist and outputs do not. Raises ConversionError."""
    made = {"import": "save", "export": "hf", "verify": "out"}[options.command]
    target = getattr(options, made)
    if os.path.lexists(target):
        raise ConversionError(f"{target} exists already; remove it, or choose another name")
    if options.command != "export" and options.hf:
        check_model_directory("--hf", options.hf)
    if options.command != "import" and options.load and not options.load.is_dir():
        what = "a file, not a directory" if options.load.exists() else "no such directory"
        raise ConversionError(f"--load {options.load}: {what}")
    if options.command == "verify" and not options.inputs.is_file():
        what = "not a file" if options.inputs.exists() else "no such file"
        raise ConversionError(f"--inputs {options.inputs}: {what}")
    if options.command == "export" and options.like is not None and not options.like.is_dir():
        raise ConversionError(f"--like {options.like}: no such directory")


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    options = parser().parse_args(argv)
    run = {"import": run_import, "export": run_export, "verify": run_verify}[options.command]
    try:
        check_paths(options)
        if argv is None and not getattr(options, "quiet", False):
            loading = "PyTorch and Megatron" if options.command == "verify" else "PyTorch"
            print(
                f"convert_checkpoint.py {options.command}: loading {loading} ...", file=sys.stderr, flush=True
            )
        if argv is None and options.command != "verify" and options.processes > 1:
            preload_workers(f"megatron_internvlx.checkpoint.{options.command}er")
        return run(options)
    except ConversionError as error:
        print(f"convert_checkpoint.py {options.command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # such as a missing permission
        print(f"convert_checkpoint.py {options.command}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
