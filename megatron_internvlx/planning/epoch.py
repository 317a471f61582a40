"""Time of an epoch over a number of pictures, computed from FLOPs at an assumed rate."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_internvlx.planning.workload import Workload


@dataclass(frozen=True)
class Epoch:
    """One pass over pictures that all have as many tiles as the settings allow."""

    pictures: int
    tiles: int
    """Per picture at most, thumbnail included."""
    micro_batches: int
    """Over all replicas; packs, with packing."""
    steps: int
    """At least one: the last one may have pictures of the next epoch."""
    seconds: float
    """Forward and backward passes, pipeline waits included; no optimizer, data or communication of gradients."""

    @classmethod
    def of(cls, pictures: int, work: Workload, step_seconds: float) -> Epoch:
        """Epoch of a run.

        Full packs are assumed: smaller pictures fill what larger ones leave.

        Args:
            pictures: number of samples with one picture each.
            work: limits of a micro-batch.
            step_seconds: time of a step of full micro-batches.
        """
        budget = work.max_tiles_per_pack
        amount, size = (pictures * work.image_tiles, budget) if budget else (pictures, work.micro_batch_size)
        micro_batches = -(-amount // size)
        seconds = micro_batches / work.packs * step_seconds
        return cls(pictures, work.image_tiles, micro_batches, -(-micro_batches // work.packs), seconds)

    def line(self, rate: float) -> str:
        """Line of the dry run.

        Args:
            rate: FLOP/s per device that the time was computed with.
        """
        speed = f"{rate / 1e12:,.0f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.0f} GFLOP/s"
        return (
            f"epoch of {self.pictures:,} pictures: {duration(self.seconds)}, {self.steps:,} steps, at "
            f"{self.tiles} tiles per picture (computed at {speed} per device, not measured)"
        )


def duration(seconds: float) -> str:
    """Text of a duration, in its two largest units."""
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86_400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    if minutes:
        return f"{minutes} min {whole % 60} s"
    return f"{whole} s"
