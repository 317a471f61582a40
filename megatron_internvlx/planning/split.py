"""Layers of each stage where their number is not a multiple of the stages and no split is given.

Megatron asks for such a split by --pipeline-model-parallel-layout; here it follows from the planner's FLOP costs:
the busiest stage has as little work as possible, and the others share the rest evenly. `search.find_plan` simulates
the step as well, takes up to 20 s, and gained 2 % at most in the models tried (5 % with 48 stages).

A run that resumes keeps the split that its checkpoint was made with, whatever else has changed: the distributed
optimizer's state fits no other. Without a checkpoint all ranks choose for themselves, and so may a later start before
the first save. So the choice depends on the model, the number of stages and --seq-length alone: one row full of tiles,
everything trained, nothing recomputed (not the batch sizes, the tile limits, what is frozen or the number of GPUs,
which a later start may change). It is made in whole numbers, to be the same on every machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_internvlx.config import as_mapping, settings_from
from megatron_internvlx.megatron_settings import Batches
from megatron_internvlx.model.sizes import model_sizes
from megatron_internvlx.parallel.layout import layout_counts
from megatron_internvlx.planning.costs import Cost, LayerCosts, Machine, costs_from_flops
from megatron_internvlx.planning.flops import BackwardSettings
from megatron_internvlx.planning.search import layout_string
from megatron_internvlx.planning.workload import Workload
from megatron_internvlx.ranks import is_first_rank

_UNITS = 1 << 24  # of work in a micro-batch: finer than any measurement


@dataclass(frozen=True)
class GivenSplit:
    """Megatron's arguments that divide the layers into pipeline stages, as given on the command line."""

    num_layers: int
    pipeline_model_parallel_size: int
    pipeline_model_parallel_layout: str | None
    decoder_first_pipeline_num_layers: int | None
    decoder_last_pipeline_num_layers: int | None
    account_for_embedding_in_pipeline_split: bool
    account_for_loss_in_pipeline_split: bool
    num_layers_per_virtual_pipeline_stage: int | None
    num_virtual_stages_per_pipeline_rank: int | None

    def undivided_stages(self) -> int | None:
        """Stages of the pipeline, virtual ones counted, if a split has to be chosen for them; else None.

        Raises ValueError where --num-layers-per-virtual-pipeline-stage does not fit.
        """
        pipeline, layers = self.pipeline_model_parallel_size, self.num_layers
        fixed = (
            self.pipeline_model_parallel_layout,
            self.decoder_first_pipeline_num_layers,
            self.decoder_last_pipeline_num_layers,
            self.account_for_embedding_in_pipeline_split or None,
            self.account_for_loss_in_pipeline_split or None,
        )
        if pipeline == 1 or any(one is not None for one in fixed):
            return None
        if each := self.num_layers_per_virtual_pipeline_stage:
            if layers % (pipeline * each):
                raise ValueError(
                    f"--num-layers-per-virtual-pipeline-stage {each} on {pipeline} pipeline ranks does not divide the "
                    f"model's {layers} layers: give --num-virtual-stages-per-pipeline-rank, for which a split is chosen"
                )
            return None
        stages = pipeline * (self.num_virtual_stages_per_pipeline_rank or 1)
        return stages if layers % stages else None


def settle_split(
    args: argparse.Namespace, made_with: Callable[[argparse.Namespace], str | None] = lambda args: None
) -> None:
    """Set --pipeline-model-parallel-layout where the number of layers is not a multiple of the stages.

    Must run before Megatron's checks, which refuse such arguments. The first rank prints the choice.

    Args:
        args: checked arguments; changed if a split was chosen.
        made_with: function that returns the layout of the checkpoint that a run with these arguments resumes from,
            or None; called only where a split has to be chosen, and followed where stages and layers are as many.

    Raises:
        ValueError: --num-layers-per-virtual-pipeline-stage, which fixes the layers, does not fit.
    """
    given = settings_from(args, GivenSplit)
    layers, stages = given.num_layers, given.undivided_stages()
    if stages is None:
        return
    layout = made_with(args)
    counts = layout_counts(layout) if layout else ()
    if layout and (len(counts), sum(counts)) == (stages, layers):
        how, remark = "as in the checkpoint to resume from", ""
    else:
        counts = even_work(model_costs(args), stages)
        layout = layout_string(counts)
        how, remark = "by work", "; ivlx plan simulates others"
    args.pipeline_model_parallel_layout = layout
    args.num_virtual_stages_per_pipeline_rank = None  # Megatron counts them in the layout
    if is_first_rank():
        print(
            f"{layers} layers do not divide over {stages} pipeline stages: split {how} into "
            f"{' + '.join(map(str, counts))} (--pipeline-model-parallel-layout '{layout}'{remark})",
            flush=True,
        )


def model_costs(args: argparse.Namespace) -> LayerCosts:
    """Costs of training the whole model on one row of --seq-length full of tiles, without recomputation.

    Works before Megatron has checked the arguments. Raises ValueError when not even one tile fits.
    """
    given, length = as_mapping(args), settings_from(args, Batches).seq_length
    # As Megatron fills them in.
    filled = {
        "padded_vocab_size": None,
        "ffn_hidden_size": given["ffn_hidden_size"] or 4 * given["hidden_size"],
    }
    sizes = model_sizes({**given, **filled})
    # A pack is one row, whatever the batch and the tile limits: they may change between two starts.
    pack = Workload(length, image_tiles=length).full_micro_batch(sizes)
    return costs_from_flops(sizes, pack, BackwardSettings(), Machine())


def even_work(costs: LayerCosts, stages: int) -> tuple[int, ...]:
    """Layers per stage with the least work of the busiest stage, then with the least sum of squared works.

    A stage may have no layers. The first stage also has the vision encoder's work, the last one the loss's. Of
    equal splits the one with fewer layers in the earlier stages is taken.
    """
    unit = costs.total / _UNITS

    def work(cost: Cost) -> int:
        return round((cost.forward + cost.backward) / unit)

    sums = [0, *accumulate(work(cost) for cost in costs.layers)]
    extra = [0] * stages
    extra[0] += work(costs.first)
    extra[-1] += work(costs.last)
    busiest = _busiest(sums, extra)
    layers = len(sums) - 1
    # least[a]: sum of squares of the stages from the one at hand on, when they begin with layer a; None: impossible.
    least: list[int | None] = [None] * layers + [0]
    ends: list[list[int]] = []
    for more in reversed(extra):
        chosen = []
        for begin in range(layers + 1):
            options = [
                ((sums[end] - sums[begin] + more) ** 2 + rest, end)
                for end in range(begin, layers + 1)
                if (rest := least[end]) is not None and sums[end] - sums[begin] + more <= busiest
            ]
            chosen.append(min(options, default=(None, layers)))
        least = [squares for squares, _ in chosen]
        ends.append([end for _, end in chosen])
    counts, begin = [], 0
    for stage in reversed(ends):
        counts.append(stage[begin] - begin)
        begin = stage[begin]
    return tuple(counts)


def _busiest(sums: Sequence[int], extra: Sequence[int]) -> int:
    """Least possible work of the busiest stage."""
    layers = len(sums) - 1
    # least[a]: that of the stages from the one at hand on, when they begin with layer a.
    least = [sums[-1] - sums[begin] + extra[-1] for begin in range(layers + 1)]
    for more in reversed(extra[:-1]):
        least = [
            min(max(sums[end] - sums[begin] + more, least[end]) for end in range(begin, layers + 1))
            for begin in range(layers + 1)
        ]
    return least[0]
