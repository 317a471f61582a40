"""`ivlx import`, `export` and `verify`: between Hugging Face directories and Megatron's checkpoints.

Imported checkpoints load into any layout and contain `recipe.yaml`, the arguments to train them. A result gets
its final name only when it is complete; the same command continues a killed conversion.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_internvlx.checkpoint.checks import check_model_directory
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.target import preload_workers
from megatron_internvlx.commands.convert_arguments import COMPRESSION, MAX_SHARD, PARSERS
from megatron_internvlx.commands.help import CommandParser
from megatron_internvlx.commands.values import parse_size
from megatron_internvlx.exit_codes import INTERRUPTED, MISTAKE

if TYPE_CHECKING:
    from megatron_internvlx.checkpoint.export_plan import ExportPlan


def parser(command: str = "") -> argparse.ArgumentParser:
    """Create the parser of `import`, `export` or `verify`; with "", one that names the three."""
    if command in PARSERS:
        return PARSERS[command]()
    it = CommandParser("import|export|verify", "Convert checkpoints, and verify the result.")
    it.add_argument("command", choices=tuple(PARSERS))
    return it


def run_import(options: argparse.Namespace) -> int:
    """Run the subcommand `import`; returns the exit code."""
    if options.peft:
        return _import_adapters(options)
    from megatron_internvlx.checkpoint.importer import import_checkpoint
    from megatron_internvlx.checkpoint.summary import import_summary

    changes = {name: getattr(options, name) for name in COMPRESSION if getattr(options, name) is not None}
    plan = import_checkpoint(
        options.hf, options.save, changes=changes, init_missing=options.init_missing, allow_pickle=options.allow_pickle,
        seed=options.seed, processes=options.processes, quiet=options.quiet,
    )  # fmt: skip
    lines = import_summary(plan, options.save, everything=options.list_tensors, compressed=bool(changes))
    print("\n".join(lines))
    return 0


def _import_adapters(options: argparse.Namespace) -> int:
    from megatron_internvlx.checkpoint.peft_import import import_peft
    from megatron_internvlx.checkpoint.peft_summary import peft_import_summary

    plan = import_peft(options.peft, options.save, options.base, seed=options.seed)
    print("\n".join(peft_import_summary(plan, options.save, options.base)))
    return 0


def run_export(options: argparse.Namespace) -> int:
    """Run the subcommand `export`; returns the exit code."""
    if options.peft:
        return _export_adapters(options)
    if options.save:
        return _merge(options)
    from megatron_internvlx.checkpoint.exporter import export_checkpoint
    from megatron_internvlx.checkpoint.remote_code import grid_rule, tokenizer_problem

    plan = export_checkpoint(
        options.load, options.hf, base=options.base, like=options.like, dtype=options.dtype,
        max_shard_size=options.max_shard_size, remote_code=options.remote_code, processes=options.processes,
        quiet=options.quiet,
    )  # fmt: skip
    lvtc = "LVTC" if plan.sizes.injection_layers else "no LVTC"
    kinds = {"chat": "released InternVL layout", "internvlx": f"with remote code ({lvtc})"}
    total = sum(info.nbytes for info in plan.tensors.values())
    kind = kinds.get(plan.layout, "transformers' InternVL layout")
    if problem := tokenizer_problem(options.hf):
        print(
            f"{options.hf} cannot be used yet: {problem}. Export again with --like and a directory with a suitable "
            f"tokenizer, or copy the files of one to {options.hf}"
        )
    print(f"{options.hf}: {len(plan.tensors)} tensors, {total / 1e9:.2f} GB, {kind}")
    print(f"images are cut into {grid_rule(plan.arguments)}")
    _print_rounding(plan)
    return 0


def _export_adapters(options: argparse.Namespace) -> int:
    from megatron_internvlx.checkpoint.peft_files import export_peft

    made = export_peft(
        options.load, options.peft, base=options.base, base_name=options.base_name, dtype=options.dtype,
        remote_code=options.remote_code,
    )  # fmt: skip
    lora, saved = made.plan.weights.lora, ", ".join(made.saved)
    print(
        f"{options.peft}: adapters of rank {lora.lora_rank} on {made.modules} modules"
        f"{f', and whole: {saved}' if saved else ''}, {made.size / 1e9:.3f} GB, for PEFT"
    )
    if not options.base_name:
        print(
            "adapter_config.json names no base: give --base-name, or load the exported base first, then the adapters"
        )
    return 0


def _merge(options: argparse.Namespace) -> int:
    from megatron_internvlx.checkpoint.merger import merge_checkpoint

    plan = merge_checkpoint(
        options.load, options.save, base=options.base, processes=options.processes, quiet=options.quiet
    )
    print(
        f"{options.save}: {len(plan.entries)} tensors, {len(plan.adapters)} with an adapter merged into them"
    )
    _print_rounding(plan)
    print(
        f"train on with --pretrained-checkpoint {options.save}, export with ivlx export --load {options.save}"
    )
    return 0


def _print_rounding(plan: ExportPlan) -> None:
    """Print what rounding lost of the adapters that were merged, if anything was."""
    if plan.rounding is not None and plan.rounding[1] > 0:
        name, share = plan.rounding
        print(
            f"merged in fp32, then rounded: that lost at most {share:.2%} of an adapter's change of a weight ({name}); "
            "PEFT's adapters are not rounded, nor is an export with --hf and --dtype float32"
        )


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
    made = {"import": ("save",), "export": ("hf", "peft", "save"), "verify": ("out",)}[options.command]
    target = next(path for path in (getattr(options, name) for name in made) if path)
    if os.path.lexists(target):
        raise ConversionError(f"{target} exists already; remove it, or choose another name")
    if options.command != "verify":
        _check_adapter_paths(options)
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


def _check_adapter_paths(options: argparse.Namespace) -> None:
    """Check the paths and options of adapters. Raises ConversionError."""
    base, peft = options.base, options.peft
    if base is not None and not base.is_dir():
        raise ConversionError(
            f"--base {base}: {'a file, not a directory' if base.exists() else 'no such directory'}"
        )
    if options.command == "export":
        if options.base_name and not peft:
            raise ConversionError("--base-name is for adapters: it needs --peft")
        ignored = {
            "--like": options.like is not None,
            "--max-shard-size": options.max_shard_size != parse_size(MAX_SHARD),
            "--remote-code": options.remote_code and options.save is not None,
        }
        if not options.hf and any(ignored.values()):
            flags = ", ".join(flag for flag, given in ignored.items() if given)
            raise ConversionError(
                f"{flags}: only a Hugging Face directory has that; leave it out without --hf"
            )
        if options.dtype and options.save:
            raise ConversionError(
                "--dtype: a merged checkpoint has the types of its base; leave it out with --save"
            )
        return
    if not peft:
        if base is not None:
            raise ConversionError(f"--base {base}: a whole model has no base; it belongs to --peft")
        return
    if base is None:
        raise ConversionError(f"--peft {peft}: adapters need --base, the checkpoint of the model under them")
    changed = [name for name in COMPRESSION if getattr(options, name) is not None]
    if changed or options.init_missing or options.allow_pickle:
        names = [*changed, *(name for name in ("init_missing", "allow_pickle") if getattr(options, name))]
        flags = ", ".join("--" + name.replace("_", "-") for name in names)
        raise ConversionError(f"{flags}: adapters have their base's model; leave it out with --peft")
    if not (peft / "adapter_config.json").is_file():
        raise ConversionError(f"--peft {peft}: no adapter_config.json in it")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else ""
    if command not in PARSERS:
        parser().parse_args(words)
        return MISTAKE  # not reached: it has no such choice
    options = parser(command).parse_args(words[1:], argparse.Namespace(command=command))
    run = {"import": run_import, "export": run_export, "verify": run_verify}[command]
    # Megatron warns at import about missing optional packages, which are not needed here.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    try:
        check_paths(options)
        if argv is None and not getattr(options, "quiet", False):
            loading = "PyTorch and Megatron" if command == "verify" else "PyTorch"
            print(f"ivlx {command}: loading {loading} ...", file=sys.stderr, flush=True)
        if argv is None and command != "verify" and options.processes > 1:
            merges = command == "export" and options.save
            preload_workers(f"megatron_internvlx.checkpoint.{'merg' if merges else command}er")
        return run(options)
    except ConversionError as error:
        print(f"ivlx {command}: {error}", file=sys.stderr)
        return MISTAKE
    except OSError as error:  # such as a missing permission
        print(f"ivlx {command}: {error.filename}: {error.strerror}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return INTERRUPTED
