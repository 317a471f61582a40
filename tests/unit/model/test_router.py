"""The experts' load-balancing loss against its formula, in plain torch."""

from tests.whole_model import micro_batch, plan_for, whole_model  # isort: skip  (sets Megatron up)
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from megatron_internvlx.data.plan import IGNORE
from megatron_internvlx.model.internvit_config import InternViTConfig
from megatron_internvlx.model.internvlx import InternVLX
from megatron_internvlx.model.router import LossWeightedRouter
from megatron_internvlx.parallel.batch import MicroBatch

EXPERTS, TOP, COEFFICIENT, LAYERS = 4, 2, 0.1, 3
VISION = InternViTConfig(
    hidden_size=16, num_layers=1, num_heads=2, ffn_hidden_size=24, patch_size=4, image_size=32
)


def model_with_experts(coefficient: float) -> InternVLX:
    """Shallow and deep layers with experts; the same weights every time."""
    model = whole_model(
        VISION,
        vocab_size=61,
        rotary_base=1000,
        compression={"injection_layers": (1,), "low_grid": 2},
        num_layers=LAYERS,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOP,
        moe_ffn_hidden_size=24,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="aux_loss" if coefficient else "none",
        moe_aux_loss_coeff=coefficient,
        calculate_per_token_loss=True,
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def batch(model: InternVLX) -> MicroBatch:
    """Two samples of 0 and 2 tiles and rows of padding; five tokens with a loss."""
    rng = np.random.default_rng(0)
    ids, labels, visual = [], [], []
    for tiles, text, answer in ((0, 9, 3), (2, 6, 2)):
        rows = 16 * tiles
        ids.append(np.concatenate([np.zeros(rows, int), rng.integers(1, 61, text)]))
        visual.append(np.arange(rows + text) < rows)
        labels.append(np.where(np.arange(rows + text) >= rows + text - answer, ids[-1], IGNORE))
    plan = plan_for(model, ids, labels, visual, alignment=32)
    tiles = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return micro_batch(plan, tiles)


@contextmanager
def routed() -> Iterator[list[tuple[LossWeightedRouter, Tensor]]]:
    """(router, rows) of every use of a router, in the graph."""
    uses: list[tuple[LossWeightedRouter, Tensor]] = []
    original = LossWeightedRouter.forward

    def forward(self, rows: Tensor, padding_mask: Tensor):
        uses.append((self, rows))
        return original(self, rows, padding_mask)

    with mock.patch.object(LossWeightedRouter, "forward", forward):
        yield uses


def balance(rows_Sh: Tensor, weight_Eh: Tensor) -> Tensor:
    """E * sum over experts of (share of the assignments) * (mean probability); 1 if all are alike."""
    probabilities = (rows_Sh @ weight_Eh.t()).softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(TOP).indices, 1.0)
    return EXPERTS * (chosen.mean(0) / TOP * probabilities.mean(0)).sum()


def test_loss_weighs_its_coefficient_times_the_tokens_with_a_loss() -> None:
    """Every gradient, through all layers behind: training divides all of it by the same number of tokens."""
    plain, balanced = model_with_experts(0.0), model_with_experts(COEFFICIENT)
    packed = batch(plain)
    assert len(packed.plan.targets) == 5
    with routed() as uses:
        loss = plain(packed).sum()
    extra = torch.zeros(())
    # Rows of the two samples: 9 of text and 6, and two tiles of 4 shallow or 16 deep rows.
    for (router, rows), real in zip(uses, (23, 47, 47), strict=True):
        assert real < rows.shape[0]
        extra = extra + COEFFICIENT * 5 * balance(rows.flatten(0, 1)[:real], router.weight)
    assert balance(torch.zeros(6, 2), torch.zeros(EXPERTS, 2)) == 1
    parameters = list(plain.parameters())
    without = torch.autograd.grad(loss, parameters, retain_graph=True)
    added = torch.autograd.grad(extra, parameters, allow_unused=True, materialize_grads=True)
    balanced(packed).sum().backward()
    effects = []
    for (name, ours), main, more in zip(balanced.named_parameters(), without, added, strict=True):
        wanted = main + more
        # Measured: 8e-7.
        assert (ours.grad - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name
        if name.endswith("router.weight"):
            effects.append((more.abs().max() / wanted.abs().max()).item())
    assert len(effects) == LAYERS and min(effects) > 0.02
