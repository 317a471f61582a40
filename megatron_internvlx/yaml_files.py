"""YAML that people write: recipes and grids of experiments. One loader, which takes no file at its word.

Only plain data, no key twice (YAML itself takes the last, so that a line far below changes a run), and bounds
on size, nesting and what aliases stand for, so that no file can exhaust memory or the stack.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_NODES = 20_000  # values and keys, those that an alias repeats counted each time
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which stops before it recurses too deep."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.depth > MAX_DEPTH:
            line = self.peek_event().start_mark.line + 1
            raise ValueError(f"line {line}: more than {MAX_DEPTH} levels of nesting")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def load_yaml(path: str | Path) -> Any:
    """What a YAML file says.

    Raises ValueError, in one line and without the path: no such file, no text, no YAML, a key that is there
    twice (with both lines), or a file over the bounds of this module.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    if len(raw) > MAX_BYTES:
        raise ValueError(f"not read: it has more than {MAX_BYTES:,} bytes")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not YAML: it is not text ({error.reason})") from error
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _weigh(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"not YAML: {where}{error.problem or error.context}") from error
    except (yaml.YAMLError, ArithmeticError, LookupError, TypeError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error


def _weigh(node: yaml.Node, known: dict[int, int]) -> int:
    """Values and keys below a node, aliases written out; looks for keys that are there twice on the way."""
    line = node.start_mark.line + 1
    if id(node) in known:
        if known[id(node)] == 0:
            raise ValueError(f"line {line}: an alias that contains itself")
        return known[id(node)]
    known[id(node)] = 0
    below: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        below = node.value
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node, names=len(known) == 1)
        below = [part for pair in node.value for part in pair]
    weight = 1 + sum(_weigh(part, known) for part in below)
    if weight > MAX_NODES:
        raise ValueError(f"line {line}: more than {MAX_NODES:,} values, aliases written out")
    known[id(node)] = weight
    return weight


def _check_keys(node: yaml.MappingNode, *, names: bool) -> None:
    """Raises ValueError for a key that is there twice; with `names`, train-iters and train_iters are one."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        name, line = key.value.replace("-", "_") if names else key.value, key.start_mark.line + 1
        if name in lines:
            raise ValueError(f"{key.value} is set twice, in lines {lines[name]} and {line}: keep one of them")
        lines[name] = line
