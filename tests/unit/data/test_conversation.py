"""Labels, truncation, refused input and the released quirks of the chat templates."""

import copy

import numpy as np
import pytest

from megatron_internvlx.data.conversation import (
    IGNORE_INDEX,
    TEMPLATES,
    encode,
    render_prompt,
    without_images,
)
from megatron_internvlx.data.quirks import ReleasedQuirks
from megatron_internvlx.data.rejects import BadSample
from tests.unit.data.conftest import turns


@pytest.fixture
def run(tokenizer):
    def run(conversations, images=(), *, template="internvl2_5", max_length=None, **quirks):
        return encode(
            tokenizer,
            template,
            conversations,
            image_tokens=list(images),
            max_length=max_length,
            compat=ReleasedQuirks(**quirks),
            key="a.jsonl:3",
        )

    return run


def refused(run, cause, *arguments, **options):
    with pytest.raises(BadSample) as caught:
        run(*arguments, **options)
    assert (caught.value.key, caught.value.cause) == ("a.jsonl:3", cause)
    return caught.value.detail


@pytest.mark.parametrize("template", TEMPLATES)
def test_exactly_the_answers_and_their_end_tokens_are_supervised(run, tokenizer, template):
    conversation = turns("<image>\nHow many objects?", "There are 3.", "Thank you.", "天空是蓝色的 [1]")
    encoded = run(conversation, [8], template=template)
    supervised = encoded.labels[encoded.labels != IGNORE_INDEX]
    assert tokenizer.decode(supervised) == "There are 3.<|im_end|>天空是蓝色的 [1]<|im_end|>"
    known = encoded.labels != IGNORE_INDEX
    np.testing.assert_array_equal(encoded.labels[known], encoded.input_ids[known])
    assert encoded.is_visual.sum() == 8
    assert not (encoded.is_visual & known).any()
    text = render_prompt(template, conversation).replace("<image>", "<img>" + "<IMG_CONTEXT>" * 8 + "</img>")
    assert tokenizer.decode(encoded.input_ids) == text


def test_images_are_placed_left_to_right_with_their_own_counts(run, tokenizer):
    encoded = run(turns("<image> and <image>", "A", "<image>?", "B"), [1, 2, 3])
    text = tokenizer.decode(encoded.input_ids)
    blocks = [part.split("</img>")[0].count("<IMG_CONTEXT>") for part in text.split("<img>")[1:]]
    assert blocks == [1, 2, 3]


def test_placeholders_must_match_the_images(run):
    assert "2 <image> placeholders" in refused(run, "placeholder_mismatch", turns("<image><image>", "A"), [4])
    assert "for 2 images" in refused(run, "placeholder_mismatch", turns("<image>", "A"), [4, 4])
    assert "1 elsewhere" in refused(run, "placeholder_mismatch", turns("<image>", "An <image>"), [4])
    refused(run, "placeholder_mismatch", turns("about <image>", "A"))


def test_quirk_surplus_placeholders_stay_text(run, tokenizer):
    encoded = run(turns("<image> x <image>", "A"), [4], literal_surplus_placeholders=True)
    assert encoded.is_visual.sum() == 4
    assert "</img> x <image><|im_end|>" in tokenizer.decode(encoded.input_ids)


def test_quirk_surplus_images_are_dropped_without_loss(run):
    encoded = run(turns("<image>", "A"), [4, 4], drop_surplus_images=True)
    assert (encoded.num_images, encoded.is_visual.sum()) == (1, 4)
    assert (encoded.labels == IGNORE_INDEX).all()


def test_structure_cannot_be_forged_by_message_text(run):
    for token in ("<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>"):
        assert token in refused(run, "reserved_token", turns(f"a {token} b", "A"))
        refused(run, "reserved_token", turns("a", f"A {token}"))


@pytest.mark.parametrize(
    ("conversation", "what"),
    [
        ([{"from": "user", "value": "a"}], "turn 0"),
        ([{"from": "human"}], "turn 0"),
        ([*turns("a", "A"), {"from": "system", "value": "s"}], "system turn"),
        ([], "no human turn"),
    ],
)
def test_unusable_turns_are_refused(run, conversation, what):
    assert what in refused(run, "bad_message", conversation)


def test_rounds_must_alternate_where_the_released_code_demands_it(run):
    twice = [*turns("a", "A"), {"from": "gpt", "value": "B"}]
    assert "alternate" in refused(run, "bad_message", twice, template="Hermes-2")
    assert run(twice, template="internvl2_5").num_images == 0


def test_leading_answer_is_skipped_or_supervised_as_released(run, tokenizer):
    conversation = [{"from": "gpt", "value": "Hello"}, *turns("a", "A")]
    for template, text in [("Hermes-2", "A<|im_end|>"), ("internvl2_5", "Hello<|im_end|>A<|im_end|>")]:
        labels = run(conversation, template=template).labels
        assert tokenizer.decode(labels[labels != IGNORE_INDEX]) == text


def test_nothing_to_learn_from_is_refused(run):
    refused(run, "no_supervision", turns("a"))
    refused(run, "empty_answer", turns("a", ""))


def test_long_conversation_is_cut_after_its_last_whole_answer(run, tokenizer):
    conversation = turns("<image>a", "One two three.", "b", "Four five six.")
    whole = run(conversation, [4])
    cut = run(conversation, [4], max_length=len(whole.input_ids) - 3)
    assert tokenizer.decode(cut.input_ids).endswith("One two three.<|im_end|>")
    assert cut.dropped_tokens == len(whole.input_ids) - len(cut.input_ids) > 3
    partial = run(conversation, [4], max_length=len(whole.input_ids) - 3, partial_answers=True)
    assert partial.dropped_tokens == 3
    exact = run(conversation, [4], max_length=len(whole.input_ids))
    assert exact.dropped_tokens == 0


@pytest.mark.parametrize("template", TEMPLATES)
def test_answer_that_ends_exactly_at_the_limit_is_kept(run, tokenizer, template):
    conversation = turns("<image>a", "One two three.", "b", "Four five six.", "c", "Seven.")
    whole = run(conversation, [4], template=template)
    ends = np.flatnonzero(whole.input_ids == tokenizer.convert_tokens_to_ids("<|im_end|>"))
    ends = [end + 1 for end in ends if whole.labels[end] != IGNORE_INDEX]
    assert len(ends) == 3
    for limit, kept in [(ends[0], ends[0]), (ends[1] - 1, ends[0]), (ends[1], ends[1])]:
        cut = run(conversation, [4], template=template, max_length=int(limit))
        assert len(cut.input_ids) == kept
        assert tokenizer.decode(cut.labels[-3:]).endswith("<|im_end|>")
    refused(run, "answer_truncated", conversation, [4], template=template, max_length=int(ends[0]) - 1)


def test_token_across_header_and_answer_is_not_supervised(tokenizer):
    """At inference the header ends the prompt, so the model never predicts a token that began in it."""
    merging = copy.deepcopy(tokenizer)
    merging.add_tokens(["\n\n"])  # as real vocabularies have it
    encoded = encode(merging, "Hermes-2", turns("a", "\nYes."), image_tokens=[], max_length=None)
    [straddling] = np.flatnonzero(encoded.input_ids == merging.convert_tokens_to_ids("\n\n"))
    known = np.flatnonzero(encoded.labels != IGNORE_INDEX)
    assert merging.decode(encoded.input_ids[: straddling + 1]).endswith("<|im_start|>assistant\n\n")
    assert known[0] == straddling + 1
    assert merging.decode(encoded.labels[known]) == "Yes.<|im_end|>"


def test_cut_answer_and_cut_image_are_refused_with_the_numbers(run):
    length = len(run(turns("<image>a", "One two three."), [40]).input_ids)
    detail = refused(
        run, "answer_truncated", turns("<image>a", "One two three."), [40], max_length=length - 3
    )
    assert "the answer is cut by the length limit" in detail
    assert f"{length} tokens (40 of images)" in detail
    detail = refused(run, "image_truncated", turns("<image>a", "One."), [400], max_length=300)
    assert "limit of 300 would cut an image block" in detail
    # The second image would fall behind the cut: it is not dropped in silence.
    two = turns("<image>a", "One two three.", "<image>b", "Four.")
    refused(run, "image_truncated", two, [4, 4], max_length=len(run(two, [4, 4]).input_ids) - 4)


@pytest.mark.parametrize("partial", [False, True])
def test_end_of_the_image_block_belongs_to_the_image(run, partial):
    """A limit between the last context token and </img>; one more and the block is whole."""
    conversation = turns("a", "One.", "<image>b", "Two three.")
    whole = run(conversation, [4])
    end = int(np.flatnonzero(whole.is_visual)[-1]) + 2
    for limit in (end - 2, end - 1):
        detail = refused(run, "image_truncated", conversation, [4], max_length=limit, partial_answers=partial)
        assert f"the last ends at token {end})" in detail
    if partial:
        cut = run(conversation, [4], max_length=end, partial_answers=True)
        assert len(cut.input_ids) == end and cut.is_visual.sum() == 4
    only = turns("<image>b", "Two three.")
    end = int(np.flatnonzero(run(only, [4]).is_visual)[-1]) + 2
    refused(run, "image_truncated", only, [4], max_length=end - 1, partial_answers=partial)
    refused(run, "answer_truncated", only, [4], max_length=end, partial_answers=partial)


def test_quirk_tokens_with_id_zero_are_masked(run, tokenizer):
    conversation = turns("Look!", "Yes!")
    assert run(conversation).attention_mask is None
    encoded = run(conversation, mask_id_zero=True)
    assert tokenizer.convert_tokens_to_ids("!") == 0
    assert (~encoded.attention_mask).sum() == 2


@pytest.mark.parametrize("bad", [turns("pad <|endoftext|>", "A"), turns("a", "A", "b", "")])
def test_quirk_length_mismatch_ignores_all_labels(run, bad):
    quirk = {"ignore_labels_on_length_mismatch": True, "template": "Hermes-2"}
    assert (run(bad, **quirk).labels == IGNORE_INDEX).all()
    assert (run(turns("a", "A"), **quirk).labels != IGNORE_INDEX).any()


def test_unknown_template_and_unfit_tokenizer_are_refused():
    with pytest.raises(ValueError, match="internlm2-chat, Hermes-2, internvl2_5"):
        render_prompt("vicuna", turns("a", "A"))


def test_tokenizer_without_image_tokens_is_refused():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    )
    with pytest.raises(ValueError, match="no single token '<img>'"):
        encode(plain, "internvl2_5", turns("a", "A"), image_tokens=[], max_length=None)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<image>\nWhat?", "What?"),
        ("Image-1: <image>\nImage-2: <image>\nWhich is larger?", "Which is larger?"),
        ("What is in <image> and in <image>?", "What is in  and in ?"),
        ("Is Image-1: larger?", "Is Image-1: larger?"),
    ],
)
def test_questions_are_shown_without_their_images(text, shown):
    assert without_images(text) == shown
