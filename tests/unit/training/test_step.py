"""Loss weights: what training computes over micro-batches is the weighted mean over the global batch."""

from functools import partial

import numpy as np
import pytest
import torch

from tests.whole_model import micro_batch, plan_for, whole_model  # isort: skip  (sets Megatron up)
from megatron_internvlx.data.loss_weights import loss_weights, sample_weight
from megatron_internvlx.data.plan import PlanSettings, SequencePlan, build_plan
from megatron_internvlx.data.sample import filler_sample
from megatron_internvlx.model.internvit_config import internvit_preset
from megatron_internvlx.parallel.device_plan import DevicePlan, device_plan
from megatron_internvlx.training.step import ForwardStep, correct_answers

# Supervised tokens of every sample; a list per micro-batch. 0: a sample without any.
GLOBAL_BATCH = [[3, 1, 7], [2], [0, 5], [0], [40, 1]]


def plan_of(counts: list[int], spans: int = 1) -> SequencePlan:
    """Samples with so many supervised tokens, in `spans` spans as even as possible."""
    labels = []
    for count in counts:
        label = [-100]
        for part in np.array_split(np.arange(count), spans):
            label += [5] * len(part) + [-100]
        labels.append(np.array(label))
    ids = [np.full(len(label), 4) for label in labels]
    return build_plan(ids, labels, [np.zeros(len(x), bool) for x in ids], PlanSettings(1, 2))


def weighed(plan: SequencePlan, weighting: str, average: str = "global") -> DevicePlan:
    """The plan on the device with weights under a scheme."""
    return device_plan(plan, partial(loss_weights, weighting=weighting, average=average))


def direct(weighting: str, losses: list[torch.Tensor]) -> torch.Tensor:
    """Weighted mean over all samples of the global batch, from the definition of the scheme."""
    losses = [x for x in losses if len(x)]
    if weighting == "token":
        return torch.cat(losses).mean()
    factors = [1.0 if weighting == "sample" else len(x) ** 0.5 for x in losses]
    return sum(f * x.mean() for f, x in zip(factors, losses, strict=True)) / sum(factors)


@pytest.mark.parametrize("spans", [1, 2])
@pytest.mark.parametrize("weighting", ["token", "sample", "square"])
def test_weighted_mean_of_a_global_batch(weighting: str, spans: int) -> None:
    """Sums over micro-batches, then one division. Measured worst relative difference of gradients: 1.2e-7."""
    generator = torch.Generator().manual_seed(0)
    losses = [[torch.rand(n, generator=generator) for n in counts] for counts in GLOBAL_BATCH]
    leaves = [x.requires_grad_() for micro in losses for x in micro]
    step, total, reported = ForwardStep(), torch.zeros(()), torch.zeros(2)
    for counts, micro in zip(GLOBAL_BATCH, losses, strict=True):
        weighted, tokens, report = step.loss(
            weighed(plan_of(counts, spans), weighting), True, torch.cat(micro)
        )
        assert (tokens.dtype, tokens.item()) == (torch.int, sum(counts))  # Megatron's sum is an integer
        total, reported = total + weighted, reported + report["loss"]
    weights = step.weights.take(torch.device("cpu"))
    assert step.weights.take(torch.device("cpu")) == 0  # the next global batch starts anew
    assert reported.tolist() == pytest.approx([total.item(), weights.item()])
    ours = total / weights
    expected = direct(weighting, leaves)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    real = [x for x in leaves if len(x)]
    pairs = zip(torch.autograd.grad(ours, real), torch.autograd.grad(expected, real), strict=True)
    for mine, theirs in pairs:
        assert mine.tolist() == pytest.approx(theirs.tolist(), rel=1e-6)


def test_mean_of_micro_batch_means() -> None:
    """InternVL's trainer: every micro-batch is averaged alone, and their means count equally."""
    generator = torch.Generator().manual_seed(0)
    step, total, means = ForwardStep(), 0.0, []
    for counts in GLOBAL_BATCH:
        losses = torch.rand(sum(counts), generator=generator)
        plan = weighed(plan_of(counts), "token", "micro-batch")
        total += step.loss(plan, True, losses)[0].item()
        means += [losses.mean().item()] if sum(counts) else []
    assert total / step.weights.take(torch.device("cpu")) == pytest.approx(np.mean(means), rel=1e-6)


def test_weights_do_not_depend_on_packing() -> None:
    counts = np.array([1, 2, 3, 1000])
    assert sample_weight(counts, "token").tolist() == [1, 2, 3, 1000]
    assert sample_weight(counts, "sample").tolist() == [1, 1, 1, 1]
    assert sample_weight(counts, "square").tolist() == pytest.approx(
        [1, 2**0.5, 3**0.5, 1000**0.5], rel=1e-12
    )
    for weighting in ("token", "sample", "square"):
        packed = loss_weights(plan_of([3, 0, 8]), weighting)[1]
        apart = loss_weights(plan_of([3]), weighting)[1] + loss_weights(plan_of([8]), weighting)[1]
        assert packed == pytest.approx(apart, rel=1e-12)
        weights, total = loss_weights(plan_of([3, 0, 8]), weighting)
        assert weights.sum() == pytest.approx(total, rel=1e-6)
        assert len(set(weights[:3])) == len(set(weights[3:])) == 1  # equal inside a sample


@pytest.mark.parametrize("average", ["global", "micro-batch"])
def test_a_filler_weighs_nothing_and_is_not_asked(average: str) -> None:
    filler = filler_sample()
    parts = [filler.input_ids], [filler.labels], [filler.is_visual]
    plan = build_plan(*parts, PlanSettings(1, 2, alignment=8), [filler.number])
    assert len(plan.loss_rows) == 1
    weights, total = loss_weights(plan, "token", average)
    assert (weights.tolist(), total) == ([0], 0)
    answers: list = []
    step = ForwardStep(on_answers=lambda plan, predicted: answers.append(plan))
    right = torch.zeros(1)  # token 0, which the filler wants
    weighted, _, report = step.loss(
        weighed(plan, "token", average), False, torch.stack([torch.full((1,), 3.0), right])
    )
    assert (weighted.item(), report["loss"].tolist(), report["accuracy"].tolist()) == (0, [0, 0], [0, 0])


def test_unknown_weighting() -> None:
    with pytest.raises(ValueError, match="unknown loss weighting 'mean': must be token, sample or square"):
        sample_weight(np.array([1]), "mean")


@pytest.mark.parametrize("weighting", ["token", "sample", "square"])
@pytest.mark.parametrize("tiles", [0, 1])
def test_nothing_supervised(tiles: int, weighting: str) -> None:
    """Loss 0, weight 0, and zero gradients everywhere: such a micro-batch is a no-op, not a NaN."""
    vit = internvit_preset("internvit_tiny", image_size=28)
    model = whole_model(
        vit,
        vocab_size=11,
        rotary_base=1000,
        compression={"injection_layers": (1,), "low_grid": 1, "high_grid": 2},
    )
    visual = np.array([False, *[True] * 4 * tiles, False])
    labels = np.full(len(visual), -100)
    plan = plan_for(model, [np.full(len(visual), 3)], [labels], [visual])
    batch = micro_batch(plan, torch.rand(tiles, 3, 28, 28))
    step, weights = ForwardStep(), weighed(plan, weighting)
    loss, weight, report = step.loss(weights, True, model.train()(batch))
    assert (loss.item(), weight.item()) == (0, 0)
    assert report["loss"].tolist() == [0, 0]
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name  # NaN would count as nonzero
    with torch.no_grad():
        _, weight, report = step.loss(weights, False, model.eval()(batch))
    assert weight.item() == 0
    assert report["accuracy"].tolist() == [0, 0]


def test_answers_are_right_as_a_whole() -> None:
    plan = plan_of([5, 2], spans=2)  # answers of 3, 2, 1 and 1 tokens
    predicted = torch.tensor([5, 5, 5, 5, 6, 5, 0])
    assert [x.tolist() for x in correct_answers(plan, predicted)] == [[1, 0, 1, 0], [1, 1, 1, 1]]


def test_counters() -> None:
    """Rows, padding and tiles of training micro-batches; evaluation is not counted."""
    step = ForwardStep()
    ids = [np.array([1, 0, 0, 0, 0, 2])]
    visual = [np.array([False, True, True, True, True, False])]
    plan = build_plan(ids, ids, visual, PlanSettings(1, 2, alignment=8))

    class Stage:
        training = True

        def __call__(self, batch):
            return batch.tiles

    batch = micro_batch(plan, torch.zeros(1, 3, 4, 4))
    stage = Stage()
    step(iter([batch]), stage)
    step(iter([batch]), stage)
    step(iter([batch]), Stage())  # another virtual stage sees the same micro-batches
    stage.training = False
    step(iter([batch]), stage)
    taken = step.take()
    assert (taken.rows, taken.padding, taken.tiles) == (16, 4, 2)
    assert step.take().rows == 0
