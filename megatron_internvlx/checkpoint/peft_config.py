"""Configuration of a PEFT directory: what is used of it, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_internvlx.checkpoint.checks import read_object
from megatron_internvlx.checkpoint.errors import ConversionError
from megatron_internvlx.checkpoint.peft_files import CONFIG

# Settings of PEFT that change what an adapter computes, with the values that ours computes.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "use_rslora": (False, True, None),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "use_qalora": (False,),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "use_bdlora": (None, False),
    "megatron_config": (None,),
}
# Initialisations that change the base's weights, of which the adapter is then a part.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass(frozen=True)
class PeftConfig:
    """Settings of an adapter_config.json."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    targets: str | tuple[str, ...]
    """Regular expression, or ends of module names."""
    excluded: str | tuple[str, ...]
    some_layers: bool
    """Only some layers have adapters."""
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    saved: tuple[str, ...] = ()
    """Ends of the names of modules that were trained whole."""

    def scale(self, module: str, rank: int) -> float:
        """Factor of a module's adapter of this rank."""
        alpha = self.alphas.get(_pattern(self.alphas, module), self.alpha)
        return alpha / (rank**0.5 if self.rslora else rank)

    def rank_of(self, module: str) -> int:
        """Rank of a module's adapter."""
        return self.ranks.get(_pattern(self.ranks, module), self.rank)

    def has_adapter(self, module: str) -> bool:
        """Whether the configuration names the module."""
        return _named(self.targets, module) and not _named(self.excluded, module)

    def saves(self, weight: str) -> bool:
        """Whether a weight belongs to a module that was trained whole."""
        return any(f".{name}." in f".{weight}" for name in self.saved)


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """Key of a rank or alpha pattern that fits a module, as PEFT finds it; "" if none does."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), "")


def _named(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def read_peft_config(directory: Path) -> PeftConfig:
    """Read adapter_config.json. Raises ConversionError for what our adapters do not compute, by name."""
    path = directory / CONFIG
    found = read_object(path)
    if found.get("peft_type") != "LORA":
        raise ConversionError(f"{path}: peft_type is {found.get('peft_type')!r}; only LORA can be imported")
    for name, values in _SUPPORTED.items():
        if name in found and found[name] not in values:
            raise ConversionError(
                f"{path}: {name} is {found[name]!r}; only {values[0]!r} can be imported. Merge the adapter into its "
                "base with peft (merge_and_unload), and import that"
            )
    initial = found.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_OTHER_BASE):
        raise ConversionError(
            f"{path}: init_lora_weights is {initial!r}, which changes the base's weights too; save the adapter with "
            "peft's path_initial_model_for_weight_conversion first"
        )
    rank, alpha, dropout = found.get("r"), found.get("lora_alpha", 0), found.get("lora_dropout", 0.0)
    if type(rank) is not int or not 1 <= rank <= 65_536:
        raise ConversionError(f"{path}: r is {rank!r}; it must be a whole number of at least 1")
    if not _is_number(alpha) or alpha <= 0 or not _is_number(dropout) or not 0 <= dropout < 1:
        raise ConversionError(
            f"{path}: lora_alpha is {alpha!r} and lora_dropout {dropout!r}; they must be a positive number, and one "
            "of at least 0 and below 1"
        )
    ranks, alphas = (found.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    if not (_is_pattern(ranks) and _is_pattern(alphas)):
        raise ConversionError(f"{path}: rank_pattern and alpha_pattern must be objects of positive numbers")
    return PeftConfig(
        rank, alpha, dropout, bool(found.get("use_rslora")),
        _module_names(path, found, "target_modules"), _module_names(path, found, "exclude_modules"),
        found.get("layers_to_transform") is not None, ranks, alphas, _saved_modules(path, found),
    )  # fmt: skip


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9


def _is_pattern(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    for key, number in value.items():
        try:
            re.compile(key)
        except re.error:
            return False
        if not _is_number(number) or number <= 0:
            return False
    return True


def _saved_modules(path: Path, found: Mapping[str, Any]) -> tuple[str, ...]:
    names = _module_names(path, found, "modules_to_save")
    return (names,) if isinstance(names, str) else names


def _module_names(path: Path, found: Mapping[str, Any], key: str) -> str | tuple[str, ...]:
    names = found.get(key) or ()
    if isinstance(names, str):
        if names == "all-linear":
            return ".*"
        try:
            re.compile(names)
        except re.error as error:
            raise ConversionError(f"{path}: {key} {names!r} is not a regular expression: {error}") from error
        return names
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ConversionError(f"{path}: {key} must be a list of names, or a regular expression")
    return tuple(names)
