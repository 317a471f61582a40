"""Every pipeline, tensor, data and expert layout gives the numbers of one process.

`layout_cases.py` has the table and the limits; docs/layouts.md the measured differences.
"""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.boundary_table import CASES as BENCHMARKED
from tests.boundary_table import rows

from tests import layouts  # isort: skip  (sets Megatron up)
from megatron_internvlx.model.pvtc import PVTC
from megatron_internvlx.model.router import LossWeightedRouter
from tests.layout_cases import (
    ALWAYS,
    CASES,
    CURVES,
    SETTINGS,
    Case,
    Runner,
    compare,
    expand,
    merged,
    relative,
)

# Cases of `make test-fast`: one of each kind of crossing.
FAST = {"lvtc: tp=2 (2)", "lvtc: pp=2 per_stage=2 (2)", "frozen: pp=2 layers=E|ttt|tttt|tL static (2)"}


KEEP = ("grads", "weights")  # as `Runner.difference`, whose references serve here too


def marked(case: Case) -> object:
    return pytest.param(case, id=case.name, marks=() if case.name in FAST else pytest.mark.slow)


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_one_step(runner: Runner, case: Case) -> None:
    """Loss, every gradient and its norm, every weight after the optimizer's step; TP ranks agree."""
    assert not runner.difference(case).exceeded()


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=pytest.mark.heavy if number else pytest.mark.slow)
        for number, case in enumerate(CURVES)
    ],
)
def test_loss_curve(runner: Runner, case: Case) -> None:
    assert runner.curve(case) <= 1e-4


EVALUATION = "--train-iters 2 --eval-interval 1 --eval-iters 2 --eval-global-batch-size 8"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "layout"), [(2, "pp=2 per_stage=2"), (4, "pp=2 static zero overlap")], ids=str
)
def test_evaluation_between_steps(runner: Runner, ranks: int, layout: str) -> None:
    """Twice as many micro-batches as in training, then training goes on."""
    expected = runner.reference("lvtc", EVALUATION)
    found = runner.run(ranks, "lvtc", [*expand(layout), *EVALUATION.split()])
    assert len(found["valid"]) == len(expected["valid"]) >= 2
    for curve in ("losses", "valid"):
        values = found[curve].values() if curve == "losses" else found[curve]
        wanted = expected[curve].values() if curve == "losses" else expected[curve]
        assert list(values) == pytest.approx(list(wanted), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "saved", "then", "loaded"),
    [
        (2, "pp=2 per_stage=2", 4, "tp=2 sp pp=2"),
        (4, "tp=2 sp pp=2", 2, "pp=2 layers=E|tttt|ttt|tL"),
        (4, "pp=2 zero overlap", 4, "tp=2 sp pp=2 per_stage=2 zero overlap"),
    ],
    ids=str,
)
def test_checkpoint_moves_to_another_layout(
    runner: Runner, tmp_path: Path, ranks: int, saved: str, then: int, loaded: str
) -> None:
    """torch_dist, optimizer state included: two steps in one layout, two more in another."""
    expected = runner.reference("lvtc", "--train-iters 4")["losses"]
    save = f"--train-iters 2 --save {tmp_path} --save-interval 2 --dist-ckpt-optim-fully-reshardable"
    runner.run(ranks, "lvtc", [*expand(saved), *save.split()])
    load = f"--train-iters 4 --load {tmp_path} --override-opt-param-scheduler"
    job = partial(layouts.train, kind="packed")
    found = merged(runner.pool.run(then, job, [*ALWAYS.split(), *expand(loaded), *load.split()]))["losses"]
    assert sorted(found) == [3, 4]
    assert max(relative(found[step], expected[step]) for step in found) <= 1e-5


def test_one_broadcast_per_micro_batch(runner: Runner) -> None:
    """TP ranks get a plan in one broadcast, on every stage; the first plan of a run may need a second."""
    job = partial(layouts.train, weights=runner.weights("lvtc"), kind="single")
    for result in runner.pool.run(4, job, expand("tp=2 pp=2")):
        assert result["broadcasts"] == layouts.MICRO_BATCHES


@pytest.mark.slow
@pytest.mark.parametrize("case", [BENCHMARKED[2], BENCHMARKED[3]], ids=lambda case: case.name)
def test_bytes_follow_the_formula(runner: Runner, case: Case) -> None:
    """A frozen encoder gets no rows back, and nobody sends a shape; the benchmark asserts it."""
    assert len(list(rows(runner, case))) == 7


def test_the_table_covers_what_it_should() -> None:
    """At least 30 layouts, over 1, 2, 4 and 8 ranks, without doubles; the named fast ones exist."""
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 30
    assert {case.ranks for case in CASES} == {2, 4, 8}
    assert set(names) >= FAST


def test_comparison_sees_a_single_wrong_element() -> None:
    right = {
        "losses": {1: 2.0}, "norms": {1: 10**0.5}, "replicas": 0.0,
        "grads": {"a": torch.ones(10)}, "weights": {"a": torch.ones(10)},
    }  # fmt: skip
    wrong = torch.ones(10)
    wrong[3] += 2e-4
    assert not compare(right, right).exceeded()
    assert compare({**right, "grads": {"a": wrong}}, right).exceeded()
    assert compare({**right, "weights": {"a": wrong}}, right).exceeded()
    assert compare({**right, "losses": {1: float("nan")}}, right).exceeded()
    assert compare({**right, "norms": {1: 10.0001**0.5}}, right).exceeded()
    assert compare({**right, "replicas": 1e-7}, right).exceeded()


@pytest.mark.slow
def test_loose_comparison_sees_five_percent_in_one_layer(runner: Runner) -> None:
    """What bf16 may differ by is less than that, for every layer and projector."""
    right = runner.reference("bf16", keep=KEEP)
    parts = {name.rpartition(".self_attention.")[0] for name in right["grads"]} - {""}
    parts |= {name.rpartition(".attn_local.")[0] for name in right["grads"]} - {""}
    assert len(parts) == 3 + 8 + 3
    for part in sorted(parts):
        wrong = {n: 1.05 * g if n.startswith(part + ".") else g for n, g in right["grads"].items()}
        assert compare({**right, "grads": wrong}, right, loose=True).exceeded(), part


NOISE = "--projector-drop-path 0.3 --vision-drop-path 0.3 --hidden-dropout 0.1 --attention-dropout 0.1"


@pytest.mark.slow
def test_recompute_draws_the_same_again(runner: Runner) -> None:
    """With drop path and dropout everywhere, also where TP ranks draw for themselves.

    One process draws other numbers for tiles and sequence-parallel rows, so that layouts of this kind cannot
    be compared; the rows "drop" compare the projectors' drop path, which every TP rank draws alike.
    """
    plain, again = (
        runner.run(4, "lvtc", [*expand(layout), *NOISE.split()], keep=KEEP)
        for layout in ("tp=2 sp pp=2", "tp=2 sp pp=2 full")
    )
    assert again["losses"] == plain["losses"]
    # Replicas too, though each rank has seen other rows and tiles.
    assert not compare(again, plain).exceeded() and plain["replicas"] == 0
    steady, drop = (runner.reference(setting, keep=KEEP) for setting in ("lvtc", "drop"))
    assert compare(plain, steady).gradient > 0.1 and compare(drop, steady).gradient > 0.1


def routed(changes: list[str], **options: Any) -> dict[str, Any]:
    """`layouts.train`, keeping what the router of the last layer saw of each micro-batch, and its weight."""
    seen: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    original = LossWeightedRouter.forward

    def forward(self: LossWeightedRouter, rows: torch.Tensor, padding_mask: torch.Tensor) -> Any:
        if self.layer_number == 8:
            seen.append((rows.detach().clone().squeeze(1), self.weight.detach().clone(), self.loss_weight))
        return original(self, rows, padding_mask)

    with mock.patch.object(LossWeightedRouter, "forward", forward):
        return {**layouts.train(changes, **options), "routed": seen}


@pytest.mark.slow
def test_load_balancing_loss_adds_its_coefficient(runner: Runner) -> None:
    """Coefficient times Switch's loss, averaged over the tokens with a loss: in training as a whole."""
    seen = runner.run(1, "experts", [], function=routed)["routed"]
    assert len(seen) == layouts.MICRO_BATCHES
    router, total = seen[0][1].requires_grad_(), sum(tokens for _, _, tokens in seen)
    expected = torch.zeros(())
    for inputs, _, tokens in seen:
        probabilities = (inputs @ router.t()).softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(2).indices, 1.0)
        loss = 4 * (chosen.mean(0) / 2 * probabilities.mean(0)).sum()
        expected = expected + 1e-2 * loss * tokens / total
    expected.backward()
    name = "language_model.decoder.layers.7.mlp.router.weight"
    plain, balanced = (runner.reference(s, keep=KEEP)["grads"][name] for s in ("experts", "balanced"))
    # Measured: 3e-7. The loss makes up a third of this gradient.
    assert (balanced - plain - router.grad).norm() <= 1e-5 * router.grad.norm()
    assert router.grad.norm() > 0.1 * plain.norm()


def features_seen(changes: list[str], **options: Any) -> dict[str, Any]:
    """`layouts.train`, noting whether the projectors' input wants a gradient."""
    wanted: list[bool] = []
    original = PVTC.forward

    def forward(self: PVTC, features: torch.Tensor) -> torch.Tensor:
        wanted.append(features.requires_grad)
        return original(self, features)

    with mock.patch.object(PVTC, "forward", forward):
        return {**layouts.train(changes, **options), "wanted": wanted}


@pytest.mark.parametrize("setting", ["lvtc", "frozen"])
def test_no_gradient_of_frozen_features(runner: Runner, setting: str) -> None:
    """Under recomputation too, whose outputs want gradients whatever went in."""
    job = partial(features_seen, weights=runner.weights(setting))
    arguments = [*SETTINGS[setting].arguments.split(), *expand("pp=2 full")]
    for result in runner.pool.run(2, job, arguments):
        assert result["wanted"] and any(result["wanted"]) == (setting == "lvtc")
