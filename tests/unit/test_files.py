"""Files that get their name when they are whole, and where checkpoints lie."""

from pathlib import Path

import pytest

from megatron_internvlx.files import atomic_path, checkpoint_directory, iterations, write_atomically


def test_a_file_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    with atomic_path(path) as partial:
        partial.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_old_file_is_there_and_no_other(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "rows.jsonl"
    write_atomically(path, "old")
    with pytest.raises(error), atomic_path(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoints_are_found_newest_first(tmp_path: Path) -> None:
    for name in ("iter_0000003", "iter_0000012", "iter_12", "broken_0000020", "iter_0000007.partial"):
        (tmp_path / name).mkdir()
    assert iterations(tmp_path) == [12, 3]
    assert checkpoint_directory(tmp_path, 12) == tmp_path / "iter_0000012"
