"""Missing files, directories in a file's place and numbers that mean nothing: one message, exit code 2."""

import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from megatron_internvlx.commands import check, convert, evaluate, plan, prepare_data, scaling, tiles
from tools import make_demo_data


def bomb(path: Path) -> None:
    """A PNG that claims 30,000 x 30,000 pixels."""
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", (30_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"), (b"IDAT", b"x")):
        content += len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    path.write_bytes(content)


GRID = "name: a\naxes: {seed: [1]}\n"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    bomb(tmp_path / "bomb.png")
    (tmp_path / "no_recipe.yaml").write_text(GRID + "base: {recipe: none.yaml}\n")
    (tmp_path / "list.yaml").write_text("[1]\n")
    (tmp_path / "base.yaml").write_text(GRID + "base: {recipe: list.yaml}\n")
    (tmp_path / "twice.yaml").write_text(GRID + "base: {}\nbase: {}\n")
    (tmp_path / "ranks.yaml").write_text(GRID + "base: {}\nranks: .nan\n")
    (tmp_path / "nodes.yaml").write_text(GRID + "base: {}\nslurm: {nodes: -1}\n")
    (tmp_path / "axes.yaml").write_text("name: a\nbase: {}\naxes: {seed: {one: 1}}\n")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


CASES: list[tuple[ModuleType, str, str]] = [
    (tiles, "bomb.png", "bomb.png: too large: must have at most 178,956,970 pixels"),
    (tiles, "none.png", "no such file"),
    (tiles, ".", "a directory, not an image"),
    (tiles, "bomb.png --low-ratio nan", "nan: must be a number at least 0 and at most 1"),
    (tiles, f"bomb.png --tile-size {10**30}", "must be a whole number between 1 and 65,536"),
    (tiles, "bomb.png --max-tiles -1", "-1: must be a whole number"),
    (scaling, "plan none.yaml", "none.yaml: No such file"),
    (scaling, "plan .", ".: Is a directory"),
    (scaling, "plan no_recipe.yaml", "none.yaml: No such file"),
    (scaling, "plan base.yaml", "list.yaml: must be a mapping"),
    (scaling, "plan list.yaml", "list.yaml: must be a mapping"),
    (scaling, "plan twice.yaml", "base is set twice, in lines 3 and 4"),
    (scaling, "plan ranks.yaml", "ranks is nan, must be a whole number of at least 1"),
    (scaling, "submit nodes.yaml", "nodes is -1, must be a whole number of at least 1"),
    (scaling, "plan axes.yaml", "axis seed: one is 1, must be a mapping of settings"),
    (scaling, "plan deep.yaml", "more than 20 levels of nesting"),
    (plan, "--bandwidth nan", "--bandwidth: nan: must be a number above 0 and at most 1e+09"),
    (plan, "--tflops inf", "--tflops: inf: must be a number above 0"),
    (plan, "--latency -1", "--latency: -1: must be a number at least 0"),
    (plan, f"--gpus {10**30}", "must be a whole number between 1 and 1,000,000"),
    (plan, "--virtual x", "--virtual: x: must be a whole number"),
    (check, "--megabytes 0", "--megabytes: 0: must be a whole number between 1 and 1,048,576"),
    (check, "--gpus -1", "--gpus: -1: must be a whole number"),
    (check, "--min-bandwidth nan", "--min-bandwidth: nan: must be a number at least 0"),
    (make_demo_data, f"--out x --train {10**30}", "must be a whole number between 1 and 10,000,000"),
    (make_demo_data, "--out x --seed -1", "--seed: -1: must be a whole number"),
    (prepare_data, "none.json out", "none.json"),
    (prepare_data, ". out", "."),
    (prepare_data, "none.json out --validation nan", "--validation: nan: must be a number"),
    (prepare_data, "none.json out --threads 0", "--threads: 0: must be a whole number"),
    (prepare_data, "stats none --tokenizer-model none --low-ratio nan", "--low-ratio: nan: must be a number"),
    (
        prepare_data,
        "stats none --tokenizer-model none --max-tiles 0",
        "--max-tiles: 0: must be a whole number",
    ),
    (prepare_data, "stats none --tokenizer-model none", "none"),
    (convert, "import --hf none --save x", "none"),
    (convert, "import --hf bomb.png --save x", "bomb.png"),
    (convert, "import --hf . --save x --high-ratio nan", "--high-ratio: nan: must be a number"),
    (convert, "import --hf . --save x --seed -1", "--seed: -1: must be a whole number"),
    (convert, "export --load none --hf x", "none"),
    (convert, "export --load bomb.png --hf x", "bomb.png"),
    (
        convert,
        "verify --hf . --inputs . --out x --tolerance nan",
        "--tolerance: nan: must be a number",
    ),
    (convert, "verify --hf none --inputs none --out x", "none"),
    (evaluate, "--hf none --data none.json", "none"),
    (evaluate, "--hf . --data .", "."),
    (evaluate, "--hf . --data . --limit -1", "must be a whole number of at least 1"),
]


@pytest.mark.parametrize(("tool", "command", "message"), CASES, ids=lambda value: str(value)[-60:])
def test_refused(
    tool: ModuleType,
    command: str,
    message: str,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    before = sorted(os.listdir(files))
    monkeypatch.setattr(sys, "argv", [f"{tool.__name__}.py", *command.split()])
    main: Callable[..., int] = tool.main
    try:
        code = main() if tool is plan else main(command.split())
    except SystemExit as ended:  # argparse
        code = int(ended.code or 0)
    shown = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert message in shown[-1] and "Traceback" not in "\n".join(shown)
    left = sorted(set(os.listdir(files)) - {"out"})  # prepare_data.py makes its directory first
    assert left == before  # nothing half-written
