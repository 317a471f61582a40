"""The command lines of tests/gpu, by their checks alone."""

import argparse
import sys

import pytest

from megatron_internvlx import platform

platform.setup()

from megatron.training.arguments import parse_args  # noqa: E402

from megatron_internvlx import arguments  # noqa: E402
from tests.gpu import production  # noqa: E402


@pytest.mark.parametrize("graph", [(), ("--cuda-graph-impl", "full_iteration")], ids=["eager", "graph"])
@pytest.mark.parametrize("name", production.GRAPH_CASES)
def test_steps_in_a_graph_have_valid_arguments(name: str, graph: tuple, monkeypatch) -> None:
    for variable, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(variable, value)
    precision, words, _ = production.GRAPH_CASES[name]
    monkeypatch.setattr(sys, "argv", ["test", *production.arguments(precision), *words, *graph])
    args: argparse.Namespace = parse_args(arguments.add_our_arguments)
    arguments.check_arguments(args)
    assert ("1,025" in name) == (args.image_size == 448)
    assert bool(args.fp8) == (precision != "bf16")
