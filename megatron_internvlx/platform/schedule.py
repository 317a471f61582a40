"""Patches for resuming with a changed learning-rate schedule: the arguments override the checkpoint.

Seen on megatron-core 0.19.2. With `--override-opt-param-scheduler`, which our runs set, its scheduler uses the
new values; these patches add the missing parts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from megatron_internvlx.platform.cpu import set_attributes
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


class ParameterGroupMismatch(ValueError):
    """Error: the optimizer's parameter groups differ from those of the checkpoint."""


def allow_learning_rate_changes() -> None:
    """Let optimizers load a checkpoint whose parameter groups have other learning rates.

    Megatron matches the saved and the current groups by all their attributes, including the peak and the final
    learning rate: with another --lr it finds no match, and the distributed optimizer fails with a KeyError.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    load, pair = DistributedOptimizer.load_state_dict, MegatronOptimizer._filter_and_reorder_param_groups

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        _copy_learning_rates(self.optimizer.param_groups, state_dict["optimizer"]["param_groups"])
        load(self, state_dict)

    @functools.wraps(pair)
    def filter_and_reorder(current_groups: list[dict], state_dict_groups: list[dict]) -> list[dict]:
        _copy_learning_rates(current_groups, state_dict_groups)
        return pair(current_groups, state_dict_groups)

    set_attributes(DistributedOptimizer, load_state_dict=load_state_dict)
    set_attributes(MegatronOptimizer, _filter_and_reorder_param_groups=staticmethod(filter_and_reorder))


def _copy_learning_rates(current: list[dict], saved: list[dict]) -> None:
    """Give matching groups equal learning rates: the arguments', or the checkpoint's if the user asked for them.

    Raises ParameterGroupMismatch for a group that is not in the checkpoint, instead of the KeyError of Megatron's
    distributed optimizer. This includes groups that differ from each other only in learning rates (--decoupled-lr).
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
            raise ParameterGroupMismatch(_explain_group_mismatch(group, saved, rates_alone=name in theirs))


def _explain_group_mismatch(group: dict, saved: list[dict], *, rates_alone: bool) -> str:
    """Reason why a group matches none of the checkpoint."""
    if not rates_alone:
        return (
            "the parameter groups of the checkpoint's optimizer differ from this run's: resume with the same "
            "--freeze-* and weight-decay flags, or load only its weights with --pretrained-checkpoint and "
            "another --save"
        )

    def rates(one: dict) -> str:
        return f"{one.get('max_lr')} to {one.get('min_lr')}"

    return (
        "with --decoupled-lr the learning rates cannot change on resume, because its parameter groups differ only in "
        f"them: the checkpoint has {', '.join(dict.fromkeys(map(rates, saved)))}, this run "
        f"{rates(group)}. Use the checkpoint's --lr, --min-lr, --decoupled-lr and --decoupled-min-lr"
    )


def announce_schedule_changes() -> None:
    """Print one line if a checkpoint's schedule differs from the arguments', and which of the two is used.

    Megatron does not save the start of the warm-up and the WSD decay. This patch saves them and compares them if
    the checkpoint has them; with --use-checkpoint-opt-param-scheduler they are loaded like the other values.
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
            if key in state_dict and state_dict[key] != wanted[key] and _has_effect(key, state_dict, wanted)
        ]
        if differ and is_first_rank():
            follows = (
                "the arguments are used" if self.override_opt_param_scheduler else "the checkpoint is used"
            )
            changes = ", ".join(f"{_NAMES[key]} {state_dict[key]} -> {wanted[key]}" for key in differ)
            print(f"learning-rate schedule, checkpoint -> arguments: {changes}; {follows}", flush=True)

    set_attributes(OptimizerParamScheduler, state_dict=state_dict, load_state_dict=load_state_dict)


def _has_effect(key: str, *schedules: dict[str, Any]) -> bool:
    """Whether a setting has an effect in at least one of the schedules."""
    if key == "wd_incr_steps":
        return any(schedule["wd_incr_style"] != "constant" for schedule in schedules)
    return key not in _ONLY_WSD or any(schedule["lr_decay_style"] == "WSD" for schedule in schedules)
