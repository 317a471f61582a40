"""A schedule that differs from the checkpoint's is said whole, and groups that cannot be paired are named."""

from argparse import Namespace
from typing import Any

from tests import single  # noqa: F401  # isort: skip  (sets Megatron up)
import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import global_vars

from megatron_internvlx.platform.schedule import ParameterGroupMismatch


def scheduler(**changes: Any) -> OptimizerParamScheduler:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
    settings: dict[str, Any] = {
        "init_lr": 0.0,
        "max_lr": 1.0,
        "min_lr": 0.0,
        "lr_warmup_steps": 10,
        "lr_decay_steps": 100,
        "lr_decay_style": "cosine",
        "start_wd": 0.1,
        "end_wd": 0.1,
        "wd_incr_steps": 100,
        "wd_incr_style": "constant",
        "use_checkpoint_opt_param_scheduler": False,
        "override_opt_param_scheduler": True,
    }
    return OptimizerParamScheduler(optimizer, **settings | changes)


WSD = {"lr_decay_style": "WSD", "wsd_decay_steps": 20, "lr_wsd_decay_style": "linear"}
RISING = {"wd_incr_style": "linear", "end_wd": 0.2}


@pytest.mark.parametrize(
    ("saved", "now", "said"),
    [
        (RISING, RISING | {"wd_incr_steps": 300}, "samples until the weight decay has changed 100 -> 300"),
        ({}, {"wd_incr_steps": 300}, None),  # the weight decay is constant
        ({}, {"init_lr": 0.5}, "--lr-warmup-init 0.0 -> 0.5"),
        (WSD, WSD | {"wsd_decay_steps": 30}, "samples of the WSD decay 20 -> 30"),
        (WSD, WSD | {"lr_wsd_decay_style": "cosine"}, "--lr-wsd-decay-style linear -> cosine"),
        ({}, {"wsd_decay_steps": 30, "lr_wsd_decay_style": "cosine"}, None),  # the decay is a cosine
    ],
)
def test_all_of_a_schedule_is_compared(saved: dict, now: dict, said: str | None, capsys) -> None:
    scheduler(**now).load_state_dict(scheduler(**saved).state_dict())
    wanted = said and f"learning-rate schedule, checkpoint -> arguments: {said}; the arguments are used\n"
    assert capsys.readouterr().out == (wanted or "")


def test_the_checkpoints_schedule_can_be_kept_whole(capsys) -> None:
    follows = {"use_checkpoint_opt_param_scheduler": True, "override_opt_param_scheduler": False}
    saved = scheduler(**WSD, init_lr=0.5)
    kept = scheduler(**WSD | {"wsd_decay_steps": 30, "lr_wsd_decay_style": "cosine"}, **follows)
    kept.load_state_dict(saved.state_dict())
    assert "the checkpoint is used" in capsys.readouterr().out
    for steps in (5, 80, 8):
        for one in (saved, kept):
            one.step(steps)
        assert kept.get_lr({}) == saved.get_lr({})


def test_a_checkpoint_of_megatrons_own_has_less_to_compare(capsys) -> None:
    saved = {key: value for key, value in scheduler().state_dict().items() if key != "init_lr"}
    scheduler(init_lr=0.5).load_state_dict(saved)
    assert capsys.readouterr().out == ""


def groups(*rates: tuple[float, float], wd_mult: float = 1.0) -> list[dict]:
    return [
        {"params": [], "wd_mult": wd_mult, "max_lr": high, "min_lr": low, "is_decoupled_lr": False}
        for high, low in rates
    ]


def load(now: list[dict], saved: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the groups are paired: the next thing that the stand-in is asked for is missing."""
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", Namespace(use_checkpoint_opt_param_scheduler=False))
    inner = Namespace(param_groups=now, state=[1], state_dict=lambda: {"param_groups": now})
    optimizer = Namespace(optimizer=inner, ddp_config=Namespace(use_megatron_fsdp=False))
    with pytest.raises(KeyError, match="'state'"):
        DistributedOptimizer.load_state_dict(optimizer, {"optimizer": {"param_groups": saved}})  # type: ignore[arg-type]


def test_groups_that_only_learning_rates_tell_apart(monkeypatch) -> None:
    saved = groups((1.0, 0.0), (0.1, 0.0))
    load(groups((1.0, 0.0), (0.1, 0.0)), saved, monkeypatch)
    with pytest.raises(
        ParameterGroupMismatch, match=r"checkpoint has 1.0 to 0.0, 0.1 to 0.0, this run 2.0 to 0.0\. Use"
    ):
        load(groups((2.0, 0.0), (0.1, 0.0)), saved, monkeypatch)
    load(groups((2.0, 0.0)), groups((1.0, 0.0)), monkeypatch)


def test_other_groups_are_named(monkeypatch) -> None:
    with pytest.raises(ParameterGroupMismatch, match="resume with the same --freeze"):
        load(groups((1.0, 0.0)), groups((1.0, 0.0), wd_mult=0.0), monkeypatch)
