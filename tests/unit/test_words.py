"""Docstrings and messages in plain English: no double backticks, and none of the phrases that we replaced."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_ratchets import PACKAGE, ROOT, sources

# Folders and files that follow the rules; in the end the whole package.
DONE = (
    *(
        f"{PACKAGE}/{room}/"
        for room in (
            "checkpoint",
            "chat",
            "commands",
            "data",
            "evaluation",
            "harness",
            "lifecycle",
            "model",
            "parallel",
            "planning",
            "platform",
            "reporting",
            "training",
        )
    ),
    *(
        f"{PACKAGE}/{name}.py"
        for name in (
            "arguments",
            "config",
            "exit_codes",
            "files",
            "launch",
            "megatron_settings",
            "paths",
            "precision",
            "ranges",
            "ranks",
            "recipe",
            "refusals",
        )
    ),
    *(f"{PACKAGE}/{name}.py" for name in ("signal_mask", "usage", "yaml_files")),
    "tools/",
)
# Phrase -> what to write instead.
PHRASES = {
    r"(?<!there )\b(is|are) no (?!longer\b|such\b)\w": "must be, is not",
    r"\bis neither\b": "must be",
    r"\bis none of\b": "must be one of",
    r"\bwants?\b": "must be, needs, expected",
    r"\bgo(es)? on\b": "continues, resumes",
    r"\bhave no place\b": "are not in",
    r"\bfor want of\b": "because ... is missing",
    r"\bwithout a word\b": "silently",
    r"\bsays? so\b": "reports it",
    r"\bwho(m|se)? knows?\b": "state the fact",
    r"^(What|Whose|Whom|Why|How|Where|When|Which|By which)\b": "a noun phrase or an imperative",
    r"\b(one|another)'s (is|are|may|can)\b": "name the thing",
}


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Numbered docstrings of a file, those of fields and constants included."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node.lineno, node.value.value


def messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Numbered texts of errors; a formatted value is `...`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for argument in node.exc.args:
                parts = [argument] if isinstance(argument, ast.Constant) else getattr(argument, "values", [])
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts)
                yield argument.lineno, text


def found_in(source: str) -> list[tuple[int, str]]:
    """Line and remedy of every phrase in a source that we decided against."""
    tree = ast.parse(source)
    wrong = [(line, "single backticks") for line, text in docstrings(tree) if "``" in text]
    for line, text in [*docstrings(tree), *messages(tree)]:
        plain = " ".join(re.sub(r"`[^`]*`|'[^' ]*'", "x", text).split())
        wrong += [
            (line, f"{match[0]!r}: {remedy}")
            for phrase, remedy in PHRASES.items()
            if (match := re.search(phrase, plain))
        ]
    return wrong


def done() -> list[Path]:
    return [path for path in sources(PACKAGE, "tools") if str(path.relative_to(ROOT)).startswith(DONE)]


def test_words_are_plain() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {remedy}"
        for path in done()
        for line, remedy in found_in(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_every_entry_is_there() -> None:
    names = [str(path.relative_to(ROOT)) for path in done()]
    assert [entry for entry in DONE if not any(name.startswith(entry) for name in names)] == []


@pytest.mark.parametrize(
    "source",
    [
        '"""A ``name`` in two backticks."""',
        'def f():\n    """Whose freezing it follows."""',
        'rate = 1\n"""How often it is drawn."""',
        'raise ValueError(f"{rate} is no share between 0 and 1")',
        'raise ValueError(f"--min-tiles {low}: " f"want 1 <= min")',
        'def f():\n    """Megatron takes random weights, without a word."""',
    ],
)
def test_what_we_decided_against_is_found(source: str) -> None:
    assert found_in(source)


def test_plain_words_pass() -> None:
    source = '"""Rate of dropped rows."""\nraise ValueError(f"--rate {rate} must be between 0 and 1")'
    assert not found_in(source)
