"""The program `ivlx`: its list, help without anything heavy, suggestions, one table of exit codes."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from PIL import Image

from megatron_internvlx import exit_codes
from megatron_internvlx.commands import ivlx, registry
from megatron_internvlx.commands.help import CommandParser, help_text

ROOT = Path(__file__).parents[3]
NAMES = [one.name for one in registry.COMMANDS]
HEAVY = ("torch", "megatron", "numpy", "PIL", "transformers", "matplotlib", "mlflow", "nvidia")
# Prints the help of every command in one process, and then what was imported for it.
HELP = """
import contextlib, io, json, sys
from megatron_internvlx.commands import ivlx, registry
said = {}
for words in [["--help"], ["--version"], ["nonsense"], *([one.name, "--help"] for one in registry.COMMANDS)]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = ivlx.main(words)
    said[words[0]] = [code, out.getvalue()]
json.dump([said, sorted({name.partition(".")[0] for name in sys.modules})], sys.stdout)
"""
# Runs commands in one process in which Megatron cannot be imported.
WITHOUT_MEGATRON = """
import sys
sys.modules["megatron"] = None
from megatron_internvlx.commands import ivlx
codes = [ivlx.main(words) for words in (
    ["tiles", "a.png"], ["check", "--node", "--scratch", "."], ["doctor", "--json", "--scratch", "."],
)]
import megatron_internvlx.evaluation.run
print("codes", codes, file=sys.stderr)
"""


def python(program: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "110"}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def helps() -> tuple[dict[str, tuple[int, str]], list[str]]:
    done = python(HELP)
    assert (done.returncode, done.stderr) == (0, "")
    said, imported = json.loads(done.stdout)
    return said, imported


def test_help_imports_nothing_heavy(helps) -> None:
    _, imported = helps
    assert set(HEAVY) & set(imported) == set()


def test_the_list_has_every_command_in_its_group(helps) -> None:
    code, text = helps[0]["--help"]
    assert code == 0
    lines = text.splitlines()
    places = [next(i for i, line in enumerate(lines) if line.startswith(f"  {name} ")) for name in NAMES]
    assert places == sorted(places)
    assert all(one.summary in lines[place] for one, place in zip(registry.COMMANDS, places, strict=True))
    assert all(title in lines for title, _ in registry.groups())
    assert "docs/commands.md" in text and max(map(len, lines)) < 120


def test_every_help_has_the_same_parts(helps) -> None:
    for name in NAMES:
        code, text = helps[0][name]
        assert code == 0
        assert text.startswith(f"usage: ivlx {name} "), name
        assert text.count("\n\n") >= 3 and max(map(len, text.splitlines())) <= 118, name
        if isinstance(registry.find(name).parser(), CommandParser):
            assert "\nExamples\n  " in text and "\nExit codes\n  0    " in text, name
            assert re.search(rf"^  (source <\(|torchrun .*|ivlx {name}\b)", text, re.M), name


def test_version_and_wrong_words(helps) -> None:
    assert helps[0]["--version"][1].startswith("megatron-internvlx ")
    assert helps[0]["nonsense"] == [2, "ivlx: nonsense is not a command (ivlx --help lists the commands)\n"]


def test_the_installed_program_is_this_one() -> None:
    (found,) = entry_points(group="console_scripts", name="ivlx")
    assert found.load() is ivlx.main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian --recipe x", "trian is not a command: did you mean train?"),
        ("evalute", "did you mean evaluate?"),
        ("eval", "did you mean evaluate?"),
        ("convert", "did you mean import?"),
        ("dryrun", "did you mean dry-run?"),
        ("--recipe x", "--recipe is not a command: options come after the command"),
        ("evaluate --hff x --dat y", "unknown option --hff: did you mean --hf?, --dat: did you mean --data?"),
        ("import --hf a --save b --expand-layr 3", "--expand-layr: did you mean --expand-layer?"),
        ("tiles a.png --max-tile 3", "--max-tile: did you mean --max-tiles?"),
        ("tiles a.png b.png", "unexpected argument b.png"),
        ("evaluate --hf .", "the following arguments are required: --data"),
        ("export --load x --hf y --dtype int8", "choose from 'float32', 'bfloat16', 'float16'"),
        ("scaling plann x.yaml", "choose from 'plan', 'submit', 'report'"),
        ("train --gpus 8", "unknown option --gpus: did you mean --ranks?"),
        ("train --ranks 0", "--ranks: 0: must be a whole number between 1 and 4,096"),
        ("dry-run --nproc-per-node=8", "--nproc-per-node=8: did you mean --ranks?"),
        ("import --hf OpenGVLab/InternVL2-8B --save x",
         "hf download OpenGVLab/InternVL2-8B --local-dir InternVL2-8B"),
        ("evaluate --hf OpenGVLab/InternVL2-8B --data x", "--hf OpenGVLab/InternVL2-8B: no such directory"),
        ("completion fish", "choose from 'bash', 'zsh'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_with_a_remedy(words: str, said: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = ivlx.main(words.split())
    except SystemExit as ended:
        code = ended.code
    shown = capsys.readouterr()
    assert code == exit_codes.MISTAKE
    assert said in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    assert shown.err.startswith("ivlx") and not list(tmp_path.iterdir())


def test_a_path_in_a_folder_that_is_there_is_no_name_of_a_hub(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert ivlx.main(["import", "--hf", "models/none", "--save", "x"]) == 2
    assert "hf download" not in capsys.readouterr().err


def test_no_word_shows_the_list_and_is_a_mistake(capsys) -> None:
    assert ivlx.main([]) == 2
    assert capsys.readouterr().out == f"{ivlx.overview()}\n"
    assert ivlx.main(["help"]) == 0
    assert capsys.readouterr().out == f"{ivlx.overview()}\n"
    assert ivlx.main(["help", "tiles"]) == 0
    assert capsys.readouterr().out == help_text(registry.find("tiles").parser())


def test_a_broken_pipe_and_ctrl_c_need_no_traceback(tmp_path) -> None:
    program = "from megatron_internvlx.commands import ivlx; raise SystemExit(ivlx.main())"
    done = subprocess.run(
        f"set -o pipefail; {sys.executable} -c '{program}' train --help | true", shell=True, cwd=ROOT,
        executable="/bin/bash", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""


def test_fast_commands_never_import_megatron(tmp_path) -> None:
    Image.new("RGB", (500, 400)).save(tmp_path / "a.png")
    done = python(WITHOUT_MEGATRON, tmp_path)
    assert done.stderr.splitlines()[-1] == "codes [0, 0, 0]", done.stderr
    assert (tmp_path / "tiles.png").is_file()


def test_exit_codes_stand_once_and_in_the_docs() -> None:
    constants = {
        value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)
    }
    assert constants == exit_codes.MEANINGS.keys()
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    table = text.split("## Exit codes", 1)[1].split("\n## ", 1)[0]
    rows = {int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| (.+) \|$", table, re.M)}
    assert rows == exit_codes.MEANINGS
    for command in registry.COMMANDS:
        assert getattr(command.parser(), "exits", {}).keys() <= exit_codes.MEANINGS.keys()
    written = re.compile(r"^[A-Z_]+ = (7[0-9]|130|143)\b", re.M)
    package = ROOT / "megatron_internvlx"
    places = {path.name for path in package.rglob("*.py") if written.search(path.read_text(encoding="utf-8"))}
    assert places == {"exit_codes.py"}


def test_the_docs_list_the_commands() -> None:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z-]+)` \| ([^|]+) \|", text.split("\n## ", 1)[0], re.M)
    assert [row for row in rows if row[0] in NAMES] == [(one.name, one.summary) for one in registry.COMMANDS]


def test_the_form_of_a_help() -> None:
    it = CommandParser("draw", "Draw it.", about="One.\n\nTwo.", examples=("ivlx draw a",), rest="[MORE]")
    it.add_argument("image", help="100%% of it")
    it.add_argument("--out", metavar="FILE", required=True, help="file")
    it.add_argument("--a-very-long-name-of-an-option", metavar="TEXT", default="x", help="long")
    it.add_argument("--zero", type=int, default=0, help="a number")
    assert help_text(it, 80).splitlines() == [
        "usage: ivlx draw IMAGE --out FILE [options] [MORE]", "", "Draw it.", "", "One.", "", "Two.", "",
        "Arguments",
        "  IMAGE                             100% of it", "",
        "Options",
        "  --out FILE                        file",
        "  --a-very-long-name-of-an-option TEXT",
        "                                    long [x]",
        "  --zero INT                        a number [0]", "",
        "Examples", "  ivlx draw a", "",
        "Exit codes", "  0    done", "  2    wrong arguments or files, with one message",
    ]  # fmt: skip
