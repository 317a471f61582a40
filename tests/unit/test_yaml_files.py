"""Files that would change a run in silence, or take the process with them, are refused in one line."""

from pathlib import Path

import pytest

from megatron_internvlx.yaml_files import MAX_BYTES, load_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


def load(tmp_path: Path, text: str | bytes) -> object:
    path = tmp_path / "file.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_yaml(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\nseed: 2\nlr: 3\n", "lr is set twice, in lines 1 and 3: keep one of them"),
        ("train-iters: 1\ntrain_iters: 3\n", "train_iters is set twice, in lines 1 and 2"),
        ("a:\n  b: 1\n  b: 2\n", "b is set twice, in lines 2 and 3"),
        ("a: " + "[" * 5000, "line 1: more than 20 levels of nesting"),
        ("a: " + "[" * 5000 + "]" * 5000, "line 1: more than 20 levels of nesting"),
        ("".join(" " * n + "a:\n" for n in range(500)), "line 21: more than 20 levels of nesting"),
        (BOMB, "values with aliases expanded"),
        ("list:\n- " + BOMB.replace("\n", "\n  "), "values with aliases expanded"),
        ("a: &a [1, *a]\n", "line 1: an alias that contains itself"),
        ("a: *b\n", "not YAML: line 1: found undefined alias 'b'"),
        ("a: [1\n", "not YAML: line 2: "),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor for the tag"),
        ("a: 2024-13-45\n", "month must be in 1..12"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        (b"\x89PNG\xff", "not YAML: it is not text"),
        ("a: \x07\n", "not YAML: unacceptable character"),
        ("# " + "x" * MAX_BYTES, "file too large: at most 1,048,576 bytes are allowed"),
    ],
    ids=range(17),
)
def test_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        load(tmp_path, text)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_no_file(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=message):
            load_yaml(path)


def test_what_people_write(tmp_path: Path) -> None:
    text = "base: &base {lr: 1.0e-3, layers: [4, 5]}\nsmall-1: {<<: *base, lr: 2}\nsmall_1: {<<: *base}\n"
    with pytest.raises(ValueError, match="small_1 is set twice"):
        load(tmp_path, text)
    found = load(tmp_path, "axes:" + f"\n{text.strip()}".replace("\n", "\n  "))
    assert isinstance(found, dict)
    assert found["axes"]["small-1"] == {"lr": 2, "layers": [4, 5]}
    assert found["axes"]["small_1"] == {"lr": 1.0e-3, "layers": [4, 5]}
    assert load(tmp_path, "") is None
