"""The report: a PNG from what a run leaves, and the numbers beside it."""

import json

import pytest
from PIL import Image

from megatron_internvlx.reporting.picture import (
    Example,
    KindAccuracy,
    Prediction,
    _side_by_side,
    accuracy_by_kind,
    choose_examples,
    kind_accuracies,
    most_common_baseline,
    read_predictions,
    write_report,
)


def prediction(n, *, kind="left", correct=True, image="a.png", cols=1):
    return Prediction(
        image, cols, 1, False, "What colour?", "red", "red", key=str(n), kind=kind, judged_correct=correct
    )


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (90, 40), "red").save(path)
    return path


@pytest.mark.parametrize("count", [0, 1, 6, 15])
def test_writes_a_png(tmp_path, image, count):
    question = "What is the colour of the very long thing " * 6
    examples = [Example(image, 2, 1, True, question, "red", "red" if n % 2 else "") for n in range(count)]
    write_report(
        tmp_path / "r.png",
        losses=[(1, 2.0), (2, 1.5)],
        accuracies=[(2, 0.8)],
        kinds=[KindAccuracy("two_images", 3, 4, 0.25), KindAccuracy("$odd$", 0, 1, 1.0)],
        examples=examples,
        title="A run",
        caption="Words. " * 80,
    )
    with Image.open(tmp_path / "r.png") as drawn:
        drawn.load()
        assert drawn.width >= 1000


def test_losses_or_examples_alone_are_enough(tmp_path, image):
    write_report(tmp_path / "l.png", losses=[(1, 2.0)], title="losses")
    examples = [Example(image, 1, 1, False, "?", "a", "b")]
    write_report(tmp_path / "e.png", losses=[], accuracies=[], examples=examples, title="examples")
    assert (tmp_path / "l.png").stat().st_size and (tmp_path / "e.png").stat().st_size


def test_unreadable_and_absent_images_do_not_fail(tmp_path):
    examples = [Example(tmp_path / "gone.png", 1, 1, False, "?", "a", "a")]
    examples.append(Example(None, 1, 1, False, "Say a.", "a", "a"))
    write_report(tmp_path / "r.png", losses=[], examples=examples, title="t")


def test_text_that_looks_like_mathematics_is_drawn_as_it_is(tmp_path, image):
    example = Example(image, 1, 1, False, "Is $x_{$ a price?", "$5 or $\\frac$", "$_$")
    write_report(tmp_path / "r.png", losses=[], examples=[example], title="$\\bad$", caption="${$")


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="both are empty"):
        write_report(tmp_path / "r.png", losses=[], title="t")


def test_most_common_baseline():
    assert most_common_baseline(["a", "b", "a", "c"]) == 0.5
    assert most_common_baseline([]) == 0


def test_read_predictions(tmp_path):
    row = {
        "key": "val:3", "kind": "count", "image": "a.png", "cols": 2, "rows": 1, "thumbnail": True,
        "question": "How many?", "expected": "two", "given": "two", "correct": True,
        "images": ["a.png", "b.png"],
    }  # fmt: skip
    plain = {key: value for key, value in row.items() if key not in ("kind", "images")} | {"correct": False}
    path = tmp_path / "p.jsonl"
    path.write_text(f"{json.dumps(row)}\n\n{json.dumps(plain)}\n")
    first, second = read_predictions(path)
    assert (first.key, first.kind, first.cols, first.correct) == ("val:3", "count", 2, True)
    assert first.further_images == ("b.png",)
    assert second.kind is None and not second.correct and second.further_images == ()
    assert accuracy_by_kind([first, second]) == {"count": (1, 1), "other": (0, 1)}


@pytest.mark.parametrize(("line", "reason"), [("{", "Expecting"), ("{}", "missing 'key'"), ("3", "")])
def test_bad_prediction_names_its_line(tmp_path, line, reason):
    path = tmp_path / "p.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match=rf"p\.jsonl:2: not a prediction: .*{reason}"):
        read_predictions(path)


def test_examples_are_varied():
    rows = [prediction(n) for n in range(20)]
    rows += [prediction(20, kind="word"), prediction(21, kind="count", cols=3)]
    rows += [prediction(22, correct=False), prediction(23, correct=False), prediction(24, image=None)]
    chosen = choose_examples(rows)
    assert len(chosen) == 12
    assert {"word", "count", "left"} == {p.kind for p in chosen}
    assert sum(not p.correct for p in chosen) == 1 and not chosen[-1].correct
    assert all(p.image for p in chosen)
    assert choose_examples([]) == []


def test_a_kind_without_a_right_answer_is_shown_too():
    rows = [prediction(n, kind=f"kind{n % 10}", correct=n % 10 != 3) for n in range(40)]
    chosen = choose_examples(rows)
    assert {p.kind for p in chosen} == {f"kind{n}" for n in range(10)}
    assert len(chosen) == 12


def test_kinds_know_their_commonest_answer():
    rows = [prediction(n, kind="count", correct=n < 3) for n in range(4)]
    assert kind_accuracies(rows) == [KindAccuracy("count", 3, 4, 1.0)]
    assert kind_accuracies([]) == []


def test_several_images_are_drawn_side_by_side(tmp_path, image):
    """A second image that is missing does not fail the report either."""
    pair = Example(image, 1, 1, False, "Which one?", "a", "a", further_images=(image, image))
    joined = _side_by_side([Image.new("RGB", (30, 20)), Image.new("RGB", (10, 40))])
    assert joined.size == (30 + 10 + 30, 40)
    broken = Example(image, 1, 1, False, "Which one?", "a", "a", further_images=(tmp_path / "gone.png",))
    write_report(tmp_path / "r.png", losses=[], examples=[pair, broken], title="t")
