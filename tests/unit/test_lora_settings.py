"""Settings of adapters: their defaults, scale and parts, and what is refused."""

from typing import Any

import pytest

from megatron_internvlx.config import TrainSettings, frozen_parts, untrained_parts
from megatron_internvlx.lora_settings import LoraSettings, check_lora


def check(experts: int = 0, hidden: int = 64, fuses: bool = False, **given: Any) -> None:
    check_lora(LoraSettings(**given), experts, hidden, fuses_operations=fuses)


def test_defaults_of_a_rank() -> None:
    lora = LoraSettings(lora_rank=16)
    assert (lora.alpha, lora.scale) == (32.0, 2.0)
    assert lora.targets == ("decoder_attention", "decoder_mlp") and lora.parts == {"llm"}
    assert LoraSettings(lora_rank=16, lora_alpha=8, lora_rslora=True).scale == 2.0
    assert LoraSettings().targets == () and LoraSettings().parts == frozenset()


def test_a_part_with_adapters_is_frozen_and_still_trained() -> None:
    lora = LoraSettings(lora_rank=4, lora_targets=["vision", "decoder_mlp"])
    for train in (TrainSettings(), TrainSettings(freeze_vision=True, freeze_llm=True)):
        assert frozen_parts(train, lora) == {"vision", "llm"}
        assert untrained_parts(train, lora) == frozenset()
    rest = TrainSettings(freeze_projectors=True)
    assert frozen_parts(rest, lora) == {"vision", "llm", "projectors"}
    assert untrained_parts(rest, lora) == {"projectors"}
    assert frozen_parts(rest, LoraSettings()) == untrained_parts(rest, LoraSettings()) == {"projectors"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"lora_alpha": 8.0, "lora_rslora": True},
            "--lora-alpha, --lora-rslora: without --lora-rank .* them",
        ),
        ({"lora_dropout": 0.1}, "--lora-dropout: without --lora-rank .* remove it"),
        ({"lora_targets": ["vision"]}, "--lora-targets: without --lora-rank"),
        ({"lora_rank": 4, "lora_targets": ["q_proj"]}, "--lora-targets q_proj: must be some of decoder_att"),
        ({"lora_rank": 4, "lora_targets": []}, r"--lora-targets \(empty\): must be some of"),
        ({"lora_rank": 4, "lora_targets": ["vision", "vision"]}, "names a target twice"),
        ({"lora_rank": 65}, "--lora-rank 65 is more than the model's --hidden-size 64"),
        ({"lora_rank": 4, "experts": 8}, "8 experts .* give --lora-targets decoder_attention"),
        (
            {"lora_rank": 4, "experts": 8, "lora_targets": ["decoder_mlp", "vision"]},
            "give --lora-targets vision",
        ),
        ({"lora_rank": 4, "fuses": True}, "--use-transformer-engine-op-fuser .* remove it"),
    ],
)
def test_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(**given)


def test_allowed() -> None:
    check()
    check(lora_rank=64)
    check(lora_rank=4, experts=8, lora_targets=["decoder_attention", "projectors"])
