"""Loader workers and host memory in the dry run."""

from typing import Any

import pytest

from megatron_internvlx.config import DataSettings
from megatron_internvlx.data.decode import ranks_cut
from megatron_internvlx.planning.loading import (
    BYTES_PER_TOKEN,
    FILE_BYTES_PER_TILE,
    GIB,
    HELD_OUT_BYTES,
    WORKER_BYTES,
    Loading,
    loading,
    loading_figures,
)

PACKED = {"loader": "energon", "image_decoder": "dali", "packing": True}


def of(data: dict[str, Any], **more: Any) -> Loading:
    """Loading of packs of 24 tiles and 8,192 tokens on 64 GPUs, TP 2, a micro-batch in 300 ms."""
    settings = DataSettings(**data)
    sizes: dict[str, Any] = {"tiles": 24, "tile_size": 448, "rows": 8192, "micro_batch_size": 1}
    sizes |= {"seconds": 0.3, "world": 64, "tensor": 2, "replicas": 32}
    sizes["files"] = ranks_cut(settings, on_gpu=True)
    return loading(settings, **(sizes | more))


def test_a_node_that_gets_files() -> None:
    plan = of(PACKED)
    assert (plan.sent, plan.workers, plan.replicas, plan.gpus) == ("files", 2, 4, 8)
    assert plan.processes == 8 * WORKER_BYTES["files"]
    assert plan.buffers == 8 * 1000 * 8192 * BYTES_PER_TOKEN
    # Two workers with two packs ready and one in the making; two taken ahead, two in the pipeline.
    assert plan.packs == 4 * (2 * 3 + 4) * 24 * FILE_BYTES_PER_TILE
    assert plan.held_out == 8 * HELD_OUT_BYTES
    assert loading_figures(plan)["loader_processes_per_node"] == 8
    text = "\n".join(plan.lines())
    assert "2 workers per replica send files, 8 processes on a node of 8 GPUs; 2 keep up" in text
    assert f"{plan.total / GIB:.1f} GiB per node at most" in text and "raise" not in text


def test_pixels_take_more_workers_and_the_report_says_how_many() -> None:
    """24 tiles of 16 ms / 7: 55 ms a micro-batch with DALI in the workers, 151 ms with Pillow, and one for text."""
    for decoder, seconds, needed in (("dali", 0.3, 2), ("dali", 0.05, 3), ("pillow", 0.05, 5)):
        plan = of(PACKED | {"image_decoder": decoder, "decode_at": "auto"}, files=False, seconds=seconds)
        assert (plan.sent, plan.needed) == (decoder, needed)
        assert (f"raise --loader-workers to {needed}" in plan.lines()[0]) == (needed > 2)
    assert plan.packs == 4 * (2 * 3 + 2) * 24 * 3 * 448**2
    assert plan.pinned == 8 * 24 * 3 * 448**2  # two micro-batches of which each rank pins its half


@pytest.mark.parametrize(
    ("sizes", "replicas", "gpus"),
    [
        ({"world": 256, "tensor": 8, "replicas": 8}, 1, 8),
        ({"world": 256, "tensor": 16, "replicas": 4}, 1, 8),
        ({"world": 1, "tensor": 1, "replicas": 1}, 1, 1),
        ({"world": 8, "tensor": 1, "replicas": 2}, 2, 8),  # the other stages do not load
        ({"world": 4, "tensor": 1, "replicas": 4}, 4, 4),
    ],
)
def test_loading_ranks_of_a_node(sizes: dict[str, int], replicas: int, gpus: int) -> None:
    plan = of(PACKED, **sizes)
    assert (plan.replicas, plan.gpus) == (replicas, gpus)


def test_without_workers_and_without_packing() -> None:
    alone = of({"loader_workers": 0})
    assert alone.sent == "pillow" and alone.processes == alone.held_out == alone.buffers == 0
    assert alone.lines() == ["loading      in the training process (--loader-workers 0)"]
    unpacked = of({"loader": "energon", "image_decoder": "dali"}, micro_batch_size=2)
    assert unpacked.buffers == 8 * 16 * 8192 * BYTES_PER_TOKEN


def test_the_machine_of_a_dry_run_does_not_decide_who_decodes() -> None:
    data = DataSettings(**PACKED)
    assert ranks_cut(data, on_gpu=True) and not ranks_cut(data, on_gpu=False)
    assert ranks_cut(DataSettings(**PACKED, decode_at="rank"), on_gpu=False)
