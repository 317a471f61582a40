"""Steps of a training whose length is given in epochs."""

import pytest

from megatron_internvlx.config import DataSettings
from megatron_internvlx.data.epochs import epoch_steps
from megatron_internvlx.data.prepare import PrepareSettings, prepare
from tests.unit.data.conftest import DiskSet, record


@pytest.fixture
def meta(tmp_path):
    """7 records twice and 5 one and a half times: an epoch of 21."""
    disk = DiskSet(tmp_path)
    for name, count, repeat in (("a", 7, 2), ("b", 5, 1.5)):
        disk.add(name, [record(None, f"{name}{i}?", "Yes.") for i in range(count)], repeat_time=repeat)
    disk.manifest()
    return tmp_path / "meta.json"


@pytest.mark.parametrize(("epochs", "batch", "steps"), [(1, 4, 5), (2, 4, 10), (0.5, 2, 5), (1, 21, 1)])
def test_steps(meta, epochs, batch, steps):
    assert epoch_steps(DataSettings(data=str(meta), epochs=epochs), batch) == steps


def test_a_whole_number_of_steps_is_not_rounded_down(tmp_path):
    disk = DiskSet(tmp_path)
    disk.add("a", [record(None, f"{i}?", "Yes.") for i in range(100)])
    disk.manifest()
    assert 0.29 * 100 / 29 < 1
    assert epoch_steps(DataSettings(data=str(tmp_path / "meta.json"), epochs=0.29), 29) == 1


def test_both_loaders_count_alike(meta, tmp_path):
    prepare(meta, tmp_path / "out", PrepareSettings())
    with pytest.raises(ValueError, match="add --loader energon"):
        epoch_steps(DataSettings(data=str(tmp_path / "out"), epochs=1), 1)
    prepared = DataSettings(data=str(tmp_path / "out"), loader="energon", epochs=1)
    assert epoch_steps(prepared, 1) == epoch_steps(DataSettings(data=str(meta), epochs=1), 1) == 21


def test_less_than_a_step_is_refused(meta):
    with pytest.raises(ValueError, match="--epochs 1 of 21 records are less than one step"):
        epoch_steps(DataSettings(data=str(meta), epochs=1), 22)
