"""Expert routing whose load-balancing loss weighs what its coefficient says, in every layout.

Megatron divides all gradients by the number of loss tokens, and multiplies the load-balancing loss by the
number of rows beforehand, as the two are nearly the same in text training. Here they are not: an image has
thousands of rows and its answer a few tokens, the two phases differ in rows, and --loss-weighting gives
tokens other weights. So the loss of a micro-batch is multiplied by what it is divided by later, its loss
weight: the result is coefficient * (mean over micro-batches, each weighing what its tokens weigh).

(With a padding mask and TP > 1, megatron-core 0.19.2 also takes the rows of all TP ranks for this rank's:
the sum over the group is made in place. Not using that number avoids it.)
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class LossWeightedRouter(TopKRouter):
    """Megatron's top-k router; the layer sets `loss_weight` before each use."""

    loss_weight: int = 0
    """Total loss weight of the micro-batch that is routed."""

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, *args: Any, valid_token_count: Any = None, **kwargs: Any
    ) -> Tensor:
        """Megatron's, with the micro-batch's loss weight in place of its row count."""
        # The original multiplies by the size of the group, for its partial sums.
        count = self.loss_weight / self.tp_cp_group.size()
        return super().attach_and_log_load_balancing_loss(
            activation, *args, valid_token_count=count, **kwargs
        )
