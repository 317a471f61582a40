"""Decoder layers, projectors and carried features of each pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_internvlx.megatron_settings import Parallelism


@dataclass(frozen=True)
class StageLayers:
    """The decoder layers of one (virtual) pipeline stage, 0-based, `first` <= layer < `end`."""

    first: int
    end: int


def stage_layers(config: TransformerConfig, pp_rank: int, vp_stage: int | None) -> StageLayers:
    """Layers that Megatron builds on this stage, with any of its ways to split them."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None and config.pipeline_model_parallel_size > 1:
        # Not by the layout's own methods: without initialized groups, as in a dry run, they take every model chunk
        # for the first one.
        stages = [ranks[chunk] for chunk in range(len(layout.layout[0])) for ranks in layout.layout]
        counts = [stage.count(LayerType.decoder) for stage in stages]
        index = (vp_stage or 0) * len(layout.layout) + pp_rank
        return StageLayers(sum(counts[:index]), sum(counts[: index + 1]))
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    return StageLayers(first, first + get_num_layers_to_build(config, vp_stage, pp_rank))


@dataclass(frozen=True)
class BoundaryContent:
    """Content of the boundary in front of decoder layer `next_layer`."""

    next_layer: int
    deep: bool
    """Whether the decoder rows are those of the deep phase."""
    carry: bool
    """Whether ViT features are sent too, because layer `next_layer` or a later one projects them."""


def boundary_content(next_layer: int, injection_layers: tuple[int, ...]) -> BoundaryContent:
    """Content of the boundary in front of a layer.

    Layer k itself expands, so the boundary in front of it still carries shallow rows.
    """
    expand = injection_layers[0] if injection_layers else None
    return BoundaryContent(
        next_layer,
        deep=expand is None or next_layer > expand,
        carry=any(layer >= next_layer for layer in injection_layers),
    )


def carried_rows(elements: int, hidden_size: int, shards: int) -> int:
    """Number of rows of width `hidden_size` for so many elements of ViT features, padded to whole shards."""
    return -(-elements // (hidden_size * shards)) * shards


def layout_counts(layout: str) -> tuple[int, ...]:
    """Layers per stage of a layout such as `E|tt|(t|)*2L`, in Megatron's notation. Raises ValueError."""
    try:
        stages = PipelineParallelLayerLayout.parse_str_to_list(layout)
    except (AssertionError, ValueError, IndexError) as error:
        raise ValueError(f"layout {layout!r}: {error}") from error
    if not stages[0] or stages[0][0] is not LayerType.embedding or stages[-1][-1:] != [LayerType.loss]:
        raise ValueError(f"layout {layout!r}: must begin with E and end with L, such as E|tt|tt|L")
    return tuple(stage.count(LayerType.decoder) for stage in stages)


def check_layout(layout: str, *, pipeline: int, layers: int) -> None:
    """Check that --pipeline-model-parallel-layout has the model's layers and the pipeline's stages.

    Raises ValueError with both numbers.
    """
    counts = layout_counts(layout)
    remedy = "ivlx plan prints one that fits"
    if pipeline == 1:
        raise ValueError(
            f"--pipeline-model-parallel-layout {layout!r} has {len(counts)} stages and "
            "--pipeline-model-parallel-size is 1: raise the one or leave out the other"
        )
    if len(counts) % pipeline:
        raise ValueError(
            f"--pipeline-model-parallel-layout {layout!r} has {len(counts)} stages, which "
            f"--pipeline-model-parallel-size {pipeline} does not divide; {remedy}"
        )
    if sum(counts) != layers:
        raise ValueError(
            f"--pipeline-model-parallel-layout {layout!r} has {sum(counts)} layers ("
            f"{' + '.join(map(str, counts))}) and the model {layers}; {remedy}"
        )


def layout_name(parallel: Parallelism) -> str:
    """Short name of a layout, such as TP2-PP2-DP4; sizes of 1 are left out, except DP1."""
    parts = [
        f"TP{parallel.tensor_model_parallel_size}",
        f"PP{parallel.pipeline_model_parallel_size}",
        f"VPP{parallel.virtual_pipeline_model_parallel_size or 1}",
        f"EP{parallel.expert_model_parallel_size}",
        f"DP{parallel.data_parallel_size}",
    ]
    return "-".join(part for part in parts if not part.endswith("P1") or part == "DP1")
