"""Configuration of InternVL-X with layer-wise token compression (remote code of this directory)."""

from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

MODEL_TYPE, MODEL_CLASS = "internvlx", "InternVLXForConditionalGeneration"

# `transformers serve` looks in these tables of names, which have no entry for code of a directory, whether it can load
# a model and whether the model takes images. With the name it loads the class that auto_map names.
for _table in ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"):
    getattr(modeling_auto, _table, {}).setdefault(MODEL_TYPE, MODEL_CLASS)


class InternVLXVisionConfig(PreTrainedConfig):
    """InternViT; the fields are those of the released `InternVisionConfig`."""

    model_type = "internvlx_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        patch_size=14,
        image_size=448,
        num_channels=3,
        norm_type="layer_norm",
        layer_norm_eps=1e-6,
        qkv_bias=True,
        qk_normalization=False,
        initializer_factor=1.0,
        initializer_range=0.02,
        **kwargs,
    ):
        kwargs.pop("model_type", None)
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.patch_size = patch_size
        self.image_size = image_size
        self.num_channels = num_channels
        self.norm_type = norm_type
        self.layer_norm_eps = layer_norm_eps
        self.qkv_bias = qkv_bias
        self.qk_normalization = qk_normalization
        self.initializer_factor = initializer_factor
        self.initializer_range = initializer_range


class InternVLXTextConfig(PreTrainedConfig):
    """A Llama-like decoder: InternLM2, Qwen2, Qwen3, Qwen3-MoE or Llama.

    `family` says which (it decides the bias of q, k, v and the norms of q and k); `num_experts` 0 is a
    dense model; `rope_parameters` holds rope_theta and, for Llama 3's scaling, its factors.
    """

    model_type = "internvlx_text"
    base_config_key = "llm_config"

    def __init__(
        self,
        family="qwen2",
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=None,
        rms_norm_eps=1e-6,
        rope_parameters=None,
        max_position_embeddings=32768,
        num_experts=0,
        num_experts_per_tok=0,
        moe_intermediate_size=0,
        tie_word_embeddings=False,
        use_cache=True,
        initializer_range=0.02,
        **kwargs,
    ):
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.max_position_embeddings = max_position_embeddings  # which the base class looks for with them
        kwargs.pop("model_type", None)
        super().__init__(**kwargs, tie_word_embeddings=tie_word_embeddings)  # type: ignore[call-arg]
        self.family = family
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.use_cache = use_cache
        self.initializer_range = initializer_range


class InternVLXConfig(PreTrainedConfig):
    """The whole model.

    `compression`: projector (pvtc or mlp), pixel_shuffle_version, expand_layer (None: one phase only),
    inject_layers, low_ratio and high_ratio (side of a tile's token grid over its patch grid, before and
    from expand_layer on), upsample (bilinear or nearest). Image settings are those of InternVL, and
    `rvtc`, the rule that limits the tiles of an image (edge, area or off); `rvtc_version` is that of the rules' names.
    """

    model_type = MODEL_TYPE
    sub_configs = {"vision_config": InternVLXVisionConfig, "llm_config": InternVLXTextConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config=None,
        llm_config=None,
        compression=None,
        select_layer=-1,
        image_token_id=None,
        force_image_size=448,
        dynamic_image_size=True,
        min_dynamic_patch=1,
        max_dynamic_patch=12,
        use_thumbnail=True,
        rvtc="edge",
        rvtc_version=2,
        template="internvl2_5",
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vision_config = _sub(InternVLXVisionConfig, vision_config)
        self.llm_config = _sub(InternVLXTextConfig, llm_config)
        self.compression = dict(compression or {"projector": "pvtc", "expand_layer": None})
        super().__init__(**kwargs, tie_word_embeddings=tie_word_embeddings)  # type: ignore[call-arg]
        self.vision_config = _sub(InternVLXVisionConfig, vision_config)
        self.llm_config = _sub(InternVLXTextConfig, llm_config)
        self.compression = dict(compression or {"projector": "pvtc", "expand_layer": None})
        self.select_layer = select_layer
        self.image_token_id = image_token_id
        self.force_image_size = force_image_size
        self.dynamic_image_size = dynamic_image_size
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
        self.use_thumbnail = use_thumbnail
        self.rvtc, self.rvtc_version = rvtc, rvtc_version
        self.template = template

    def get_text_config(self, *_args, **_kwargs):
        """The decoder's configuration, from which generation takes cache and vocabulary sizes."""
        return self.llm_config

    @property
    def patches(self):
        """Patches per tile side."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def injection_layers(self):
        """Decoder layers with a projector of their own: expand_layer first; empty: one phase only."""
        first = self.compression.get("expand_layer")
        return [] if first is None else [first, *sorted(self.compression.get("inject_layers") or [])]

    @property
    def high_grid(self):
        """Token grid side per tile in the deep layers."""
        return self.patches // round(1 / self.compression.get("high_ratio", 0.5))

    @property
    def low_grid(self):
        """Token grid side per tile in the shallow layers; `high_grid` where there are none."""
        if not self.injection_layers:
            return self.high_grid
        return self.patches // round(1 / self.compression.get("low_ratio", 0.25))


def _sub(kind, value):
    """A part of the configuration, from a dictionary or as it is."""
    return value if isinstance(value, PreTrainedConfig) else kind(**(value or {}))
