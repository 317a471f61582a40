"""Rules of the house that a reader of one file cannot see being broken."""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_internvlx"
FILE_LINES, FUNCTION_LINES = 400, 80
NAMESPACE_READS = 60
"""Maximum number of names of arguments in the package: all other code takes typed settings."""

DEVICE_CALL = re.compile(r"torch\.cuda\.|\.cuda\(|device\s*=\s*[\"']cuda|torch\.device\([\"']cuda")
# Values of the device: each waits until it has done all that was asked of it.
READS_DEVICE = re.compile(
    r"\.(item|tolist|nonzero|cpu|numpy)\(|torch\.nonzero\(|torch\.unique\("
    r"|\.to\([^)]*?(device\s*=\s*)?(torch\.device\()?[\"']cpu"
)
# Where a read is no wait: values that are on the host anyway, or code outside the training step.
READS_ALLOWED = {
    "megatron_internvlx/parallel/batch.py": "plans are host tensors, exchanged over gloo",
    "megatron_internvlx/parallel/tiles.py": "files and pixels are host tensors, exchanged over gloo",
}
# An argument by its name in Megatron's namespace. Other namespaces have other names, such as `options`.
NAMESPACE_READ = re.compile(r"\bargs\.[a-z_]+")
MACHINE = re.compile(r"[\"'\s=(]/(root|home|work|mnt|Users)/[\w.-]")
REGISTRY = re.compile(r"pypi\.org|pythonhosted|download\.pytorch\.org|anaconda\.org|index-url\s*=\s*\w")


@cache
def tracked() -> tuple[Path, ...]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file())


def sources(*folders: str) -> list[Path]:
    names = tuple(f"{folder}/" for folder in folders)
    return [
        path
        for path in tracked()
        if path.suffix == ".py" and (not folders or str(path.relative_to(ROOT)).startswith(names))
    ]


def code_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without docstrings and comments."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                lines[number - 1] = ""
    for number, line in enumerate(lines, 1):
        if code := line.split("#", 1)[0].rstrip():
            yield number, code


def hits(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in code_lines(path)
        if pattern.search(line)
    ]


def test_only_the_platform_names_a_device() -> None:
    paths = [path for path in sources(PACKAGE, "tools") if f"/{PACKAGE}/platform/" not in str(path)]
    assert hits(DEVICE_CALL, [*paths, ROOT / "pretrain_vlm.py"]) == []


def test_forward_code_never_waits_for_the_device() -> None:
    found = hits(READS_DEVICE, sources(f"{PACKAGE}/model", f"{PACKAGE}/parallel"))
    assert [hit for hit in found if hit.split(":", 1)[0] not in READS_ALLOWED] == []
    assert set(READS_ALLOWED) <= {hit.split(":", 1)[0] for hit in found}, "an exception that nothing needs"


def test_namespace_is_read_where_arguments_are_parsed() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources(PACKAGE)
        for number, line in code_lines(path)
        for _ in NAMESPACE_READ.findall(line)
    ]
    assert len(found) <= NAMESPACE_READS, (
        f"{len(found)} arguments are read by name; take a typed object instead (config.settings_from): {found}"
    )


@pytest.mark.parametrize("pattern", [DEVICE_CALL, READS_DEVICE, NAMESPACE_READ, MACHINE, REGISTRY])
def test_patterns_find_what_they_are_for(pattern: re.Pattern[str]) -> None:
    examples = {
        DEVICE_CALL: ["x.cuda()", "torch.cuda.synchronize()", "torch.zeros(1, device='cuda')"],
        READS_DEVICE: [
            *("count.item()", "mask.nonzero()", "lengths.tolist()", "x.cpu()", "x.to('cpu')"),
            *('x.to(device="cpu")', "x.to(torch.device('cpu'))", "x.to(torch.float32, device='cpu')"),
        ],
        NAMESPACE_READ: ["x = args.seq_length", "if self.args.fp8:"],
        MACHINE: ["open('/" + "home/me/data')", "cd /" + "root/x"],
        REGISTRY: ["--index-url" + "=https://x", "https://py" + "pi.org/simple"],
    }
    assert all(pattern.search(example) for example in examples[pattern])


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines")
    assert long == []


def test_nothing_depends_on_a_machine_or_a_registry() -> None:
    found = []
    for path in tracked():
        if "golden" in path.parts or path.name in (
            "LICENSE",
            "Dockerfile",
            "cluster.md",
            "test_ratchets.py",
        ):  # itself: its patterns
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if MACHINE.search(line) or REGISTRY.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []
