"""What docstrings, comments and documents of this project name is in it: files, and names of our modules."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.unit.test_ratchets import PACKAGE, ROOT, code_lines, sources, tracked

# A path in a folder of ours: in these whatever it is, elsewhere (where a run may write) a source or a document.
FILE = re.compile(
    r"(?<![\w/.:{-])((?:megatron_internvlx|benchmarks|docs|examples|golden|tests|tools)/[\w./*-]*\w"
    r"|(?:checkpoint|data|evaluation|hf|model|parallel|platform|training)/[\w./*-]*\.(?:py|md))"
)
# `module.Name` and `module.function()`: of one of our modules, unless it is a variable that is called like one.
NAME = re.compile(r"`(\w+)\.([A-Z]\w*|\w+(?=\(\)))(?:\(\))?`")


@cache
def words(module: str) -> frozenset[str] | None:
    """Every word in the code of our modules of this name; None if there is none."""
    paths = [path for path in sources(PACKAGE, "tools") if path.stem == module]
    code = "\n".join(line for path in paths for _, line in code_lines(path))
    return frozenset(re.findall(r"\w+", code)) if paths else None


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered pieces of a file that people read: docstrings and comments, or all of a document."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node.lineno, node.value.value


def missing(path: Path, text: str) -> Iterator[str]:
    """What a text of this file names although it is not there."""
    for name in FILE.findall(text):
        places = (ROOT, ROOT / PACKAGE, ROOT / "tests", path.parent)
        if not any(any(place.glob(name)) for place in places):
            yield name
    for module, name in NAME.findall(text):
        if (known := words(module)) is not None and name not in known:
            yield f"{module}.{name}"


def readable() -> list[Path]:
    documents = [path for path in tracked() if path.suffix == ".md" and path.name != "CHANGELOG.md"]
    return [*sources(PACKAGE, "tools"), ROOT / "pretrain_vlm.py", *documents]


def test_what_is_named_is_there() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in readable()
        for line, text in prose(path)
        for name in missing(path, text)
    ]
    assert found == []


def test_a_name_that_is_not_there_is_found() -> None:
    here = ROOT / PACKAGE / "model" / "pvtc.py"
    for text in ("see golden/SEMANTICS items 1-11", "see `boundary.Carried`", "see docs/none.md, below"):
        assert list(missing(here, text)), text
    for text in ("see `boundary.attach_carried`", "docs/data.md.", "data/plan.py", "`torch.Tensor`"):
        assert not list(missing(here, text)), text
