"""Corrections needed by the megatron-core wheel on every device."""

import importlib.util
from typing import Any


def use_shipped_index_helper() -> None:
    """Do not compile the dataset index helper when the wheel brought it compiled.

    `_compile_dependencies` runs `make` in site-packages, but the wheel ships the compiled module without a
    Makefile, so the run would exit. Seen on megatron-core 0.19.2.
    """
    import megatron.core.datasets.utils as utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = _nothing


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None
