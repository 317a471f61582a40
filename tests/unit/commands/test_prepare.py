"""The command line of `ivlx prepare`: light, its choices those of the code, recipes, and the new user's case."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_internvlx.commands import prepare
from megatron_internvlx.data import conversation, rvtc
from megatron_internvlx.data.packing import Budget
from megatron_internvlx.data.sources import detect, page, record
from tests.preparing import Command, Item, items, photo, write_csv, write_messages

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "numpy", "PIL", "pyarrow", "transformers", "megatron.core")
DEMO = ROOT / "examples" / "demo" / "demo.yaml"
TOKENIZER = ROOT / "tests" / "golden" / "data" / "tokenizers" / "qwen2_fast"


@pytest.fixture
def command(capsys):
    return Command(capsys)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from megatron_internvlx.commands.prepare import parser; parser().format_help(); "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_choices_are_those_of_the_code():
    assert prepare.FORMATS == detect.FORMATS
    assert set(prepare.TEMPLATES) == set(conversation.TEMPLATES)
    assert set(prepare.POLICIES) == set(rvtc.POLICIES)


def test_the_document_names_every_cause():
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    missing = [cause for cause, meaning in record.CAUSES.items() if f"| `{cause}` | {meaning} |" not in text]
    assert not missing


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["IN"], "--out DIR is needed"),
        (["IN", "--check", "--recipe", "none.yaml"], "--recipe none.yaml"),
        (["IN", "--check", "--image-size", "450"], "multiple of the patch size 14"),
        (["IN", "--check", "--root", "none"], "no such folder"),
        (["IN", "--out", "IN/questions.csv"], "was not made by this command"),
        (["IN", "--out", "IN/questions.csv/x"], "Not a directory"),
        (["IN", "--out", "new", "--tokenizer-model", "none"], "no such directory"),
    ],
)
def test_mistakes_of_the_command_line(words, remedy, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "IN").mkdir()
    write_csv(tmp_path / "IN", items(2))
    assert remedy in command(*words, code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["IN"]


@pytest.mark.parametrize(
    "words", [["IN", "--validation", "1.5"], ["IN", "--validation", "nan"], ["IN", "--limit", "0"]]
)
def test_numbers_out_of_range(words):
    with pytest.raises(SystemExit) as stopped:
        prepare.main(words)
    assert stopped.value.code == 2


def test_recipe_gives_tiles_template_and_lengths():
    options = prepare.parser().parse_args(["IN", "--recipe", str(DEMO)])
    settings, most = prepare.encoder_settings(options)
    assert (settings.tile_size, settings.max_tiles, settings.rvtc, settings.max_length) == (
        112,
        6,
        "edge",
        256,
    )
    assert settings.shallow_per_tile < settings.tokens_per_tile
    assert most == 65_536
    assert settings.budget is None
    options = prepare.parser().parse_args(["IN", "--recipe", str(DEMO), "--max-tiles", "3"])
    assert prepare.encoder_settings(options)[0].max_tiles == 3


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("max_tiles: six", "max_tiles: 'six' must be a whole number"),
        ("max_tiles: [6]", "max_tiles: [6] must be a whole number"),
        ("image_size: 0", "image_size: 0 must be at least 1"),
        ("seq_length: 12.5", "seq_length: 12.5 must be a whole number"),
        ("high_ratio: half", "high_ratio: 'half' must be a number"),
        ("packing: 'no'", "packing: 'no' must be true or false"),
        ("rvtc: false", "rvtc: False must be one of off"),
        ("vision_preset: [a]", "vision_preset: ['a'] must be a name"),
    ],
)
def test_wrong_value_of_a_recipe_is_named(line, remedy, tmp_path, command):
    (tmp_path / "r.yaml").write_text(line + "\n")
    text = command(tmp_path, "--check", "--recipe", tmp_path / "r.yaml", code=2)
    assert f"--recipe {tmp_path / 'r.yaml'}: {remedy}" in text


def test_budgets_of_a_recipe_with_packing(tmp_path):
    lines = ("packing: true", "seq_length: 4096", "max_supervised_tokens_per_pack: '512'")
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    options = prepare.parser().parse_args(["IN", "--recipe", str(tmp_path / "r.yaml")])
    assert prepare.encoder_settings(options)[0].budget == Budget(4096, 4096, supervised=512)


def test_number_in_quotes_is_read_as_training_reads_it(tmp_path):
    (tmp_path / "r.yaml").write_text("image_size: '224'\n")
    options = prepare.parser().parse_args(["IN", "--recipe", str(tmp_path / "r.yaml")])
    assert prepare.encoder_settings(options)[0].tile_size == 224


def test_tokenizer_is_looked_for_before_the_data_is_read(tmp_path, command, monkeypatch):
    monkeypatch.setattr(prepare, "_open_sources", lambda options: pytest.fail("data was read"))
    words = ("--out", tmp_path / "out", "--tokenizer-model", tmp_path / "none")
    assert "no such directory" in command(tmp_path, *words, code=2)


def test_tiles_of_a_set_count_under_its_own_limit(tmp_path, command):
    (tmp_path / "p0.jpg").write_bytes(photo(0, 1800, 900))
    write_messages(tmp_path, items(1))
    meta = {"a": {"root": str(tmp_path), "annotation": "messages.jsonl"}}
    counts = []
    for limit in ({}, {"max_dynamic_patch": 1}):
        (tmp_path / "meta.json").write_text(json.dumps({"a": {**meta["a"], **limit}}))
        text = command(tmp_path / "meta.json", "--check")
        counts.append(int(re.search(r"(\d+) tiles", text)[1]))
    assert counts[0] > 2
    assert counts[1] == 1


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "examples" / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_recipe_is_understood(recipe):
    settings, most = prepare.encoder_settings(prepare.parser().parse_args(["IN", "--recipe", str(recipe)]))
    assert settings.tokens_per_tile == 256
    assert most >= 65_536


def test_ctrl_c_says_that_the_same_command_continues(tmp_path, command, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_write", stop)
    assert "the same command continues" in command(
        write_csv(tmp_path, items()), "--out", tmp_path / "out", code=130
    )
    assert not (tmp_path / "out").exists()


class _Page(HTMLParser):
    """Counts tags, checks that they are closed, and collects what a browser would load."""

    EMPTY = ("meta", "br", "image", "path")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.marked: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.EMPTY:
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "mark" in self.open:
            self.marked.append(data)


def test_page_shows_what_training_sees(tmp_path, command):
    records = [
        Item(f"p{n}.jpg", photo(n, 900, 500), "Where <b>&", f"Answer {n} <script>x</script>")
        for n in range(9)
    ]
    records[4] = Item("p4.jpg", photo(4, 30, 20), "Small?", "Yes.")
    records[5].answer = "long " * 1000
    records[6].answer = ""
    write_csv(tmp_path, records)
    words = ("--recipe", DEMO, "--tokenizer-model", TOKENIZER, "--page-records", 6)
    command(tmp_path, "--out", tmp_path / "out", *words)
    text = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    shown = _Page(text)
    assert shown.tags.count("article") == 6
    assert shown.tags.count("script") == 1, "texts of records are escaped"
    assert all(target.startswith("data:image/jpeg;base64,") for target in shown.loaded)
    assert len(shown.loaded) == 6
    assert not shown.open
    for why in ("longest text", "shortest text", "most tiles", "largest picture", "smallest picture"):
        assert f">{why}<" in text
    assert "Yes." in "".join(shown.marked)
    assert "Small?" not in "".join(shown.marked)
    assert "<b>900 × 500</b> cut " in text
    assert "characters not shown" in text
    assert re.search(r"\d+ tokens, \d+ of them learnt", text)
    assert "training refuses it: answer_truncated" in text
    assert "empty_answer" in text
    assert "http" not in text


def test_page_without_tokenizer_and_pictures(tmp_path, command):
    turns = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B"}]
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    command(tmp_path / "m.jsonl", "--out", tmp_path / "out", "--conversation-template", "internlm2-chat")
    text = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert "3 characters of text" in text
    assert "<mark>B<span class=token>" in text


def test_text_of_the_page_is_that_of_training(tokenizer=None):
    from transformers import AutoTokenizer

    turns = [
        {"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": "B c"},
        {"from": "human", "value": " D? "}, {"from": "gpt", "value": "E "},
    ]  # fmt: skip
    for template in conversation.TEMPLATES:
        text, spans = conversation.training_text(template, turns, 1)
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        encoded = conversation.encode(tokenizer, template, turns, image_tokens=[1], max_length=None)
        assert tokenizer.decode(encoded.input_ids) == text
        learnt = encoded.input_ids[encoded.labels != conversation.IGNORE_INDEX]
        assert tokenizer.decode(learnt) == "".join(text[start:stop] for start, stop in spans)


def test_several_pictures_on_the_page(tmp_path, command):
    write_messages(tmp_path, items(2))
    row = {
        "image": ["p0.jpg"] * 6,
        "conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B"}],
    }
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    command(tmp_path / "d.jsonl", "--out", tmp_path / "out")
    text = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert "and 2 more images" in text
    assert text.count("class=chip>image · 1 tile<") == 6
    assert page.THUMBNAIL_SIDE > 100
