"""Entry point of the plugin: what vLLM calls in each of its processes."""

ARCHITECTURE = "InternVLXForConditionalGeneration"


def register() -> None:
    """Tell vLLM about the exported architecture: model, configuration and checks."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from megatron_internvlx.serving.settings import ServedConfig, ServedSettings

    AutoConfig.register("internvlx", ServedConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"megatron_internvlx.serving.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ServedSettings
