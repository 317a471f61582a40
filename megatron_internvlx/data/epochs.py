"""Number of steps of a training whose length is given in epochs."""

from __future__ import annotations

import math

from megatron_internvlx.config import DataSettings
from megatron_internvlx.data.manifest import Manifest
from megatron_internvlx.data.prepared import is_prepared, prepared_sets


def epoch_records(data: DataSettings) -> int:
    """Number of records in an epoch of --data, repetitions included. Raises ValueError if it cannot be read."""
    assert data.data is not None
    if data.loader == "simple":
        if is_prepared(data.data):
            raise ValueError(f"--data {data.data} is a prepared directory: add --loader energon")
        return len(Manifest(data.data))
    return sum(part.records * part.repetitions for entry in prepared_sets(data.data) for part in entry.parts)


def epoch_steps(data: DataSettings, global_batch_size: int) -> int:
    """Number of steps of `--epochs`. Records that do not fill a last step are left out, as by the released code.

    Raises ValueError if the records do not fill one step, or cannot be counted.
    """
    assert data.epochs is not None
    records = epoch_records(data)
    # 0.29 * 100 / 29 is a little below 1.
    steps = math.floor(data.epochs * records / global_batch_size + 1e-9)
    if not steps:
        raise ValueError(
            f"--epochs {data.epochs:g} of {records:,} records are less than one step: --global-batch-size is "
            f"{global_batch_size}"
        )
    return steps
