"""Imports run one way: an order of rooms (CONTRIBUTING.md has it as a drawing), and no circle of files."""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_internvlx"

# A room may import from those before it. Files of a line without order among them stand alone.
ORDER = [
    (
        "exit_codes",
        "yaml_files",
        "recipe",
        "files",
        "paths",
        "refusals",
        "ranges",
        "config",
        "lora_settings",
        "megatron_settings",
        "usage",
        "precision",
        "ranks",
        "signal_mask",
        "hf",
    ),
    ("platform",),
    ("data",),
    ("parallel",),
    ("model",),
    ("planning",),
    ("arguments",),
    ("training",),
    ("reporting",),
    ("lifecycle",),
    ("checkpoint",),
    ("evaluation",),
    ("harness",),
    ("serving",),
    ("chat",),
    ("launch",),
    ("commands",),
]
# Folders beside the package, in the order in which they may import each other: a later one from those before it.
FOLDERS = (PACKAGE, "tools", "testing", "benchmarks", "tests")
# An old address of a command, which leads to the new one.
ALIASES = {f"{PACKAGE}.training.resume"}
RANK = {room: number for number, line in enumerate(ORDER) for room in line}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports() -> dict[str, set[str]]:
    """Every module of the package -> modules of the package that it imports, at the top or inside functions."""
    paths = {module_name(path): path for path in (ROOT / PACKAGE).rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in paths.items():
        wanted = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                wanted |= {one if one in paths else node.module for one in inside}
            elif isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
        found[name] = wanted & paths.keys() - {name}
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def arrows_against_the_order(graph: dict[str, set[str]]) -> list[str]:
    wrong = []
    for source, targets in graph.items():
        for target in targets if source not in ALIASES else ():
            a, b = room(source), room(target)
            if a and b and a != b and RANK[a] < RANK[b]:
                wrong.append(f"{source} -> {target}")
    return sorted(wrong)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that import each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_every_room_has_a_place_in_the_order() -> None:
    rooms = {room(name) for name in imports()} - {""}
    assert rooms == RANK.keys()


def test_imports_run_one_way() -> None:
    assert arrows_against_the_order(imports()) == []


def test_no_circle_of_files() -> None:
    assert circles(imports()) == []


def arrows_between_folders(sources: dict[str, str]) -> list[str]:
    """Imports of a folder that comes later in FOLDERS, for the text of each file by its path."""
    wrong = []
    for path, text in sources.items():
        own = FOLDERS.index(path.split("/")[0])
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            tops = {name.split(".")[0] for name in names}
            wrong += [f"{path} -> {top}" for top in tops & set(FOLDERS[own + 1 :])]
    return sorted(wrong)


def test_folders_import_one_way() -> None:
    """Tests use benchmarks and what both share; nothing uses tests."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    sources = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}
    assert arrows_between_folders(sources) == []


def test_the_rules_see_what_breaks_them() -> None:
    assert arrows_between_folders({"benchmarks/a.py": "def f():\n    from tests.x import y"}) == [
        "benchmarks/a.py -> tests"
    ]
    assert arrows_between_folders({"tests/a.py": "import benchmarks.common"}) == []
    graph = defaultdict(
        set, {f"{PACKAGE}.data.plan": {f"{PACKAGE}.model.lvtc"}, f"{PACKAGE}.model.lvtc": set()}
    )
    assert arrows_against_the_order(graph) == [f"{PACKAGE}.data.plan -> {PACKAGE}.model.lvtc"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_the_drawing_names_every_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    drawing = text.split("## Imports run one way", 1)[1].split("\n## ", 1)[0]
    missing = [name for name in RANK if name not in drawing]
    assert not missing
    lines = [line for line in drawing.splitlines() if line.strip()]
    positions = [
        next(i for i, line in enumerate(lines) if line.startswith(f"    {rooms[0]}")) for rooms in ORDER
    ]
    assert positions == sorted(positions, reverse=True), "the drawing has another order than the test"


def test_ranks_are_read_in_one_place() -> None:
    """Elsewhere `ranks.py` is asked: what a launcher sets has one reading, and one default."""
    read = re.compile(r"environ(\.get\(|\[)\"(RANK|LOCAL_RANK|WORLD_SIZE|GROUP_WORLD_SIZE)\"")
    own = {"ranks.py", "platform/cpu.py", "arguments.py"}  # the others pretend to be launchers
    readers = {
        str(path.relative_to(ROOT / PACKAGE))
        for path in (ROOT / PACKAGE).rglob("*.py")
        if read.search(path.read_text(encoding="utf-8"))
    }
    assert readers <= own
