"""Record the results of a checkout, bit for bit, and compare them: proof of a change that must not alter any number.

    git worktree add ../before HEAD~1
    python tools/fingerprint.py --checkout ../before --out before.json
    python tools/fingerprint.py --against before.json

Recorded are five short runs on two CPU ranks (losses as exact floats), an export (SHA-256 of every file) and an import
(SHA-256 of every tensor). It takes some minutes. Exit codes: 0 recorded, or equal; 1 different, each difference is
printed; 2 a run failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # works without an installed package too
    sys.path.insert(0, str(ROOT))

HF_MODEL = "tests/golden/models/internlm2_tiny"

_DEMO = ["--recipe", "examples/demo/demo.yaml"]
_ONE_STAGE = ["--pipeline-model-parallel-size", "1"]
_SHORT = ["--train-iters", "10", "--lr-decay-iters", "10", "--lr-warmup-fraction", "0"]
_PACKED = [
    *("--loader", "energon", "--packing", "--micro-batch-size", "1", "--global-batch-size", "4"),
    *("--seq-length", "400", "--shallow-seq-length", "300", "--max-tiles-per-pack", "20"),
    *("--pack-buffer", "12", "--shuffle-buffer", "4", "--use-distributed-optimizer"),
]
_EXPERTS = [
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "64"),
    *("--moe-token-dispatcher-type", "alltoall", "--moe-router-load-balancing-type", "aux_loss"),
    *("--moe-aux-loss-coeff", "1e-2", "--expert-model-parallel-size", "2", "--loss-weighting", "sample"),
]
RUNS: dict[str, list[str]] = {
    "demo": [*_DEMO, "--train-iters", "50", "--lr-decay-iters", "50"],
    "virtual stages, static": [
        *(*_DEMO, *_SHORT, "--num-layers-per-virtual-pipeline-stage", "1", "--boundary", "static"),
        # One sample per micro-batch: several would share the static budgets, and might be cut to their shares.
        *("--micro-batch-size", "1", "--global-batch-size", "4"),
        *("--seq-length", "512", "--shallow-seq-length", "256", "--max-tiles-per-pack", "28"),
    ],
    "tensor and sequence parallel": [
        *(*_DEMO, *_SHORT, *_ONE_STAGE, "--tensor-model-parallel-size", "2", "--sequence-parallel"),
    ],
    "packed": [*_DEMO, *_SHORT, *_ONE_STAGE, *_PACKED],
    "experts": [*_DEMO, *_SHORT, *_ONE_STAGE, *_EXPERTS],
}


class RunFailed(Exception):
    """Error of a command with a nonzero exit code; the message contains the end of its output."""


def run(command: Sequence[str], checkout: Path) -> str:
    """Run a command of a checkout with this interpreter; returns its standard output."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, *command], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RunFailed(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def training_losses(checkout: Path, data: Path, save: Path, arguments: Sequence[str]) -> list[list[Any]]:
    """Run a short training; returns [step, loss] of every step, the loss as a hexadecimal float."""
    source = data / ("prepared" if "energon" in arguments else "meta.json")
    command = [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "pretrain_vlm.py"),
        *(*arguments, "--data", str(source), "--tokenizer-model", str(data / "tokenizer")),
        *("--save", str(save), "--save-interval", "1000", "--log-interval", "1", "--loader-workers", "0"),
    ]
    run(command, checkout)
    points = json.loads((save / "curve.json").read_text())["losses"]
    return [[step, float(loss).hex()] for step, loss in points]


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def hash_tensors(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a checkpoint, including type and shape; read by this checkout's code."""
    import torch

    from megatron_internvlx.checkpoint.torch_dist import CheckpointReader, checkpoint_folder, read_stored

    reader, found = CheckpointReader(checkpoint_folder(checkpoint)), {}
    for name, stored in sorted(reader.tensors.items()):
        tensor = read_stored(reader.folder, stored).contiguous()
        digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        found[name] = digest.hexdigest()
    return found


def fingerprint(checkout: Path, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of everything that is recorded."""
    with tempfile.TemporaryDirectory(prefix="fingerprint-") as folder:
        work = Path(folder)
        data = work / "data"
        run(["tools/make_demo_data.py", "--out", str(data), "--train", "200", "--val", "4"], checkout)
        run(["tools/prepare_data.py", str(data / "meta.json"), str(data / "prepared")], checkout)
        for name in names:
            save = work / name.replace(" ", "-").replace(",", "")
            yield f"losses: {name}", training_losses(checkout, data, save, RUNS[name])
            if name == "demo":
                export = ["export", "--load", str(save), "--hf", str(work / "hf"), "--quiet"]
                run(["tools/convert_checkpoint.py", *export], checkout)
                yield "export", hash_files(work / "hf")
        # Golden weights are stored as a recipe and a seed; this creates the files.
        run(["-c", "from tests import golden_weights; golden_weights.materialize()"], checkout)
        convert = ["import", "--hf", HF_MODEL, "--save", str(work / "imported"), "--quiet"]
        run(["tools/convert_checkpoint.py", *convert], checkout)
        yield "import", hash_tensors(work / "imported")


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Yield a line for every difference between two fingerprints."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            if key not in before or key not in after:
                yield f"{where}{key}: only {'after' if key in after else 'before'} the change"
            else:
                yield from differences(before[key], after[key], f"{where}{key}: ")
    elif before != after:
        yield (
            f"{where}{before} -> {after}"
            if not isinstance(before, list)
            else f"{where}{_first_difference(before, after)}"
        )


def _first_difference(before: list[Any], after: list[Any]) -> str:
    for one, other in zip(before, after, strict=False):
        if one != other:
            values = f"{float.fromhex(one[1]):.9g} -> {float.fromhex(other[1]):.9g}"
            return f"step {one[0]}: {values}"
    return f"{len(before)} -> {len(after)} steps"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkout", type=Path, default=ROOT, help="checkout to run (default: this one)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--against", type=Path, help="JSON file of an earlier record, to compare with")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), help="default: all")
    args = parser.parse_args(argv)
    if not (args.out or args.against):
        parser.error("set --out, --against or both")
    before = json.loads(args.against.read_text()) if args.against else None
    found = {}
    try:
        for name, value in fingerprint(args.checkout.resolve(), args.runs):
            found[name] = value
            print(f"{name}: {len(value)} recorded", flush=True)
    except RunFailed as error:
        print(f"fingerprint: {error}", file=sys.stderr)
        return 2
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    if before is None:
        return 0
    wrong = list(differences({name: before.get(name) for name in found}, found))
    print("\n".join(wrong) or f"equal, bit for bit: {', '.join(found)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
