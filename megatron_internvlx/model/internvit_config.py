"""Architecture settings of InternViT, its presets, and their Hugging Face `vision_config`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class InternViTConfig:
    """Architecture of an InternViT vision encoder.

    Raises:
        ValueError: if the numbers do not fit together.
    """

    hidden_size: int = 1024
    """Width of a token, in channels."""
    num_layers: int = 24
    """Number of transformer layers in the checkpoint."""
    num_heads: int = 16
    """Attention heads; they divide `hidden_size`. Any number works at any tensor-parallel size."""
    ffn_hidden_size: int = 4096
    """Inner width of the MLP, in channels."""
    patch_size: int = 14
    """Side of a patch, in pixels."""
    image_size: int = 448
    """Side of the square image that the position embedding was made for, in pixels; other sizes, also
    non-square ones, are interpolated."""
    num_channels: int = 3
    """Channels of a pixel."""
    norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """The two pre-norms of a layer. Queries and keys always use an RMS norm."""
    layer_norm_eps: float = 1e-6
    """Added to the variance or the mean square in every norm."""
    qkv_bias: bool = True
    """Whether the fused query-key-value projection has a bias; the other projections always have one."""
    qk_normalization: bool = False
    """RMS norm of queries and keys over all heads together. False: off."""
    layer_scale_init: float = 1.0
    """Initial value of the per-channel factor of each branch (`initializer_factor` in Hugging Face)."""
    drop_path_rate: float = 0.0
    """Probability that a tile skips a branch of the last layer; linear from 0 at the first. 0: off."""
    select_layer: int = -1
    """Hidden state that is the output: 0 the embeddings, n the output of the n-th layer, negative numbers
    count from the end (-1 the last). Layers above it are frozen and do not run."""
    initializer_range: float = 0.02
    """Standard deviation of freshly drawn weights and embeddings."""

    def __post_init__(self) -> None:
        least = {"num_layers": 0, "hidden_size": 1, "num_heads": 1, "ffn_hidden_size": 1, "patch_size": 1}
        for name, value in (least | {"image_size": 1, "num_channels": 1}).items():
            if getattr(self, name) < value:
                raise ValueError(
                    f"{name} {getattr(self, name)} of the vision encoder: it must be at least {value}"
                )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.norm_type not in ("layer_norm", "rms_norm"):
            raise ValueError(f"unknown norm_type {self.norm_type!r}: use layer_norm or rms_norm")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate {self.drop_path_rate} must be at least 0 and below 1")
        if not -self.num_layers - 1 <= self.select_layer <= self.num_layers:
            raise ValueError(
                f"select_layer {self.select_layer} is outside -{self.num_layers + 1}..{self.num_layers} "
                f"of an encoder with {self.num_layers} layers"
            )

    @property
    def patches_per_side(self) -> int:
        """P: patches per side of an image of `image_size`."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """1 + P*P: tokens per image of `image_size`, CLS first."""
        return 1 + self.patches_per_side**2

    @property
    def layers_run(self) -> int:
        """Number of layers that the selected hidden state needs."""
        return self.select_layer % (self.num_layers + 1)

    @classmethod
    def from_hf(cls, vision_config: Mapping[str, Any], *, select_layer: int = -1) -> "InternViTConfig":
        """Convert a Hugging Face `vision_config`.

        Args:
            vision_config: the mapping of that name in a released `config.json`; unknown keys are ignored,
                absent ones take the released class's defaults.
            select_layer: value of that name at the top level of `config.json`.

        Raises:
            ValueError: for a setting that this encoder does not have (dropout, another activation).
        """
        for name in ("dropout", "attention_dropout"):
            if vision_config.get(name, 0.0):
                raise ValueError(f"vision_config.{name} = {vision_config[name]} is not supported: only 0 is")
        if vision_config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(
                f"vision_config.hidden_act {vision_config['hidden_act']!r} is not supported: use gelu"
            )
        fields = {
            ours: vision_config.get(theirs, _RELEASED_DEFAULTS[theirs]) for ours, theirs in _HF_NAMES.items()
        }
        return cls(select_layer=select_layer, **fields)

    def to_hf(self) -> dict[str, Any]:
        """Convert to a Hugging Face `vision_config`, without `select_layer`, which is at the top level."""
        named = {theirs: getattr(self, ours) for ours, theirs in _HF_NAMES.items()}
        return {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            **named,
            "hidden_act": "gelu",
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "use_flash_attn": True,
        }


_HF_NAMES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "patch_size": "patch_size",
    "image_size": "image_size",
    "num_channels": "num_channels",
    "norm_type": "norm_type",
    "layer_norm_eps": "layer_norm_eps",
    "qkv_bias": "qkv_bias",
    "qk_normalization": "qk_normalization",
    "layer_scale_init": "initializer_factor",
    "drop_path_rate": "drop_path_rate",
    "initializer_range": "initializer_range",
}

# Of class InternVisionConfig in the released InternVL code: InternViT-6B-224px with 48 layers.
_RELEASED_DEFAULTS: dict[str, Any] = {
    "hidden_size": 3200,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "patch_size": 14,
    "image_size": 224,
    "num_channels": 3,
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "qkv_bias": False,
    "qk_normalization": True,
    "initializer_factor": 0.1,
    "drop_path_rate": 0.0,
    "initializer_range": 0.02,
}

_300M = InternViTConfig()
# 45 layers: InternViT-6B-448px-V1-2 and later, the encoder of InternVL2-26B and larger; V1-0 has 48.
_6B = InternViTConfig(
    hidden_size=3200,
    num_layers=45,
    num_heads=25,
    ffn_hidden_size=12800,
    norm_type="rms_norm",
    qkv_bias=False,
    qk_normalization=True,
    layer_scale_init=0.1,
)
_TINY = InternViTConfig(hidden_size=64, num_layers=3, num_heads=4, ffn_hidden_size=128, image_size=56)

_DEMO = InternViTConfig(
    hidden_size=96,
    num_layers=3,
    num_heads=4,
    ffn_hidden_size=384,
    image_size=112,
    patch_size=14,
    initializer_range=0.06,
)

PRESETS: dict[str, InternViTConfig] = {
    "internvit_300m": _300M,
    "internvit_6b": _6B,
    "internvit_6b_48l": replace(_6B, num_layers=48),
    "internvit_demo": _DEMO,
    # For tests: the shapes of the two golden models.
    "internvit_tiny": _TINY,
    "internvit_tiny_rms": replace(
        _TINY,
        ffn_hidden_size=160,
        image_size=112,
        norm_type="rms_norm",
        qkv_bias=False,
        qk_normalization=True,
    ),
}


def internvit_preset(name: str, **changes: Any) -> InternViTConfig:
    """Preset `name` with fields changed.

    Raises:
        ValueError: if there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown vision encoder {name!r}: use one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)
