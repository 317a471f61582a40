"""Patches that the megatron-core wheel needs on every device."""

import importlib.util
from typing import Any


def use_shipped_index_helper() -> None:
    """Skip the compilation of the dataset index helper if the wheel contains the compiled module.

    `_compile_dependencies` runs `make` in site-packages, but the wheel has no Makefile, so the run would exit.
    Seen on megatron-core 0.19.2.
    """
    import megatron.core.datasets.utils as utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = _do_nothing


def _do_nothing(*_args: Any, **_kwargs: Any) -> None:
    return None
