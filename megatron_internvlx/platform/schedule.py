"""A run that is resumed with another learning-rate schedule follows the one that it was given.

Seen on megatron-core 0.19.2. With `--override-opt-param-scheduler`, which our runs set, its scheduler takes the
new values; what is missing is here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
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
    "wd_incr_steps": "samples until the weight decay has changed",
    "init_lr": "--lr-warmup-init",
    "wsd_decay_steps": "samples of the WSD decay",
    "lr_wsd_decay_style": "--lr-wsd-decay-style",
}
_LEARNING_RATES = ("max_lr", "min_lr")
_NOT_SAVED = ("init_lr", "wsd_decay_steps", "lr_wsd_decay_style")  # by Megatron
_ONLY_WSD = ("wsd_decay_steps", "lr_wsd_decay_style")


class OtherGroups(ValueError):
    """The optimizer's parameter groups are not those of the checkpoint."""


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

    Raises OtherGroups for a group that the checkpoint does not have, among them those that nothing but learning
    rates tells apart (--decoupled-lr): Megatron's distributed optimizer would die of a KeyError.
    """
    from megatron.core.optimizer.optimizer import param_group_identifier_keys
    from megatron.training import get_args

    def values(group: dict, keys: Iterable[str]) -> tuple:
        return tuple(group.get(key, group.get(f"pre_{key}")) for key in keys)

    rest = [key for key in param_group_identifier_keys if key not in _LEARNING_RATES]
    ours, theirs = [values(group, rest) for group in current], [values(group, rest) for group in saved]
    for group, name in zip(current, ours, strict=True):
        if ours.count(name) == theirs.count(name) == 1:
            other = saved[theirs.index(name)]
            source, target = (
                (other, group) if get_args().use_checkpoint_opt_param_scheduler else (group, other)
            )
            target |= {key: source[key] for key in _LEARNING_RATES if key in source}
        elif values(group, param_group_identifier_keys) not in [
            values(other, param_group_identifier_keys) for other in saved
        ]:
            raise OtherGroups(_unlike(group, saved, rates_alone=name in theirs))


def _unlike(group: dict, saved: list[dict], *, rates_alone: bool) -> str:
    """Why a group is not among those of the checkpoint."""
    if not rates_alone:
        return (
            "the checkpoint's optimizer has other groups of parameters than this run: resume with the same --freeze-* "
            "and weight-decay flags, or take its weights alone with --pretrained-checkpoint and another --save"
        )

    def rates(one: dict) -> str:
        return f"{one.get('max_lr')} to {one.get('min_lr')}"

    return (
        "the learning rates of a run with --decoupled-lr cannot change when it resumes, because nothing else tells its "
        f"groups of parameters apart: the checkpoint has {', '.join(dict.fromkeys(map(rates, saved)))}, this run "
        f"{rates(group)}. Give the checkpoint's --lr, --min-lr, --decoupled-lr and --decoupled-min-lr"
    )


def announce_schedule_changes() -> None:
    """One line where a checkpoint's schedule and the arguments' differ: which of the two the run goes on with.

    Megatron saves neither where the warm-up begins nor the decay of WSD. They are saved here, and compared where
    the checkpoint has them; with --use-checkpoint-opt-param-scheduler they are taken from it as the others are.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    save, load = OptimizerParamScheduler.state_dict, OptimizerParamScheduler.load_state_dict

    @functools.wraps(save)
    def state_dict(self: Any) -> dict[str, Any]:
        return save(self) | {key: getattr(self, key) for key in _NOT_SAVED}

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        wanted = self.state_dict()
        if self.use_checkpoint_opt_param_scheduler:
            for key in _NOT_SAVED:
                setattr(self, key, state_dict.get(key, wanted[key]))
        load(self, state_dict)
        differ = [
            key
            for key in _NAMES
            if key in state_dict and state_dict[key] != wanted[key] and _counts(key, state_dict, wanted)
        ]
        if differ and is_first_rank():
            follows = "the arguments count" if self.override_opt_param_scheduler else "the checkpoint counts"
            changes = ", ".join(f"{_NAMES[key]} {state_dict[key]} -> {wanted[key]}" for key in differ)
            print(f"learning-rate schedule, checkpoint -> arguments: {changes}; {follows}", flush=True)

    put(OptimizerParamScheduler, state_dict=state_dict, load_state_dict=load_state_dict)


def _counts(key: str, *schedules: dict[str, Any]) -> bool:
    """Whether a setting has an effect in one of the schedules."""
    if key == "wd_incr_steps":
        return any(schedule["wd_incr_style"] != "constant" for schedule in schedules)
    return key not in _ONLY_WSD or any(schedule["lr_decay_style"] == "WSD" for schedule in schedules)
