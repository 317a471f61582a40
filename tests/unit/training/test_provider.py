"""What the loaders are told: the budget of a sample, and whether samples are packed."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.single import single  # isort: skip  (sets Megatron up)
from megatron_internvlx.config import DataSettings, TrainSettings
from megatron_internvlx.data.packing import Budget
from megatron_internvlx.training import loader_state
from megatron_internvlx.training.provider import sample_budget

FIXED = TrainSettings(
    boundary="static",
    shallow_seq_length=512,
    max_tiles_per_pack=24,
    max_samples_per_pack=16,
    max_supervised_tokens_per_pack=200,
)
PACKED = DataSettings(packing=True, loader="energon")


@pytest.mark.parametrize(
    ("train", "data", "samples", "expected"),
    [
        (FIXED, PACKED, 1, Budget(512, 1024, 24, 16, 200)),
        (FIXED, DataSettings(), 1, Budget(512, 1024, 24, None, 200)),
        # Four samples of a micro-batch, or of an evaluation's, share what it is padded to.
        (FIXED, DataSettings(), 4, Budget(128, 256, 6, None, 50)),
        (FIXED, PACKED, 4, Budget(128, 256, 6, 4, 50)),
        (TrainSettings(shallow_seq_length=512), PACKED, 1, Budget(512, 1024, None, None, None)),
        (TrainSettings(), DataSettings(), 4, None),
    ],
)
def test_budget_of_a_sample(
    train: TrainSettings, data: DataSettings, samples: int, expected: Budget | None
) -> None:
    found = sample_budget(train, data, seq_length=1024, micro_batch_size=samples)
    assert found == expected


@pytest.mark.parametrize("packing", [True, False])
def test_only_packing_packs(monkeypatch: pytest.MonkeyPatch, packing: bool) -> None:
    """With static boundaries every sample has a budget, which alone says nothing."""
    single()
    given: list[Any] = []
    values = {
        DataSettings: DataSettings(packing=packing, loader="energon", data="x"),
        loader_state.Batches: SimpleNamespace(seed=1, micro_batch_size=3),
        loader_state.CheckpointFiles: None,
    }
    monkeypatch.setattr(loader_state, "settings_from", lambda args, kind: values[kind])
    monkeypatch.setattr(loader_state, "_resume", lambda files, data, step, settings: (None, settings))
    monkeypatch.setattr(loader_state, "EnergonBatches", lambda *words, **more: given.append(words[3]))
    decoder: Any = SimpleNamespace(travel=False)
    loader_state.energon_loader(SimpleNamespace(), None, None, None, decoder)  # type: ignore[arg-type]
    assert (given[0].packing, given[0].micro_batch_size) == (packing, 3)
