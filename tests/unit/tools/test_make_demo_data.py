"""The demo data: the same bytes from the same seed, InternVL format, and no answer that wins by itself."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from megatron_internvlx.data.conversation import TEMPLATES, encode
from megatron_internvlx.data.manifest import Manifest
from megatron_internvlx.data.rvtc import tile_count, tile_grid
from tools import demo_pictures, demo_questions
from tools import make_demo_data as demo

TRAIN, VAL = 240, 60


def make(out, *more):
    return demo.main(["--out", str(out), "--train", str(TRAIN), "--val", str(VAL), *map(str, more)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "data"
    assert make(out) == 0
    return out


def records(root, split):
    return [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]


def images(record):
    names = record.get("image", [])
    return [names] if isinstance(names, str) else names


def answers(rows):
    return [turn["value"] for row in rows for turn in row["conversations"] if turn["from"] == "gpt"]


KINDS = {
    "digit", "shape", "count", "word", "position", "half", "background", "colour", "two_images", "text_only",
}  # fmt: skip


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_same_seed_same_bytes(made, tmp_path):
    assert make(tmp_path / "again") == 0
    assert contents(tmp_path / "again") == contents(made)


def test_another_seed_other_bytes(made, tmp_path):
    assert make(tmp_path / "other", "--seed", 1) == 0
    assert (tmp_path / "other" / "train.jsonl").read_bytes() != (made / "train.jsonl").read_bytes()


def test_training_and_held_out_pictures_differ(made):
    train, val = ({p.read_bytes() for p in (made / "images" / s).iterdir()} for s in ("train", "val"))
    assert len(val) > VAL / 2
    assert not train & val


@pytest.mark.parametrize("split", ["train", "val"])
def test_records_are_internvl_chats(made, split):
    rows = records(made, split)
    meta = json.loads((made / ("meta.json" if split == "train" else "meta_val.json")).read_text())
    ((_, entry),) = meta.items()
    assert entry["length"] == len(rows) == {"train": TRAIN, "val": VAL}[split]
    assert entry["repeat_time"] == 1 and entry["data_augment"] is False
    assert made / entry["annotation"] == made / f"{split}.jsonl"
    for row in rows:
        roles = [turn["from"] for turn in row["conversations"]]
        assert roles == ["system"] + ["human", "gpt"] * len(row["kinds"])
        text = "".join(turn["value"] for turn in row["conversations"])
        assert text.count("<image>") == len(images(row))
        widths = row.get("width_list", [row.get("width")])
        heights = row.get("height_list", [row.get("height")])
        for name, width, height in zip(images(row), widths, heights, strict=False):
            with Image.open(made / entry["root"] / name) as image:
                image.load()
                assert image.size == (width, height)
                assert demo_questions.MIN_SIDE <= width <= 672 and demo_questions.MIN_SIDE <= height <= 448
                assert image.format == {".png": "PNG", ".jpg": "JPEG"}[Path(name).suffix]


def test_the_package_reads_it(made):
    manifest = Manifest(made / "meta.json")
    assert len(manifest) == TRAIN


def rounds(rows, kind):
    """(question, answer) of a kind."""
    for row in rows:
        turns = [turn["value"] for turn in row["conversations"][1:]]
        for name, question, answer in zip(row["kinds"], turns[::2], turns[1::2], strict=True):
            if name == kind:
                yield question.split("\n")[-1], answer


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_kind_occurs_and_none_has_a_common_answer(made, split):
    rows = records(made, split)
    assert {kind for row in rows for kind in row["kinds"]} == KINDS == demo_questions.KINDS
    assert {Path(name).suffix for row in rows for name in images(row)} == {".png", ".jpg"}
    assert set(answers(rows)) <= set(demo_questions.answer_words())


def test_no_kind_of_the_whole_set_has_a_common_answer(tmp_path):
    """The held-out records of `make demo`: guessing gets less than 30 % of any kind, and every kind is asked often."""
    drawer = demo_questions.SampleDrawer(0, "val", tmp_path)
    rows = [drawer.draw(index) for index in range(demo.parse_args(["--out", "x"]).val)]
    for kind in KINDS:
        given = [answer for _, answer in rounds(rows, kind)]
        assert len(given) >= 20, kind
        assert Counter(given).most_common(1)[0][1] / len(given) < 0.3, kind


def test_questions_are_answered_by_the_picture(made):
    """Each sample of one tile asks about its thing and a colour; pictures of panels about every panel."""
    rows = records(made, "train")
    for row in rows:
        asked = [turn["value"] for turn in row["conversations"] if turn["from"] == "human"]
        assert len(set(asked)) == len(asked)
        if len(images(row)) == 1 and "half" not in row["kinds"]:
            panels = 1 if row["width"] <= 112 >= row["height"] else 2
            assert len(asked) > panels
    assert {question for question, _ in rounds(rows, "half")} == {
        "Colour of the upper half?",
        "Colour of the lower half?",
    }


def test_held_out_digits_are_in_no_training_picture():
    for digit in demo_pictures.DIGITS:
        train, val = (set(demo_pictures.handwritten_digits(digit, held_out=out)) for out in (False, True))
        assert not train & val
        assert 100 < len(train) < 160 and 20 < len(val) < 60


def test_answers_are_dealt_like_cards():
    dealt = [demo_questions.deal("s", number, "abcde") for number in range(20)]
    assert [sorted(dealt[i : i + 5]) for i in range(0, 20, 5)] == [list("abcde")] * 4
    assert dealt[:5] != dealt[5:10] or dealt[5:10] != dealt[10:15]


def test_every_tile_count_occurs(made):
    """At most six tiles, at the tile size of the recipe; by the rule `area` blurred pictures get fewer."""
    sizes = [(row["width"], row["height"]) for row in records(made, "train") if "width" in row]
    counts = {
        rule: [
            cols * rows
            for cols, rows in (tile_grid(*s, tile_size=112, max_tiles=6, policy=rule) for s in sizes)
        ]
        for rule in ("edge", "area")
    }
    assert set(counts["edge"]) == {1, 2, 3, 4, 5, 6}
    assert sum(counts["area"]) < sum(counts["edge"])


def test_mean_tiles_stays_small(made):
    sizes = [(row["width"], row["height"]) for row in records(made, "train") if "width" in row]
    counts = [tile_count(*tile_grid(*size, tile_size=112, max_tiles=6), thumbnail=True) for size in sizes]
    assert 1.2 < sum(counts) / len(counts) < 2


def test_tokenizer(made):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "tokenizer")
    assert len(tokenizer) <= 512
    assert tokenizer.bos_token is None
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    for token in demo.SPECIAL_TOKENS:
        assert len(tokenizer(token).input_ids) == 1
    for word in demo_questions.answer_words():
        assert len(tokenizer(word).input_ids) == 1, word
    text = "<|im_start|>user\nAny text, ünïcode 也 too.<|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_encodes_it(made, template):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "tokenizer")
    for row in records(made, "val"):
        encoded = encode(
            tokenizer,
            template,
            row["conversations"],
            image_tokens=[4] * len(images(row)),
            max_length=None,
        )
        supervised = encoded.labels[encoded.labels != -100]
        assert len(supervised) == 2 * len(row["kinds"])  # the answer and its end token
        assert len(encoded.input_ids) < 130


def test_complete_directory_is_kept(made, capsys):
    before = (made / demo.MARK).stat().st_mtime_ns
    assert make(made) == 0
    assert "kept" in capsys.readouterr().out
    assert (made / demo.MARK).stat().st_mtime_ns == before


def test_other_settings_need_force(tmp_path, capsys):
    out = tmp_path / "data"
    assert demo.main(["--out", str(out), "--train", "4", "--val", "4"]) == 0
    assert demo.main(["--out", str(out), "--train", "5", "--val", "4"]) == 2
    assert "--force" in capsys.readouterr().err
    assert demo.main(["--out", str(out), "--train", "5", "--val", "4", "--force"]) == 0
    assert len(records(out, "train")) == 5


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_foreign_directory_is_left_alone(tmp_path, capsys, force):
    (tmp_path / "precious.txt").write_text("mine")
    assert make(tmp_path, *force) == 2
    assert "not made by this tool" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_killed_run_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "make_tokenizer", fail)
    with pytest.raises(KeyboardInterrupt):
        demo.main(["--out", str(tmp_path / "data"), "--train", "2", "--val", "2"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [["--train", "0"], ["--val", "-1"], ["--vocab-size", "100"]])
def test_bad_numbers_are_refused(tmp_path, bad):
    with pytest.raises(SystemExit):
        demo.main(["--out", str(tmp_path / "data"), *bad])
    assert not (tmp_path / "data").exists()


def test_unwritable_directory_is_one_line(capsys):
    assert demo.main(["--out", "/proc/data", "--train", "2", "--val", "2"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_new_kind_of_question_has_the_tokenizer_of_the_others(made, tmp_path):
    """A trained model learns it with adapters: the answer is another digit than the one that it reads there."""
    assert make(tmp_path / "next", "--train", "40", "--val", "20", "--only", "next_digit") == 0
    for name, content in contents(made / "tokenizer").items():
        assert (tmp_path / "next" / "tokenizer" / name).read_bytes() == content
    rows = records(tmp_path / "next", "val")
    assert {kind for row in rows for kind in row["kinds"]} == {"next_digit"}
    assert Counter(answers(rows)) == dict.fromkeys("0123456789", 2)
    assert demo_questions.NEXT_QUESTION not in demo_questions.all_questions()
    (tmp_path / "images").mkdir()
    drawer = demo_questions.SampleDrawer(0, "val", tmp_path / "images", "next_digit")
    shown = demo_questions.deal("0/val/next_digit/digit", 3, demo_pictures.DIGITS)
    assert answers([drawer.draw(3)]) == [str((int(shown) + 1) % 10)]
    assert make(tmp_path / "next", "--train", "40", "--val", "20") == 2  # made with other settings
