"""Safe loader for YAML files written by users: recipes and grids of experiments.

It accepts plain data only and rejects duplicate keys (YAML would silently use the last one). Size, nesting and
expanded aliases are limited, so that no file can exhaust memory or the stack.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_NODES = 20_000  # values and keys, with aliases expanded
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with a limit on nesting."""

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
    """Load the content of a YAML file.

    Raises a one-line ValueError, without the path: no such file, not text, not YAML, a duplicate key (with
    both line numbers), or a file above this module's limits.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    if len(raw) > MAX_BYTES:
        raise ValueError(f"file too large: at most {MAX_BYTES:,} bytes are allowed")
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
            _count_values(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"not YAML: {where}{error.problem or error.context}") from error
    except (yaml.YAMLError, ArithmeticError, LookupError, TypeError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error


def _count_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values and keys below a node, with aliases expanded; checks for duplicate keys too."""
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
    weight = 1 + sum(_count_values(part, known) for part in below)
    if weight > MAX_NODES:
        raise ValueError(f"line {line}: more than {MAX_NODES:,} values with aliases expanded")
    known[id(node)] = weight
    return weight


def _check_keys(node: yaml.MappingNode, *, names: bool) -> None:
    """Raise ValueError for a duplicate key; with `names`, train-iters and train_iters are the same key."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        name, line = key.value.replace("-", "_") if names else key.value, key.start_mark.line + 1
        if name in lines:
            raise ValueError(f"{key.value} is set twice, in lines {lines[name]} and {line}: keep one of them")
        lines[name] = line
