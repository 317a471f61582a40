"""Metrics against values worked out by hand from the benchmarks' definitions."""

import pytest

from megatron_internvlx.evaluation.closed_answers import (
    choice_letter,
    multiple_choice,
    question_options,
    yes_no,
    yes_no_summary,
    yes_or_no,
)
from megatron_internvlx.evaluation.metrics import METRICS, get_metric, metric_lines, summarize_metrics
from megatron_internvlx.evaluation.scores import normalized_match, parse_number, relaxed_accuracy
from megatron_internvlx.evaluation.vqa_text import CONTRACTIONS, normalize_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12%", 0.12),
        ("1,234.5", 1234.5),
        ("-.5", -0.5),
        ("1e3", 1000.0),
        ("3.", 3.0),
        ("1,5", None),  # not thousands: taking it for 15 would be wrong in half of the world
        ("1_000", None),
        ("nan", None),
        ("inf", None),
        ("", None),
        ("%", None),
        ("-", None),
        ("e5", None),
        ("two", None),
    ],
)
def test_parse_number(text: str, value: float | None) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("expected", "given", "right"),
    [("12%", "0.12", True), ("12%", "12", False), ("nan", "nan", True), ("0", "0.0", True), ("", "", True)],
)
def test_relaxed_accuracy_of_percent_and_words(expected: str, given: str, right: bool) -> None:
    assert relaxed_accuracy(expected, given) is right


def test_normalized_match() -> None:
    assert normalized_match("traffic  light", "Traffic light. ")
    assert normalized_match("École", "école")
    assert not normalized_match("light", "lights")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Two", "2"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("The cat.", "cat"),
        ("a red, round ball", "red round ball"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("10:30", "10:30"),
        ("50%", "50%"),
        ("dont", "don't"),
        ("Don’t", "don't"),
        ("oclock", "o'clock"),
        ("its", "its"),
        ("well", "well"),
        ("Straße\n", "straße"),
        ("猫", "猫"),
        ("the", ""),
        ("", ""),
    ],
)
def test_normalize_answer(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


def test_contractions_are_their_own_normal_form() -> None:
    assert all(normalize_answer(full) == full for full in CONTRACTIONS.values())
    assert all(word == full.replace("'", "") for word, full in CONTRACTIONS.items())


@pytest.mark.parametrize(("same", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_references(same: int, score: float) -> None:
    """With one of ten the same: leaving it out leaves none, else 1/3; so 9 x 1/3 / 10 = 0.3."""
    references = ["two"] * same + ["red"] * (10 - same)
    assert vqa_accuracy(references, "2") == pytest.approx(score)


@pytest.mark.parametrize(
    ("references", "given", "score"),
    [
        (["cat"], "a cat", 1.0),
        (["cat"], "dog", 0.0),
        (["cat", "cat"], "cat", 1.0),
        (["cat", "dog"], "cat", 0.5),
        (["cat", "cat", "dog"], "cat", (2 * 0.5 + 1.0) / 3),
        ([""] * 10, "", 1.0),
        (["cat"] * 10, "", 0.0),
    ],
)
def test_vqa_accuracy_of_few_references(references: list[str], given: str, score: float) -> None:
    assert vqa_accuracy(references, given) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        ("yes, there is a dog.", "yes"),
        ("No.", "no"),
        ("There is no dog in the image.", "no"),
        ("It isn’t visible", "no"),
        ("Yes. There is no doubt.", "yes"),
        ("Nothing", None),
        ("", None),
        ("a dog", None),
    ],
)
def test_yes_or_no(text: str, answer: str | None) -> None:
    assert yes_or_no(text) == answer


def test_an_unclear_answer_counts_as_yes_as_in_pope() -> None:
    assert yes_no("yes", "a dog")
    assert not yes_no("no", "a dog")


def test_yes_no_summary() -> None:
    """3 yes expected, 2 of them said; 2 no expected, 1 of them said: 2 hits of 3 said, of 3 expected."""
    pairs = [("yes", "Yes"), ("yes", "a dog"), ("yes", "no"), ("no", "No."), ("no", "yes")]
    assert yes_no_summary(pairs) == pytest.approx(
        {
            "accuracy": 3 / 5,
            "precision": 2 / 3,
            "recall": 2 / 3,
            "f1": 2 / 3,
            "yes_share": 3 / 5,
            "unclear": 1,
        }
    )
    assert yes_no_summary([("no", "no")])["f1"] == 0.0
    assert yes_no_summary([("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "no")])["f1"] == pytest.approx(
        2 / 3
    )


OPTIONS = {"A": "red", "B": "dark blue", "C": "blue"}
QUESTION = "Which colour?\nA. red\nB. dark blue\nC. blue\nAnswer with the option's letter."


def test_question_options() -> None:
    assert question_options(QUESTION) == OPTIONS
    assert question_options("(A) red\n(B) blue") == {"A": "red", "B": "blue"}
    assert question_options("A. Why?") == {}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B) dark blue", "B"),
        ("B: red", "B"),
        ("**B**", "B"),
        ("B - dark blue", "B"),
        ("The answer is B", "B"),
        ("The answer is (B).", "B"),
        ("Answer: B", "B"),
        ("The answer should be option B, not A.", "B"),
        ("A is wrong, so the answer is B", "B"),
        ("The correct answer is A because it is red", "A"),
        ("The answer is A. No, the answer is B.", "B"),
        ("I think B", "B"),
        ("It is B", "B"),
        ("Dark Blue.", "B"),
        ("blue", "C"),
        ("it looks red to me", "A"),
        ("A red car", "A"),  # by the option's text, not by the article
        ("A car", None),
        ("either A or B", None),
        ("A or B", None),
        ("A, B", None),
        ("A, B, C", None),
        ("A/B", None),
        ("(A) and (B)", None),
        ("A, A", "A"),
        ("B, a nice one", "B"),
        ("B, I think", "B"),
        ("D", None),
        ("", None),
        ("Ｂ", None),  # full width
    ],
)
def test_choice_letter(text: str, letter: str | None) -> None:
    assert choice_letter(text, OPTIONS) == letter


@pytest.mark.parametrize(("text", "letter"), [("D", "D"), ("The answer is a car", None), ("A red car", None)])
def test_choice_letter_without_known_options(text: str, letter: str | None) -> None:
    assert choice_letter(text) == letter


def test_multiple_choice() -> None:
    assert multiple_choice("B", "(b)", QUESTION)
    assert multiple_choice("dark blue", "B", QUESTION)
    assert not multiple_choice("B", "C", QUESTION)
    assert not multiple_choice("purple", "purple", QUESTION)


def test_the_best_reference_counts() -> None:
    assert get_metric("anls").score(["blue", "azure"], "azur", "") == pytest.approx(0.8)
    assert get_metric("relaxed_accuracy").score(["10", "20"], "20.5", "") == 1.0
    assert get_metric("multiple_choice").score(["A", "B"], "B", QUESTION) == 1.0


def test_names() -> None:
    with pytest.raises(ValueError, match="unknown metric 'bleu'; it must be one of exact_match, "):
        get_metric("bleu")
    assert all(name == metric.name for name, metric in METRICS.items())


def test_references_that_cannot_be_scored() -> None:
    assert "yes or no as the expected answer, found 'maybe'" in (METRICS["yes_no"].fault(["maybe"], "") or "")
    fault = METRICS["multiple_choice"].fault
    assert "options A, B, C as the expected answer, found 'D'" in (fault(["D"], QUESTION) or "")
    assert "a letter as the expected answer, found 'red'" in (fault(["red"], "Which?") or "")
    assert fault(["red"], QUESTION) is None


def test_summary_by_metric() -> None:
    def row(metric: str, score: float, wanted: str, given: str) -> dict:
        return {"metric": metric, "score": score, "references": [wanted], "given": given}

    rows = [row("anls", 0.5, "a", "b"), row("yes_no", 1.0, "yes", "yes"), row("anls", 1.0, "a", "a")]
    found = summarize_metrics(rows)
    assert found["anls"] == {"answers": 2, "score": 0.75}
    assert found["yes_no"]["f1"] == 1.0
    assert metric_lines({"metrics": found})[0] == "anls               75.00 %"
    assert metric_lines({"metrics": found})[1].endswith("f1 100.00 %, yes share 100.00 %, unclear 0")
