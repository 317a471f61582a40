"""The layout that a command line and its recipe ask for, read before Megatron is imported."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_internvlx.yaml_files import load_yaml

_SIZES = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "dry_run_world_size": 0,
}


def fewest_ranks(sizes: Mapping[str, Any]) -> int:
    """Fewest ranks of a layout: tensor x pipeline x context parallel, in which experts must fit too."""
    pipeline = int(sizes["pipeline_model_parallel_size"])
    dense = int(sizes["tensor_model_parallel_size"]) * int(sizes["context_parallel_size"])
    experts = int(sizes["expert_model_parallel_size"])
    replicas = next(n for n in range(1, experts + 1) if dense * n % experts == 0)
    return pipeline * dense * replicas


def layout_sizes(words: Sequence[str]) -> dict[str, Any] | None:
    """Parallel sizes and the GPUs of a dry run, from the recipe and then the words; None if they are mistaken."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--recipe")
    peek.add_argument("--without", nargs="+", default=[])
    for name in _SIZES:
        peek.add_argument(f"--{name.replace('_', '-')}", type=int)
    try:
        given = vars(peek.parse_known_args(list(words))[0])
        recipe = load_yaml(given["recipe"]) if given["recipe"] else {}
        left_out = [name.lstrip("-").replace("-", "_") for name in given["without"]]
        stated = {str(key).replace("-", "_"): value for key, value in recipe.items()}
        found = dict(_SIZES)
        for name in _SIZES:
            if stated.get(name) is not None and name not in left_out:
                found[name] = int(stated[name])
            if given[name] is not None:
                found[name] = given[name]
    except (argparse.ArgumentError, OSError, ValueError, AttributeError, TypeError):
        return None  # the complete parser explains what is wrong
    return found if all(size >= 1 for name, size in found.items() if name != "dry_run_world_size") else None
