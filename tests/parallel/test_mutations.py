"""Deliberate errors, each of which must make the comparison of layouts fail.

An error is applied inside the ranks while they train (never while the reference is computed), so that
what is shown is that `test_layouts.py` would see it. None of them makes a rank crash: the numbers alone
must tell.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest

from tests import layouts  # isort: skip  (sets Megatron up)
import torch

from megatron_internvlx.model import drop_path, internvlx, pvtc
from megatron_internvlx.model.decoder import InternVLXLayer
from megatron_internvlx.model.internvlx import InternVLX
from megatron_internvlx.parallel.boundary import BoundaryFormat
from megatron_internvlx.parallel.device_plan import DevicePhase
from megatron_internvlx.training import gradients
from tests.layout_cases import Case, Runner, expand

Patch = Callable[[], Any]


def carry_dropped_one_stage_early() -> Patch:
    """The stage of layers 4 and 5 gets rows only; layer 5 projects features of zeros."""
    original = BoundaryFormat.split

    def split(self, message, content, plan):
        rows, features = original(self, message, content, plan)
        last = content.next_layer == 4 and features is not None
        return rows, features * 0 if last else features

    return mock.patch.object(BoundaryFormat, "split", split)


def segments_of_the_other_phase() -> Patch:
    """Deep attention is cut where the shallow samples end."""
    original = InternVLX.forward

    def forward(self, batch, **options):
        plan = batch.plan
        ends = plan.shallow.segment_lengths[:-1]
        wrong = replace(plan.deep, segment_lengths=(*ends, plan.deep.length - sum(ends)))
        return original(self, replace(batch, plan=replace(plan, deep=wrong)), **options)

    return mock.patch.object(InternVLX, "forward", forward)


def projector_gradient_not_summed() -> Patch:
    """The gradient that leaves PVTC's column-parallel layers stays each TP rank's share."""
    original = pvtc.ProjectionMLP.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.linear.allreduce_dgrad, self.linear.disable_grad_reduce = False, True

    return mock.patch.object(pvtc.ProjectionMLP, "__init__", init)


def vision_gradient_not_summed() -> Patch:
    """Each TP rank keeps the encoder's gradient of its own tiles."""
    return mock.patch.object(gradients, "sum_vision_gradients", lambda *_: None)


def positions_of_the_other_phase() -> Patch:
    """Deep rows get positions as dense as those of shallow rows."""
    original = InternVLX.forward

    def forward(self, batch, **options):
        plan = batch.plan
        wrong = replace(plan.deep, position_ids=plan.deep.position_ids // 2)
        return original(self, replace(batch, plan=replace(plan, deep=wrong)), **options)

    return mock.patch.object(InternVLX, "forward", forward)


def positions_not_restarted() -> Patch:
    """Positions run on through the samples of a pack."""
    original = InternVLX._phase_inputs

    def phase_inputs(self, phase: DevicePhase):
        running = torch.arange(phase.length, dtype=phase.position_ids.dtype)
        with mock.patch.object(internvlx, "ROTARY_TABLE_STEP", 4096):
            return original(self, replace(phase, position_ids=running))

    return mock.patch.object(InternVLX, "_phase_inputs", phase_inputs)


def expansion_one_layer_late() -> Patch:
    """Layer k still runs on shallow rows, and its expansion follows it."""
    original = InternVLXLayer.forward

    def forward(self, hidden_states, attention_mask=None, context=None, packed_seq_params=None, **kwargs):
        injection = self.injection
        if injection is None or not injection.expand:
            return original(self, hidden_states, attention_mask, context, packed_seq_params, **kwargs)
        self.injection, self.is_deep = None, False
        rows, _ = original(self, hidden_states, attention_mask, context, packed_seq_params, **kwargs)
        self.injection, self.is_deep = injection, True
        features = packed_seq_params.frozen_features if context is None else context
        return injection(rows, features, packed_seq_params.plan), context

    return mock.patch.object(InternVLXLayer, "forward", forward)


def windows_dropped_by_each_rank() -> Patch:
    """Drop path draws from the generator in use, which inside a sequence-parallel decoder is each rank's own."""
    return mock.patch.object(drop_path, "get_data_parallel_rng_tracker_name", lambda: "of no generator")


ERRORS = {
    carry_dropped_one_stage_early: Case(4, "lvtc", "pp=4"),
    segments_of_the_other_phase: Case(2, "lvtc", "pp=2"),
    projector_gradient_not_summed: Case(2, "lvtc", "tp=2"),
    vision_gradient_not_summed: Case(2, "lvtc", "tp=2"),
    positions_of_the_other_phase: Case(2, "lvtc", "pp=2"),
    expansion_one_layer_late: Case(2, "lvtc", "pp=2"),
    windows_dropped_by_each_rank: Case(2, "drop", "tp=2 sp full"),
}


def train_with(changes: list[str], *, error: Callable[[], Patch], **options: Any) -> dict[str, Any]:
    """`layouts.train` with an error applied in this rank."""
    with error():
        return layouts.train(changes, **options)


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_error_is_seen(runner: Runner, error: Callable[[], Patch]) -> None:
    difference = runner.difference(ERRORS[error], function=train_with, error=error)
    # An error, not rounding: the correct layouts stay below 2e-6.
    assert difference.exceeded() and difference.gradient > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(set(ERRORS.values()), key=str), ids=lambda case: case.name)
def test_without_error_nothing_is_seen(runner: Runner, case: Case) -> None:
    assert not runner.difference(case).exceeded()


@contextmanager
def no_error() -> Iterator[None]:
    yield


def rotary_mismatch(changes: list[str], *, error: Callable[[], Patch], **options: Any) -> dict[str, Any]:
    """Adds how far the rotary angles of any sample are from those of a sample that starts at 0."""
    worst = []
    with error():
        original = InternVLX._phase_inputs

        def phase_inputs(self, phase):
            inputs = original(self, phase)
            for part in inputs.rotary.split(list(phase.segment_lengths)):
                worst.append((part - self.rotary(256)[: len(part)]).abs().max().item())
            return inputs

        with mock.patch.object(InternVLX, "_phase_inputs", phase_inputs):
            result = layouts.train(changes, **options)
    return {**result, "rotary": max(worst)}


def test_positions_restart_in_every_sample(runner: Runner) -> None:
    """Attention sees differences of positions only, so no number of the model can show this error."""
    job = partial(rotary_mismatch, weights=runner.weights("lvtc"), kind="packed")
    for error, expected in ((no_error, False), (positions_not_restarted, True)):
        results = runner.pool.run(2, partial(job, error=error), expand("pp=2"))
        assert {result["rotary"] > 0 for result in results} == {expected}
