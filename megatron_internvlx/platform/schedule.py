"""A run that is resumed with another learning-rate schedule follows the one that it was given.

Seen on megatron-core 0.19.2. With `--override-opt-param-scheduler`, which our runs set, its scheduler takes the
new values; what is missing is here.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron_internvlx.platform.cpu import put
from megatron_internvlx.ranks import is_first_rank

_NAMES = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_decay_style": "--lr-decay-style",
    "lr_warmup_steps": "samples of warm-up",
    "lr_decay_steps": "samples until the learning rate has decayed",
    "start_wd": "weight decay",
    "end_wd": "weight decay at the end",
    "wd_incr_style": "--weight-decay-incr-style",
}
_LEARNING_RATES = ("max_lr", "min_lr")


def let_learning_rates_change() -> None:
    """Optimizers take a checkpoint whose parameter groups have other learning rates.

    Megatron finds the saved group of a present one by all that tells groups apart, the peak and the end of the
    learning rate among it: with another --lr it finds none, and the distributed optimizer dies of a KeyError.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    load, pair = DistributedOptimizer.load_state_dict, MegatronOptimizer._filter_and_reorder_param_groups

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        _give_rates(self.optimizer.param_groups, state_dict["optimizer"]["param_groups"])
        load(self, state_dict)

    @functools.wraps(pair)
    def filter_and_reorder(current_groups: list[dict], state_dict_groups: list[dict]) -> list[dict]:
        _give_rates(current_groups, state_dict_groups)
        return pair(current_groups, state_dict_groups)

    put(DistributedOptimizer, load_state_dict=load_state_dict)
    put(MegatronOptimizer, _filter_and_reorder_param_groups=staticmethod(filter_and_reorder))


def _give_rates(current: list[dict], saved: list[dict]) -> None:
    """Groups that differ in learning rates alone get the same: the present ones, or those of the checkpoint.

    A group that nothing else tells apart from another keeps its own, and Megatron says that it is not found.
    """
    from megatron.core.optimizer.optimizer import param_group_identifier_keys
    from megatron.training import get_args

    def rest(group: dict) -> tuple:
        keys = (key for key in param_group_identifier_keys if key not in _LEARNING_RATES)
        return tuple(group.get(key, group.get(f"pre_{key}")) for key in keys)

    ours, theirs = [rest(group) for group in current], [rest(group) for group in saved]
    for group, name in zip(current, ours, strict=True):
        if ours.count(name) == theirs.count(name) == 1:
            other = saved[theirs.index(name)]
            source, target = (
                (other, group) if get_args().use_checkpoint_opt_param_scheduler else (group, other)
            )
            target |= {key: source[key] for key in _LEARNING_RATES if key in source}


def announce_schedule_changes() -> None:
    """One line where a checkpoint's schedule and the arguments' differ: which of the two the run goes on with."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    original = OptimizerParamScheduler.load_state_dict

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        wanted = self.state_dict()
        original(self, state_dict)
        differ = [key for key in _NAMES if key in state_dict and state_dict[key] != wanted[key]]
        if differ and is_first_rank():
            follows = "the arguments count" if self.override_opt_param_scheduler else "the checkpoint counts"
            changes = ", ".join(f"{_NAMES[key]} {state_dict[key]} -> {wanted[key]}" for key in differ)
            print(f"learning-rate schedule, checkpoint -> arguments: {changes}; {follows}", flush=True)

    put(OptimizerParamScheduler, load_state_dict=load_state_dict)
