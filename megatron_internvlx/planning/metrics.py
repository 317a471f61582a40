"""MFU: how much of the machine's peak the training of useful tokens reaches."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from megatron_internvlx.data.plan import SequencePlan
from megatron_internvlx.model.sizes import ModelSizes, model_sizes
from megatron_internvlx.planning.flops import (
    BackwardSettings,
    PlanStats,
    TrainingFlops,
    forward_flops,
    training_flops,
)

TERA = 1e12

# Dense peaks in TFLOP/s, from NVIDIA's data sheets (which print FP8, and from H100 on BF16, with
# sparsity: twice as much). The first row whose words are all in the device's name counts.
_PEAKS: tuple[tuple[tuple[str, ...], dict[str, float]], ...] = (
    (("GB200",), {"bf16": 2500.0, "fp8": 5000.0}),
    (("B200",), {"bf16": 2250.0, "fp8": 4500.0}),
    (("H200", "NVL"), {"bf16": 835.5, "fp8": 1670.5}),
    (("H200",), {"bf16": 989.4, "fp8": 1978.9}),
    (("GH200",), {"bf16": 989.4, "fp8": 1978.9}),
    (("H100", "NVL"), {"bf16": 835.5, "fp8": 1670.5}),
    (("H100", "PCIE"), {"bf16": 756.0, "fp8": 1513.0}),
    (("H100",), {"bf16": 989.4, "fp8": 1978.9}),
    (("A100",), {"bf16": 312.0}),
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak of one device, in FLOP/s; None for a device or type that the table lacks (a CPU).

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        dtype: "bf16" or "fp8", the type of most matrix products.
    """
    words = device_name.upper().replace("-", " ").split()
    for wanted, peaks in _PEAKS:
        if all(word in words for word in wanted):
            peak = peaks.get(dtype)
            return None if peak is None else peak * TERA
    return None


def mfu(flops: float, seconds: float, devices: int, peak: float | None) -> float | None:
    """Share of the peak that `devices` devices reach with `flops` in `seconds`; None for an unknown peak."""
    if not peak or seconds <= 0:
        return None
    return flops / (seconds * devices * peak)


@dataclass(frozen=True)
class Interval:
    """Work of one data-parallel replica between two log lines."""

    micro_batches: int
    useful: PlanStats
    """Real tiles and rows."""
    padded: PlanStats
    """All computed tiles and rows: blank tiles and padding rows included."""
    useful_flops: TrainingFlops
    padded_flops: TrainingFlops

    @property
    def model_flops(self) -> int:
        """FLOPs that MFU counts: forward and backward of useful rows and tiles, nothing twice."""
        return self.useful_flops.model

    @property
    def hardware_flops(self) -> int:
        """FLOPs that the devices ran: padding and recomputation included."""
        return self.padded_flops.hardware

    @property
    def padding(self) -> float:
        """Share of deep rows that are padding."""
        return 1 - self.useful.deep_rows / self.padded.deep_rows if self.padded.deep_rows else 0.0


class StepMeter:
    """Sum of the micro-batches of one replica; every rank of the replica sees the same ones.

    Costs are linear in `PlanStats`, so a micro-batch only adds a few integers, and FLOPs are
    computed once per interval.
    """

    def __init__(self, sizes: ModelSizes, settings: BackwardSettings) -> None:
        self.sizes, self.settings = sizes, settings
        self._reset()

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> StepMeter:
        """Meter of a run with validated arguments."""
        return cls(model_sizes(args), BackwardSettings.from_args(args))

    def _reset(self) -> None:
        self._micro_batches, self._useful, self._padded = 0, PlanStats(), PlanStats()

    def add(self, plan: SequencePlan) -> None:
        """Count one training micro-batch."""
        self._micro_batches += 1
        self._useful += PlanStats.of(plan)
        self._padded += PlanStats.of(plan, padded=True)

    def take(self) -> Interval:
        """Return the work since the last call and start counting anew."""
        useful, padded = self._useful, self._padded
        interval = Interval(
            self._micro_batches, useful, padded, self._training(useful), self._training(padded)
        )
        self._reset()
        return interval

    def _training(self, stats: PlanStats) -> TrainingFlops:
        return training_flops(forward_flops(self.sizes, stats), self.settings)
