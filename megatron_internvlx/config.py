"""Our own settings, each a dataclass whose fields become Megatron command-line flags.

Megatron keeps the language model, the parallel layout, the optimizer and the checkpoint settings
in its own arguments. What InternVL-X adds is here, with every check that spans several of them,
so that an impossible combination stops before anything is built.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from megatron_internvlx.lora_settings import LoraSettings

PVTC_HEADS = 16
"""Attention heads of PVTC, released."""
PVTC_MLP_RATIO = 4
"""Inner width of PVTC's gated MLP over h, released."""

Arguments = argparse.Namespace | Mapping[str, Any]
"""Parsed arguments, or some of them by name: a preset, an import's recipe, those in a checkpoint."""


@dataclass
class VisionSettings:
    """Vision encoder (InternViT) settings."""

    vision_preset: str = "internvit_300m"
    """Name of the InternViT architecture: internvit_300m, internvit_6b or a tiny one."""
    image_size: int = 448
    """Side of a square tile, in pixels; a multiple of the patch size."""
    patch_size: int | None = None
    """Side of a ViT patch, in pixels. Unset: the preset's."""
    vision_drop_path: float = 0.0
    """Largest drop-path rate of the vision encoder; it rises linearly over the layers. 0: off."""
    vision_recompute: bool = False
    """Recompute every vision layer in the backward pass instead of keeping its activations."""
    vision_attention: Literal["megatron", "torch"] = "megatron"
    """Vision encoder's attention: --transformer-impl's, or torch's, which a CUDA graph can train."""
    select_layer: int | None = None
    """Index of the hidden state that feeds the projectors; -1: the last one. Unset: the preset's."""
    vision_overrides: str | None = None
    """JSON object of InternViTConfig fields that differ from the preset; written by imports. Unset: none."""


@dataclass
class CompressionSettings:
    """Visual token compression: PVTC in the projector, LVTC inside the decoder."""

    projector: Literal["pvtc", "mlp"] = "pvtc"
    """pvtc: the InternVL-X projector. mlp: InternVL's pixel shuffle and two linear layers."""
    pixel_shuffle_version: Literal["v1", "v2"] = "v2"
    """Order of the pixels in a pixel-shuffle block; released models use v2."""
    projector_drop_path: float = 0.1
    """Drop-path rate inside PVTC, per window; always 0.1 in the released code. 0: off."""
    expand_layer: int | None = None
    """LVTC: 0-based decoder layer before which visual rows are upsampled. Unset: LVTC off."""
    inject_layers: list[int] | None = None
    """LVTC: further layers (after expand_layer) that add a projection of the ViT features."""
    low_ratio: float = 0.25
    """Side ratio of the token grid to the patch grid before expand_layer."""
    high_ratio: float = 0.5
    """Side ratio of the token grid to the patch grid from expand_layer on, or with LVTC off."""
    upsample: Literal["bilinear", "nearest"] = "bilinear"
    """Interpolation from shallow to deep visual rows; bilinear has align_corners=False."""

    @property
    def lvtc(self) -> bool:
        """Whether the decoder's sequence grows at `expand_layer`."""
        return self.expand_layer is not None

    def injection_layers(self) -> tuple[int, ...]:
        """Layers with their own projector, `expand_layer` first; () if LVTC is off."""
        if self.expand_layer is None:
            return ()
        return (self.expand_layer, *sorted(self.inject_layers or ()))


@dataclass
class TrainSettings:
    """Settings of the model, its precision, frozen parts, loss weights and boundaries."""

    model_preset: str | None = None
    """Name of a model: sets Megatron's and our architecture flags; later flags override it."""
    precision: str | None = None
    """Name of a precision, such as bf16 or fp8_tensorwise: sets Megatron's flags; later flags override it."""
    fp8_parts: list[str] | None = None
    """Parts that run in FP8 under an FP8 precision: decoder (always), vision, projectors. Unset: the decoder."""
    freeze_vision: bool = False
    """Do not train the vision encoder."""
    freeze_llm: bool = False
    """Do not train the language model (embedding and output layer included)."""
    freeze_projectors: bool = False
    """Do not train the projectors (PVTC or MLP, LVTC injections included)."""
    loss_weighting: Literal["token", "sample", "square"] = "token"
    """Weight of an answer token: token 1; sample 1/n; square 1/sqrt(n), n = answer tokens of its sample."""
    loss_average: Literal["global", "micro-batch"] = "global"
    """Mean of the loss: over all tokens of a step, or over the means of micro-batches (InternVL's)."""
    boundary: Literal["variable", "static"] = "variable"
    """Row counts between pipeline stages: exchanged per message, or padded to fixed budgets."""
    shallow_seq_length: int | None = None
    """Static boundaries and packing: rows of the shallow phase per micro-batch, in tokens."""
    max_tiles_per_pack: int | None = None
    """Static boundaries and packing: tiles per micro-batch at most."""
    max_samples_per_pack: int = 64
    """Static boundaries and packing: samples per micro-batch at most; attention's time grows with it a little."""
    max_supervised_tokens_per_pack: int | None = None
    """Static boundaries: supervised tokens per micro-batch at most. Unset: as many as rows that enter layer 0."""


@dataclass
class DataSettings:
    """Settings of the data, its loader, and the tiles of images."""

    data: str | None = None
    """Training data: InternVL's meta.json, or with --loader energon the output of tools/prepare_data.py."""
    loader: Literal["simple", "energon"] = "simple"
    """simple: reads meta.json, by global position. energon: reads a prepared directory, blends, packs."""
    epochs: float | None = None
    """Length of the training in epochs of --data; not with --packing. Unset: --train-iters."""
    packing: bool = False
    """Fill micro-batches to --seq-length, --shallow-seq-length and the budgets per pack (energon loader)."""
    pack_buffer: int = 1000
    """Number of buffered samples per loader process from which packs are made."""
    shuffle_buffer: int = 256
    """Number of buffered samples per loader process for shuffling (energon loader)."""
    image_decoder: Literal["dali", "pillow"] = "pillow"
    """Image decoder of the energon loader: DALI or the Pillow reference."""
    decode_at: Literal["auto", "loader", "rank"] = "auto"
    """Place where DALI cuts images: loader processes, or the ranks that encode the tiles. auto: there if on GPUs."""
    dataloader_save: str | None = None
    """Directory for the energon loader's state, saved with each checkpoint. Unset: loader/ in --save."""
    restart_data: bool = False
    """On resume, restart the data from the beginning in a new order, ignoring the checkpoint's position."""
    valid_data: str | None = None
    """InternVL meta.json of held-out data; each evaluation uses every record once. Unset: no validation."""
    valid_records: int | None = None
    """Number of records of --valid-data to evaluate on, spread evenly over it. Unset: all."""
    conversation_template: Literal["internlm2-chat", "Hermes-2", "internvl2_5"] = "internvl2_5"
    """Prompt template of data/conversation.py."""
    rvtc: Literal["edge", "area", "off"] = "edge"
    """Rule that limits an image's tiles (RVTC): edge (released): by its sides; area: by its pixels; off: InternVL's."""
    min_tiles: int = 1
    """Minimum number of tiles of a grid."""
    max_tiles: int = 12
    """Maximum number of tiles of a grid, not counting the thumbnail."""
    no_thumbnail: bool = False
    """Omit the thumbnail of the whole image that follows the tiles of a grid larger than 1x1."""
    static_image_size: bool = False
    """One tile per image: the whole image stretched to image_size (released non-HD models)."""
    loader_workers: int = 2
    """Processes per loading rank that tokenize, decode and resize. 0: in the training process."""
    max_rejects: int | None = None
    """Training stops after more unusable samples than this. Unset: only the rate is limited."""
    max_reject_rate: float = 0.05
    """Training stops if a larger share of the samples is unusable, checked from 200 samples on. 1: off."""
    rejects_file: str | None = None
    """JSON lines file that lists every unusable sample. Unset: in the checkpoint directory, if any."""
    released_quirks: bool = False
    """Reproduce behaviours of the released data code that lose data (EXIF, surplus images); see docs/data.md."""
    predictions_file: str | None = None
    """JSON lines file for the answers of the last evaluation. Unset: predictions.jsonl in --save."""
    report_file: str | None = None
    """PNG with the loss curve and six validation images, updated at each evaluation. Unset: report.png in --save."""

    @property
    def image_tiles(self) -> int:
        """Tiles of an image at most, thumbnail included."""
        return self.max_tiles + (not self.no_thumbnail and self.max_tiles > 1)


@dataclass
class RunSettings:
    """Settings for dry runs, automatic resuming, tracking and fault handling."""

    dry_run: bool = False
    """Check everything, print layout, memory and batch sizes, and train nothing. Needs no data and no GPU."""
    dry_run_world_size: int | None = None
    """Number of GPUs assumed by a dry run; recipes set their own. Unset: WORLD_SIZE."""
    dry_run_json: str | None = None
    """JSON file for the results of a dry run. Unset: not written."""
    dry_run_pictures: int | None = None
    """Number of training pictures for whose epoch a dry run computes the time. Unset: not printed."""
    gpu_memory_gib: float | None = None
    """Memory of one GPU in GiB; a dry run fails if more is needed. Unset: not checked."""
    auto_resume: bool = False
    """Resume from the newest complete checkpoint in --save; the first start uses --load, if given."""
    max_tries: int = 3
    """With --auto-resume, number of starts without a new checkpoint after which training gives up."""
    mlflow_experiment: str | None = None
    """MLflow experiment to log to, at MLFLOW_TRACKING_URI or in SQLite in --save. Unset: off."""
    stall_minutes: float = 30.0
    """With --exit-signal-handler, a rank prints its stacks and exits if a step takes longer. 0: off."""


SETTINGS = (VisionSettings, CompressionSettings, TrainSettings, LoraSettings, DataSettings, RunSettings)


def frozen_parts(train: TrainSettings, lora: LoraSettings) -> frozenset[str]:
    """Parts of the model whose own weights are not trained: vision, projectors, llm.

    A part with adapters is one of them, whether or not a --freeze flag names it.
    """
    flags = {"vision": train.freeze_vision, "projectors": train.freeze_projectors, "llm": train.freeze_llm}
    return lora.parts | {part for part, frozen in flags.items() if frozen}


def untrained_parts(train: TrainSettings, lora: LoraSettings) -> frozenset[str]:
    """Parts of the model in which nothing is trained, adapters included: vision, projectors, llm."""
    return frozen_parts(train, lora) - lora.parts


def as_mapping(arguments: Arguments) -> Mapping[str, Any]:
    """Arguments by name."""
    return arguments if isinstance(arguments, Mapping) else vars(arguments)


def settings_from[Settings](arguments: Arguments, settings: type[Settings]) -> Settings:
    """Create a settings object from arguments; those left out keep their defaults."""
    given = as_mapping(arguments)
    return settings(**{field.name: given[field.name] for field in fields(settings) if field.name in given})  # type: ignore[arg-type]


def grid_side(patches: int, ratio: float, name: str) -> int:
    """Side of the token grid of a tile with `patches` x `patches` patches.

    Raises ValueError when `ratio` is not 1/n with n a divisor of `patches`.
    """
    block = round(1 / ratio) if 1e-9 < ratio <= 1 else 0  # false for nan, too
    if block < 1 or abs(block * ratio - 1) > 1e-9 or patches % block:
        raise ValueError(
            f"{name} {ratio} does not fit {patches}x{patches} patches per tile: "
            f"it must be 1/n with n a divisor of {patches}"
        )
    return patches // block


def check_compression(settings: CompressionSettings, *, patches: int, num_layers: int) -> None:
    """Check LVTC and projector settings against the tile's patches and the decoder's depth."""
    high = grid_side(patches, settings.high_ratio, "--high-ratio")
    if settings.expand_layer is None:
        if settings.inject_layers:
            raise ValueError(
                f"--inject-layers {settings.inject_layers} needs --expand-layer: injections add to "
                "visual rows that are already expanded"
            )
        return
    low = grid_side(patches, settings.low_ratio, "--low-ratio")
    if low >= high or high % low:
        raise ValueError(
            f"--low-ratio {settings.low_ratio} gives a {low}x{low} grid and --high-ratio "
            f"{settings.high_ratio} {high}x{high}: the deep side must be a multiple of the shallow side, "
            "and larger"
        )
    if not 1 <= settings.expand_layer < num_layers:
        raise ValueError(
            f"--expand-layer {settings.expand_layer} must be between 1 and {num_layers - 1} "
            f"(the model has {num_layers} layers); leave it unset to switch LVTC off"
        )
    wrong = [m for m in settings.inject_layers or () if not settings.expand_layer < m < num_layers]
    if wrong:
        raise ValueError(
            f"--inject-layers {wrong}: each must be above --expand-layer {settings.expand_layer} "
            f"and below {num_layers}"
        )
    if len(set(settings.inject_layers or ())) != len(settings.inject_layers or ()):
        raise ValueError(f"--inject-layers {settings.inject_layers} names a layer twice")


def check_projector(settings: CompressionSettings, *, hidden_size: int, tensor_parallel: int) -> None:
    """Check that PVTC's heads can be divided over the tensor-parallel group."""
    if settings.projector != "pvtc":
        return
    if hidden_size % PVTC_HEADS:
        raise ValueError(
            f"PVTC has {PVTC_HEADS} attention heads: --hidden-size {hidden_size} is not a multiple of {PVTC_HEADS}"
        )
    if PVTC_HEADS % tensor_parallel:
        raise ValueError(
            f"PVTC has {PVTC_HEADS} attention heads, which cannot be divided by --tensor-model-parallel-size "
            f"{tensor_parallel}: use 1, 2, 4, 8 or 16"
        )


def misaligned(name: str, rows: int, alignment: int) -> str:
    """Error message with remedy for a row count that is not a multiple of `alignment`; "" if it is one."""
    if not rows % alignment:
        return ""
    return (
        f"{name} {rows} must be a multiple of {alignment} for the precision and sequence parallelism of this "
        f"layout: use {-(-rows // alignment) * alignment}"
    )


def check_static_budgets(
    train: TrainSettings,
    *,
    deep: int,
    alignment: int,
    samples: int,
    sample_tiles: int,
    low_rows: int,
    high_rows: int,
    lvtc: bool,
) -> None:
    """Check the fixed sizes to which static boundaries pad every micro-batch.

    Args:
        train: the settings that hold the shallow and tile budgets.
        deep: --seq-length, the deep budget.
        alignment: number of which the rows per phase must be a multiple.
        samples: number per micro-batch; each sample has an equal share of the budgets.
        sample_tiles: maximum number of tiles of one sample's image, thumbnail included.
        low_rows: visual rows per tile in the shallow phase.
        high_rows: visual rows per tile in the deep phase.
        lvtc: whether there is a shallow phase.
    """
    shallow, tiles = train.shallow_seq_length, train.max_tiles_per_pack
    missing = ["--max-tiles-per-pack"] if tiles is None else []
    if lvtc and shallow is None:
        missing.append("--shallow-seq-length")
    if missing:
        raise ValueError(
            f"--boundary static needs {' and '.join(missing)}: it pads every micro-batch to fixed sizes; "
            "give them, or use --boundary variable"
        )
    assert tiles is not None
    sizes = {"--seq-length": deep}
    if lvtc and shallow is not None:
        sizes["--shallow-seq-length"] = shallow
    for name, rows in sizes.items():
        if text := misaligned(name, rows, alignment):
            raise ValueError(text)
    shared = f" for each of {samples} samples of a micro-batch" if samples > 1 else ""
    if tiles // samples < sample_tiles:
        raise ValueError(
            f"--max-tiles-per-pack {tiles} is too small for one image of {sample_tiles} tiles{shared}: raise it to "
            f"{samples * sample_tiles}, or lower --max-tiles"
        )
    wanted = {"--seq-length": sample_tiles * high_rows, "--shallow-seq-length": sample_tiles * low_rows}
    for name, rows in sizes.items():
        if rows // samples <= wanted[name]:
            raise ValueError(
                f"{name} {rows} is too small for the {wanted[name]} visual rows of one image of {sample_tiles} "
                f"tiles and some text{shared}: raise it, or lower --max-tiles"
            )
    if lvtc and shallow is not None and shallow > deep:
        raise ValueError(
            f"--shallow-seq-length {shallow} is more than --seq-length {deep}: the shallow phase has fewer "
            "rows than the deep one"
        )


def check_supervised_budget(train: TrainSettings, *, entry_rows: int, samples: int) -> None:
    """Check the number of supervised tokens to which static boundaries pad every micro-batch.

    Args:
        train: the settings that hold it.
        entry_rows: budget of rows that enter layer 0.
        samples: number per micro-batch; each sample has an equal share.
    """
    most = train.max_supervised_tokens_per_pack
    if most is None:
        return
    flag = f"--max-supervised-tokens-per-pack {most}"
    if train.boundary != "static":
        raise ValueError(
            f"{flag} needs --boundary static; with variable boundaries only supervised rows are computed: remove it"
        )
    if not samples <= most <= entry_rows:
        raise ValueError(
            f"{flag} must be at least {samples} (samples of a micro-batch) and at most {entry_rows}, the rows that "
            "enter layer 0, text among them; unset it is as many"
        )


def check_decoding(data: DataSettings) -> None:
    """Raises ValueError where images are to be cut by ranks that would not get their files."""
    if data.decode_at == "rank" and (data.loader, data.image_decoder) != ("energon", "dali"):
        raise ValueError(
            f"--decode-at rank needs --loader energon and --image-decoder dali, not {data.loader} and "
            f"{data.image_decoder}"
        )


def check_packing(data: DataSettings, train: TrainSettings, *, micro_batch_size: int) -> None:
    """Check that --packing has the loader and the micro-batch size that it needs."""
    if not data.packing:
        return
    if data.loader != "energon":
        raise ValueError(
            "--packing needs --loader energon, and as --data a directory made by tools/prepare_data.py"
        )
    if micro_batch_size != 1:
        raise ValueError(
            f"with --packing a micro-batch is one pack: --micro-batch-size {micro_batch_size} must be 1; "
            "raise --seq-length, --shallow-seq-length and the budgets per pack instead"
        )
