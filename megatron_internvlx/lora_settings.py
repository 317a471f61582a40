"""Settings of LoRA adapters, and the parts of the model that they may be added to."""

import re
from dataclasses import dataclass

TARGETS = {
    "decoder_attention": "llm",
    "decoder_mlp": "llm",
    "vision": "vision",
    "projectors": "projectors",
}
"""Names of --lora-targets, and the part of the model whose weights an adapter there freezes."""
_DECODER, _VISION = r"language_model\.decoder\.layers\.\d+\.", r"vision_model\.encoder\.layers\.\d+\."
_LAYERS = {
    "decoder_attention": re.compile(rf"{_DECODER}self_attention\.linear_(qkv|proj)"),
    "decoder_mlp": re.compile(rf"{_DECODER}mlp\.linear_fc[12]"),
    "vision": re.compile(rf"{_VISION}(self_attention\.linear_(qkv|proj)|mlp\.linear_fc[12])"),
    "projectors": re.compile(r"(.*\.)?projector\.(.*\.)?linear(_\w+)?"),
}
DEFAULT_TARGETS = ("decoder_attention", "decoder_mlp")


def target_of(layer: str) -> str | None:
    """Name in --lora-targets of the adapter beside a linear layer, given its full name; None: it gets none."""
    return next((target for target, names in _LAYERS.items() if names.fullmatch(layer)), None)


@dataclass
class LoraSettings:
    """LoRA: small trained matrices beside frozen linear layers.

    The weights of a part with adapters are frozen, whether or not a --freeze flag names it. Other parts are trained
    whole unless a --freeze flag names them.
    """

    lora_rank: int | None = None
    """Rank of the adapters that are trained instead of the weights beside them. Unset: no adapters."""
    lora_alpha: float | None = None
    """Scale of an adapter's output, divided by the rank. Unset: twice the rank."""
    lora_dropout: float = 0.0
    """Dropout rate of an adapter's input. 0: off."""
    lora_targets: list[str] | None = None
    """Linear layers with adapters: decoder_attention, decoder_mlp, vision, projectors. Unset: both of the decoder."""
    lora_rslora: bool = False
    """Divide --lora-alpha by the square root of the rank instead of the rank."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the linear layers that get adapters, in the order of `TARGETS`; () without LoRA."""
        if self.lora_rank is None:
            return ()
        chosen = DEFAULT_TARGETS if self.lora_targets is None else self.lora_targets
        return tuple(name for name in TARGETS if name in chosen)

    @property
    def parts(self) -> frozenset[str]:
        """Parts of the model with adapters, whose own weights are frozen: llm, vision, projectors."""
        return frozenset(TARGETS[name] for name in self.targets)

    @property
    def alpha(self) -> float:
        """Value of --lora-alpha, or its default. Needs a rank."""
        assert self.lora_rank is not None
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def scale(self) -> float:
        """Factor of an adapter's output. Needs a rank."""
        assert self.lora_rank is not None
        return self.alpha / (self.lora_rank**0.5 if self.lora_rslora else self.lora_rank)


def check_lora(settings: LoraSettings, experts: int, hidden_size: int, *, fuses_operations: bool) -> None:
    """Check the adapters' settings against each other and the model. Raises ValueError.

    Args:
        settings: the settings.
        experts: experts of a decoder layer; 0 for a dense model.
        hidden_size: width of the decoder.
        fuses_operations: --use-transformer-engine-op-fuser, which runs an MLP without calling its linear layers.
    """
    if settings.lora_rank is None:
        given = {
            "--lora-alpha": settings.lora_alpha is not None,
            "--lora-dropout": settings.lora_dropout != 0,
            "--lora-targets": settings.lora_targets is not None,
            "--lora-rslora": settings.lora_rslora,
        }
        if flags := [flag for flag, on in given.items() if on]:
            raise ValueError(
                f"{', '.join(flags)}: without --lora-rank there are no adapters; add --lora-rank 16, or remove "
                f"{'it' if len(flags) == 1 else 'them'}"
            )
        return
    chosen = settings.lora_targets
    unknown = sorted(set(chosen or ()) - TARGETS.keys())
    if unknown or chosen == []:
        raise ValueError(
            f"--lora-targets {' '.join(unknown) or '(empty)'}: must be some of {', '.join(TARGETS)}"
        )
    if chosen is not None and len(set(chosen)) != len(chosen):
        raise ValueError(f"--lora-targets {' '.join(chosen)} names a target twice")
    if settings.lora_rank > hidden_size:
        raise ValueError(
            f"--lora-rank {settings.lora_rank} is more than the model's --hidden-size {hidden_size}: an adapter would "
            "be larger than the weight beside it; ranks of 8 to 128 are usual"
        )
    if experts and "decoder_mlp" in settings.targets:
        rest = [name for name in settings.targets if name != "decoder_mlp"] or ["decoder_attention"]
        raise ValueError(
            f"--lora-targets decoder_mlp: the {experts} experts of a layer get no adapters; give --lora-targets "
            f"{' '.join(rest)}"
        )
    if fuses_operations:
        raise ValueError(
            "--use-transformer-engine-op-fuser runs an MLP without calling its linear layers, whose adapters would "
            "have no effect: remove it, or --lora-rank"
        )
