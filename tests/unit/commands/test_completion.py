"""The script for a shell, run by bash: commands, options, values, directories and files."""

import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_internvlx.commands import completion, registry

# Calls the function as bash would at a press of Tab, and prints what it offers.
TAB = """
source {script}
complete -p ivlx >/dev/null || exit 1
while IFS= read -r line; do
  eval "COMP_WORDS=($line)"
  COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
  _ivlx
  (IFS=','; echo "${{COMPREPLY[*]}}")
done
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shell") / "ivlx.bash"
    path.write_text(completion.bash_script())
    return path


def press_tab(script: Path, folder: Path, *lines: str) -> list[list[str]]:
    """Offers for each line, whose last word is being typed; "" as the last word is an empty one."""
    done = subprocess.run(
        ["bash", "--norc", "-c", TAB.format(script=script)], input="\n".join(lines) + "\n", cwd=folder, text=True,
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [line.split(",") if line else [] for line in done.stdout.splitlines()]


def test_bash(script: Path, tmp_path: Path) -> None:
    for name in ("one", "my model"):
        (tmp_path / name).mkdir()
    (tmp_path / "one.jpg").touch()
    offers = press_tab(
        script, tmp_path,
        "ivlx ''", "ivlx ex", "ivlx import --ex", "ivlx import --projector ''", "ivlx import --hf ''",
        "ivlx tiles o", "ivlx scaling ''", "ivlx completion z", "ivlx train --pipeline-model-parallel-s",
        "ivlx help ev", "ivlx nothing --x", "ivlx train --rvtc ''",
    )  # fmt: skip
    assert offers[0] == [*(one.name for one in registry.COMMANDS), "help", "--help", "--version"]
    assert offers[1:4] == [["export"], ["--expand-layer"], ["pvtc", "mlp"]]
    assert [sorted(names) for names in offers[4:6]] == [["my model", "one"], ["one", "one.jpg"]]
    assert offers[6:11] == [
        ["plan", "submit", "report"], ["zsh"], ["--pipeline-model-parallel-size"], ["evaluate"], [],
    ]  # fmt: skip
    assert set(offers[11]) == {"area", "edge", "off"}


def test_every_option_is_offered(script: Path, tmp_path: Path) -> None:
    offers = press_tab(script, tmp_path, *(f"ivlx {one.name} -" for one in registry.COMMANDS))
    for command, offered in zip(registry.COMMANDS, offers, strict=True):
        flags = {flag for action in command.parser()._actions for flag in action.option_strings}
        assert set(offered) == flags and len(offered) == len(flags)


def test_zsh_has_the_same_words(tmp_path: Path) -> None:
    text = completion.zsh_script()
    for command in registry.COMMANDS:
        words = completion.words_of(command)
        assert f"    '{command.name}:" in text
        assert f"options=({' '.join(words.options)})" in text
    assert "@" not in text and text.count("case ") == text.count("esac")
    if zsh := shutil.which("zsh"):
        path = tmp_path / "_ivlx"
        path.write_text(text)
        assert subprocess.run([zsh, "-n", str(path)], capture_output=True).stderr == b""
