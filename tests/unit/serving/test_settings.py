"""Settings of an engine that are refused, and those that are changed. Stand-ins for vLLM's configuration."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_internvlx.serving.settings import ServedConfig, ServedSettings, problems

LVTC = {"projector": "pvtc", "expand_layer": 2}


@pytest.fixture(autouse=True)
def runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of vLLM's runner, which the plugin makes, does not outlive a test."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "")


def engine(compression: dict[str, Any] = LVTC, experts: int = 0, **changes: Any) -> Any:
    """Settings as vLLM hands them over; `changes` by part__name."""
    config = ServedConfig(compression=compression, llm_config={"num_experts": experts})
    parts: dict[str, dict[str, Any]] = {
        "model": {"hf_config": config, "quantization": None, "enforce_eager": True},
        "parallel": {
            "pipeline_parallel_size": 1,
            "tensor_parallel_size": 1,
            "decode_context_parallel_size": 1,
        },
        "cache": {"cache_dtype": "auto", "enable_prefix_caching": False},
        "scheduler": {
            "disable_hybrid_kv_cache_manager": None,
            "scheduler_cls": None,
            "async_scheduling": True,
            "max_num_batched_tokens": 4096,
        },
    }
    whole = dict.fromkeys(("lora_config", "speculative_config", "kv_transfer_config"))
    for name, value in changes.items():
        part, _, field = name.partition("__")
        (parts[part] if field else whole)[field or part] = value
    return SimpleNamespace(
        **{f"{part}_config": SimpleNamespace(**values) for part, values in parts.items()}, **whole
    )


REFUSED = {
    "pipeline_parallel_size 2": {"parallel__pipeline_parallel_size": 2},
    "tensor_parallel_size 2 with 4 experts": {"parallel__tensor_parallel_size": 2, "experts": 4},
    "decode_context_parallel_size": {"parallel__decode_context_parallel_size": 2},
    "enable_lora": {"lora_config": object()},
    "speculative_config": {"speculative_config": object()},
    "kv_transfer_config": {"kv_transfer_config": object()},
    "quantization fp8": {"model__quantization": "fp8"},
    "kv_cache_dtype fp8": {"cache__cache_dtype": "fp8"},
    "disable_hybrid_kv_cache_manager": {"scheduler__disable_hybrid_kv_cache_manager": True},
    "scheduler_cls other.Scheduler": {"scheduler__scheduler_cls": "other.Scheduler"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServedSettings.verify_and_update_config(engine(**REFUSED[message]))


def test_all_of_them_at_once() -> None:
    assert len(problems(engine(lora_config=object(), cache__cache_dtype="fp8"))) == 2


def test_second_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=1"):
        ServedSettings.verify_and_update_config(engine())


def test_what_lvtc_needs(caplog: pytest.LogCaptureFixture) -> None:
    settings = engine(cache__enable_prefix_caching=True, model__enforce_eager=False)
    ServedSettings.verify_and_update_config(settings)
    assert settings.cache_config.enable_prefix_caching is False
    assert settings.model_config.enforce_eager is True
    scheduler = settings.scheduler_config
    assert scheduler.scheduler_cls == "megatron_internvlx.serving.cache.PhaseScheduler"
    assert scheduler.async_scheduling is False
    assert scheduler.disable_chunked_mm_input is True
    assert "enable_prefix_caching is turned off" in caplog.text
    assert "enforce_eager is turned on" in caplog.text
    ServedSettings.verify_and_update_config(settings)  # settings of the plugin's own are no reason to refuse


def test_a_step_holds_the_largest_image(caplog: pytest.LogCaptureFixture) -> None:
    settings = engine(scheduler__max_num_batched_tokens=2048)
    ServedSettings.verify_and_update_config(settings)
    assert settings.scheduler_config.max_num_batched_tokens == 13 * 256 + 2
    assert "raised from 2048 to 3330" in caplog.text
    settings = engine()
    ServedSettings.verify_and_update_config(settings)
    assert settings.scheduler_config.max_num_batched_tokens == 4096


def test_one_phase_is_left_as_it_is() -> None:
    settings = engine({"projector": "mlp", "expand_layer": None}, cache__enable_prefix_caching=True)
    ServedSettings.verify_and_update_config(settings)
    assert settings.cache_config.enable_prefix_caching is True
    assert settings.scheduler_config.scheduler_cls is None
    assert not hasattr(settings.model_config.hf_config, "mrope_section")


def test_three_positions_per_row_are_asked_for() -> None:
    config = ServedConfig(compression=LVTC)
    assert config.mrope_section == [1, 1, 1]
    assert ServedConfig.from_dict(config.to_dict()).mrope_section == [1, 1, 1]
