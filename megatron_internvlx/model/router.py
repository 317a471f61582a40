"""Expert routing whose load-balancing loss has the weight of its coefficient, in every layout.

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

from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class LossWeightedRouter(TopKRouter):
    """Megatron's top-k router with a loss weight, which the decoder layer sets before each use."""

    loss_weight: Tensor | float = 0
    """Total loss weight of the micro-batch that is routed, a scalar."""

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, *args: Any, valid_token_count: Any = None, **kwargs: Any
    ) -> Tensor:
        """Attach the load-balancing loss as Megatron does, with the loss weight instead of the number of rows."""
        # The original multiplies by the size of the group, for its partial sums.
        count = self.loss_weight / self.tp_cp_group.size()
        return super().attach_and_log_load_balancing_loss(
            activation, *args, valid_token_count=count, **kwargs
        )


class LossWeightedMoELayer(MoELayer):
    """Megatron's experts layer, whose recomputation routes with the loss weight of its own micro-batch.

    When a micro-batch is recomputed, others have been routed since, so its weight is saved with it.
    """

    moe_layer_recompute: bool

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> Any:
        """Run the layer; with --recompute-modules moe the whole layer is recomputed here instead of in Megatron."""
        plain = super().forward
        if not (self.moe_layer_recompute and self.training):
            return plain(hidden_states, intermediate_tensors, padding_mask)
        assert intermediate_tensors is None, "partial CUDA graphs are refused"
        weight = self.router.loss_weight

        def run(hidden_states: Tensor, padding_mask: Tensor | None) -> Any:
            self.router.loss_weight, self.moe_layer_recompute = weight, False
            try:
                return plain(hidden_states, None, padding_mask)
            finally:
                self.moe_layer_recompute = True

        if not self.config.fp8:
            return tensor_parallel.checkpoint(run, False, hidden_states, padding_mask)
        from megatron.core.extensions.transformer_engine import te_checkpoint

        tracker = tensor_parallel.random.get_cuda_rng_tracker
        return te_checkpoint(run, False, tracker, self.tp_group, hidden_states, padding_mask)
