"""The fullest micro-batch that a run's arguments admit, for the planner and the dry run."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_internvlx.config import Arguments, DataSettings, TrainSettings, as_mapping, settings_from
from megatron_internvlx.model.sizes import ModelSizes
from megatron_internvlx.planning.flops import PlanStats


@dataclass(frozen=True)
class Workload:
    """Limits of a micro-batch, and how many samples or packs make a step."""

    seq_length: int
    """Deep rows of a sample or a pack at most."""
    image_tiles: int
    """Tiles of a sample's image at most, thumbnail included."""
    micro_batch_size: int = 1
    global_batch_size: int = 1
    max_tiles_per_pack: int | None = None
    """Tiles of a micro-batch at most. None: those of its samples."""
    shallow_seq_length: int | None = None
    """Shallow rows to which static boundaries pad. None: not padded."""
    static: bool = False
    """Static boundaries: `supervised_tokens` rows reach the output layer, or all that enter layer 0."""
    supervised_tokens: int | None = None
    """Supervised tokens of a micro-batch at most, to which static boundaries pad. None: no limit of their own."""

    @classmethod
    def from_args(cls, arguments: Arguments) -> Workload:
        """Workload of parsed arguments, Megatron's and ours."""
        train, data = settings_from(arguments, TrainSettings), settings_from(arguments, DataSettings)
        given, static = as_mapping(arguments), train.boundary == "static"
        return cls(
            given["seq_length"],
            data.image_tiles,
            given["micro_batch_size"],
            given["global_batch_size"],
            train.max_tiles_per_pack,
            train.shallow_seq_length if static else None,
            static,
            train.max_supervised_tokens_per_pack if static else None,
        )

    @property
    def packs(self) -> int:
        """Micro-batches of a step over all replicas."""
        return self.global_batch_size // self.micro_batch_size

    def full_micro_batch(self, sizes: ModelSizes) -> PlanStats:
        """Micro-batch with as many tiles as fit and as much of its text supervised as may be.

        Raises ValueError when not even one tile fits.
        """
        per_tile = sizes.high_grid**2
        fitting = self.seq_length // per_tile
        if not fitting:
            raise ValueError(
                f"--seq-length {self.seq_length} holds no tile of {per_tile} tokens: make it longer, "
                "or --high-ratio smaller"
            )
        budget = self.max_tiles_per_pack
        samples = 1 if budget else self.micro_batch_size
        tiles = budget or self.image_tiles * samples
        tiles, rows = min(tiles, fitting * samples), self.seq_length * samples
        shallow = rows - tiles * (per_tile - sizes.low_grid**2) if sizes.lvtc else 0
        if sizes.lvtc and self.shallow_seq_length:
            if self.shallow_seq_length < shallow and budget is None:
                raise ValueError(
                    f"--shallow-seq-length {self.shallow_seq_length} is less than the {shallow} shallow rows "
                    "of a full micro-batch"
                )
            shallow = self.shallow_seq_length
        return PlanStats(
            vision_tiles=tiles,
            projected_tiles=tiles,
            upsampled_tiles=tiles if sizes.lvtc else 0,
            shallow_rows=shallow,
            shallow_squares=shallow**2,
            deep_rows=rows,
            deep_squares=rows**2,
            output_rows=self.supervised_tokens
            or (shallow or rows if self.static else rows - tiles * per_tile),
        )
