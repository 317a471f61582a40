"""What vLLM is told about an export, and the settings of an engine that are refused."""

from __future__ import annotations

import json
import logging
import os
from typing import Any

from megatron_internvlx.hf.configuration_internvlx import InternVLXConfig

_log = logging.getLogger("vllm.internvlx")
_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
_SCHEDULER = "megatron_internvlx.serving.cache.PhaseScheduler"


class ServedConfig(InternVLXConfig):
    """The exported configuration. With LVTC it asks vLLM for three positions per row, see `row_positions`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("mrope_section", None)
        super().__init__(*args, **kwargs)
        if self.injection_layers:
            self.mrope_section = [1, 1, 1]


def with_start(tokenizer: Any, template: str | None) -> str | None:
    """A chat template that begins with the token that `tokenizer` puts before a text, if it puts one.

    Chats are tokenized without such a token in vLLM, and with it in training and in transformers.
    """
    start = tokenizer.bos_token
    if not template or not start or tokenizer("")["input_ids"] != [tokenizer.bos_token_id]:
        return template
    begin = f"{{{{- {json.dumps(start)} }}}}"
    return template if "bos_token" in template or template.startswith(begin) else begin + template


def problems(engine: Any) -> list[str]:
    """Settings of an engine (vLLM's VllmConfig) with which an export does not run, each with the remedy."""
    model, parallel, cache = engine.model_config, engine.parallel_config, engine.cache_config
    text = model.hf_config.llm_config
    found = []
    if parallel.pipeline_parallel_size > 1:
        found.append(
            f"pipeline_parallel_size {parallel.pipeline_parallel_size}: vision features are needed in several "
            "layers, which one process must hold; use tensor_parallel_size"
        )
    if parallel.tensor_parallel_size > 1 and text.num_experts:
        found.append(
            f"tensor_parallel_size {parallel.tensor_parallel_size} with {text.num_experts} experts, which are not "
            "divided here; leave it at 1"
        )
    if engine.lora_config is not None:
        found.append("enable_lora: merge the adapter into the weights before the export")
    if engine.speculative_config is not None:
        found.append("speculative_config: drafted rows are not taken out of the shallow cache; leave it out")
    if model.quantization is not None:
        found.append(f"quantization {model.quantization}: not tested with these layers; leave it out")
    if cache.cache_dtype != "auto":
        found.append(f"kv_cache_dtype {cache.cache_dtype}: not tested with these layers; leave it at auto")
    if engine.kv_transfer_config is not None:
        found.append(
            "kv_transfer_config: the shallow cache has other lengths than a connector takes; leave it out"
        )
    if model.hf_config.injection_layers:
        if engine.scheduler_config.disable_hybrid_kv_cache_manager:
            found.append(
                "disable_hybrid_kv_cache_manager: shallow layers have a cache of their own; leave it out"
            )
        if parallel.decode_context_parallel_size > 1:
            found.append(
                "decode_context_parallel_size: shallow and deep rows divide differently; leave it at 1"
            )
        if os.environ.get(_RUNNER) == "1":
            found.append(f"{_RUNNER}=1: shallow rows are chosen in the first runner's steps; leave it unset")
        scheduler = engine.scheduler_config.scheduler_cls
        if scheduler not in (None, _SCHEDULER):
            found.append(f"scheduler_cls {scheduler}: LVTC needs {_SCHEDULER}; leave it out")
    return found


def image_rows(config: InternVLXConfig) -> int:
    """Rows of an image with the most tiles, with the marks around it."""
    tiles = config.max_dynamic_patch if config.dynamic_image_size else 1
    return (tiles + (config.use_thumbnail and tiles > 1)) * config.high_grid**2 + 2


class ServedSettings:
    """Checks and changes of an engine's settings, which vLLM calls once when an engine is made."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Leave the code in the directory alone: the plugin has the same, and its chat template (see `with_start`)."""
        model_config.trust_remote_code = False

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse what does not run, and set what LVTC needs.

        Raises:
            ValueError: settings that do not run, all of them.
        """
        found = problems(vllm_config)
        if found:
            raise ValueError("InternVL-X in vLLM does not run with\n  " + "\n  ".join(found))
        model, cache, scheduler = (
            vllm_config.model_config,
            vllm_config.cache_config,
            vllm_config.scheduler_config,
        )
        if not model.enforce_eager:
            _log.warning("enforce_eager is turned on: CUDA graphs and torch.compile are not supported")
            model.enforce_eager = True
        if not model.hf_config.injection_layers:
            return
        if cache.enable_prefix_caching:
            _log.warning(
                "enable_prefix_caching is turned off: shallow layers keep fewer rows than a prompt has, so that blocks "
                "of equal prompts do not begin at equal rows; enable_prefix_caching=False avoids this message"
            )
            cache.enable_prefix_caching = False
        # vLLM's default for a server is 2048 on CPUs and on GPUs below 70 GiB: less than 12 tiles of 256 rows.
        needed = image_rows(model.hf_config)
        if scheduler.max_num_batched_tokens < needed:
            _log.warning(
                f"max_num_batched_tokens is raised from {scheduler.max_num_batched_tokens} to {needed}, the rows of "
                "the largest image, which the model needs in one step"
            )
            scheduler.max_num_batched_tokens = needed
        os.environ[_RUNNER] = "0"
        scheduler.scheduler_cls = _SCHEDULER
        scheduler.async_scheduling = False
        scheduler.disable_chunked_mm_input = True  # an image is upsampled from all its rows together
