"""The help: short and fast, true, and not to be broken by a text of Megatron's."""

import argparse
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from tests import single  # noqa: F401  # isort: skip  (sets Megatron up)
import pytest
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import add_megatron_arguments

from megatron_internvlx import arguments, usage
from megatron_internvlx.config import SETTINGS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    monkeypatch.setattr(sys, "argv", ["pretrain_vlm.py"])
    plain = argparse.ArgumentParser(prog="pretrain_vlm.py", allow_abbrev=False)
    return arguments.add_our_arguments(add_megatron_arguments(plain))


def test_help_needs_neither_torch_nor_a_launcher() -> None:
    program = (
        "import runpy, sys\n"
        "sys.argv = ['pretrain_vlm.py', '--recipe', 'none.yaml', '--help']\n"
        "try:\n    runpy.run_path('pretrain_vlm.py', run_name='__main__')\n"
        "except SystemExit as end:\n    print(f'code {end.code}, torch', 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    *shown, end = done.stdout.splitlines()
    assert (end, done.stderr, done.returncode) == ("code 0, torch False", "", 0)
    assert len(shown) <= 120 and max(map(len, shown)) < 160
    assert "\n".join(shown) == "\n".join(usage.help_lines())


def test_help_shows_every_setting_of_ours_in_its_own_words() -> None:
    shown = "\n".join(usage.help_lines())
    for settings in SETTINGS:
        assert usage.field_docstrings(settings) == ArgumentGroupFactory(settings).field_docstrings
        for field in fields(settings):
            (line,) = [
                row for row in shown.splitlines() if row.startswith(f"  --{field.name.replace('_', '-')} ")
            ]
            assert usage.field_docstrings(settings)[field.name] in line
            assert field.default is None or field.default is False or line.endswith(f" [{field.default}]")


def test_what_the_help_says_of_megatrons_arguments_is_true(parser: argparse.ArgumentParser) -> None:
    actions = {action.dest: action for action in parser._actions}
    rows = [row for group in usage.MEGATRON.values() for row in group]
    assert 12 <= len(rows) <= 30
    for name, value, _ in rows:
        action = actions[name]
        assert f"--{name.replace('_', '-')}" in action.option_strings
        assert (value == "") == (action.nargs == 0)
        wanted = {"INT": int, "FLOAT": float}.get(value)
        assert wanted is None or action.type is wanted, name
        default = parser.get_default(name)
        if default is None or default is False:
            assert name not in usage.DEFAULTS
        else:
            assert usage.DEFAULTS[name] == default, name
    assert "recipe" in actions and "without" in actions


def test_no_text_breaks_the_help(parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture) -> None:
    for number, text in enumerate(("10%)", "%(nothing)s", "%d of %s", "100%")):
        parser.add_argument(f"--odd-{number}", help=text)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help-all"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("10%)", "%(nothing)s", "%d of %s", "100%"))
    for name in ("--lr", "--expand-layer", "--use-megatron-fsdp", "--recipe"):
        assert f"\n  {name} " in shown
    assert len(shown.splitlines()) > 1500
