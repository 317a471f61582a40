"""The program that trains, as a file that Python and torchrun can start."""

from __future__ import annotations

from importlib.util import find_spec


def training_program() -> str:
    """Path of `pretrain_vlm.py`: in a checkout its root, in an installation beside the package.

    Raises:
        ValueError: it cannot be found.
    """
    found = find_spec("pretrain_vlm")
    if found is None or found.origin is None:
        raise ValueError("pretrain_vlm.py is not installed: install this package again")
    return found.origin
