"""Trackers of a run (MLflow, TensorBoard), and the values that they get."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform as machine
import socket
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from megatron_internvlx.config import SETTINGS, RunSettings, settings_from
from megatron_internvlx.megatron_settings import CheckpointFiles, Loop, Parallelism
from megatron_internvlx.parallel.layout import layout_name


class Sink(Protocol):
    """Receiver of a run's measurements. No method may raise or wait for anything outside this process."""

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log values of a training step; None is left out."""

    def artifact(self, path: str | Path) -> None:
        """Store a file of the run."""

    def close(self, status: str, seconds: float = 60.0) -> None:
        """End the run as FINISHED, FAILED, KILLED or SCHEDULED; waits at most `seconds`."""


class TensorboardSink:
    """Our values in Megatron's TensorBoard files, as `internvlx/NAME`, without those that Megatron writes itself."""

    def __init__(self, writer: Callable[[], Any] | None = None) -> None:
        self._writer = writer or _megatron_writer

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log values of a training step; None is left out."""
        writer = self._writer()
        if writer is None:
            return
        for name, value in values.items():
            if value is not None and name not in IN_MEGATRONS_TENSORBOARD:
                writer.add_scalar(f"internvlx/{name}", value, step)

    def artifact(self, path: str | Path) -> None:
        """Nothing: TensorBoard has no files of a run."""

    def close(self, status: str, seconds: float = 60.0) -> None:
        """Write what is buffered."""
        if (writer := self._writer()) is not None:
            with contextlib.suppress(OSError):  # a full disk, for instance
                writer.flush()


IN_MEGATRONS_TENSORBOARD = ("loss", "learning_rate", "grad_norm", "validation_loss", "validation_accuracy")
"""Our names of what Megatron writes under its own."""


def _megatron_writer() -> Any:
    """Megatron's writer, which it creates when `pretrain` begins; None before, and without tensorboard."""
    from megatron.training import global_vars

    return global_vars._GLOBAL_TENSORBOARD_WRITER


# Megatron's arguments that make runs comparable; all of them are in the artifact arguments.json.
_NAMED = """
num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups num_experts moe_router_topk
seq_length micro_batch_size global_batch_size train_iters lr min_lr lr_decay_style lr_warmup_fraction
weight_decay clip_grad adam_beta1 adam_beta2 seed bf16 fp8 fp8_recipe transformer_impl
recompute_granularity recompute_method recompute_num_layers tensor_model_parallel_size
pipeline_model_parallel_size virtual_pipeline_model_parallel_size pipeline_model_parallel_layout
expert_model_parallel_size sequence_parallel use_distributed_optimizer data_parallel_size world_size
""".split()  # noqa: SIM905


def parameters(args: argparse.Namespace) -> dict[str, str]:
    """Our settings and Megatron's of `_NAMED`, as text by name."""
    ours = [name for settings in SETTINGS for name in settings.__dataclass_fields__]
    return {name: str(getattr(args, name, None)) for name in [*ours, *_NAMED]}


def environment() -> dict[str, str]:
    """Tags of a run: versions, host, SLURM job."""
    tags = {"host": socket.gethostname(), "python": machine.python_version()}
    for package in ("torch", "megatron-core", "transformer-engine", "megatron-energon"):
        try:
            tags[package] = version(package)
        except PackageNotFoundError:
            continue
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT"):
        if name in os.environ:
            tags[name.lower()] = os.environ[name]
    return tags


def sinks(args: argparse.Namespace, folder: Path) -> list[Sink]:
    """Create the sinks that the arguments ask for, with their files in `folder`; call it on the rank that logs."""
    found: list[Sink] = [TensorboardSink()] if settings_from(args, Loop).tensorboard_dir else []
    experiment = settings_from(args, RunSettings).mlflow_experiment
    if not experiment:
        return found
    from megatron_internvlx.reporting.mlflow_sink import MlflowSink, RunInfo, git_state

    layout = layout_name(settings_from(args, Parallelism))
    tags = environment() | {"layout": layout} | git_state(Path(__file__).parents[2])
    save = settings_from(args, CheckpointFiles).save
    info = RunInfo(
        experiment,
        Path(save).name if save else None,
        parameters(args),
        tags,
        {"arguments.json": json.dumps({k: str(v) for k, v in sorted(vars(args).items())}, indent=1)},
    )
    return [*found, MlflowSink(info, folder)]


class Trackers:
    """All sinks of a run on the last rank, where losses are known; no sinks on the others."""

    def __init__(self, args: argparse.Namespace) -> None:
        # Beside the checkpoints, or in the working directory where these go to a URL.
        self._folder = settings_from(args, CheckpointFiles).save_folder or Path()
        self.sinks = sinks(args, self._folder) if settings_from(args, Parallelism).is_last_rank else []
        self._tracked = bool(settings_from(args, RunSettings).mlflow_experiment)

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log values of a training step; None is left out."""
        for sink in self.sinks:
            sink.metrics(step, values)

    def artifacts(self, paths: Iterable[str]) -> None:
        """Store files of the run."""
        for sink in self.sinks:
            for path in paths:
                sink.artifact(path)

    def close(self, status: str, only_here: bool = False) -> None:
        """Record the end of the run.

        Args:
            status: FINISHED, FAILED, KILLED, or SCHEDULED if another start continues the run.
            only_here: whether no other rank knows. Then a rank without sinks writes to MLflow itself, because the
                rank that has them may be killed before it does.
        """
        sinks, self.sinks = self.sinks, []
        for sink in sinks:
            # A rank that failed has little time until its launcher ends it; after Ctrl-C a person waits.
            sink.close(status, seconds={"FAILED": 15.0, "KILLED": 8.0}.get(status, 60.0))
        if only_here and status == "FAILED" and not sinks and self._tracked:
            from megatron_internvlx.reporting.mlflow_sink import mark_failed

            mark_failed(self._folder)
