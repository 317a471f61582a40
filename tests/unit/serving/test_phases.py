"""Rows, positions and slots of the shallow phase, against a list of rows written out one by one."""

import pytest
import torch

from megatron_internvlx.serving.phases import (
    MOST_GROUPS,
    TEXT,
    cache_slots,
    chunk_end,
    kept_rows,
    layer_parts,
    part_sizes,
    row_positions,
    shallow_length,
    shallow_step,
    vllm_groups,
)

LOW, HIGH = 2, 5
# Rows of a prompt: text, an image of two tiles, text, an image of one tile, text.
ROWS, SPANS = 24, [(3, 2 * HIGH), (15, HIGH)]


def written_out(rows: int) -> list[bool]:
    """Whether the shallow layers run each row."""
    kept = [True] * rows
    for start, count in SPANS:
        for index in range(count):
            if start + index < rows:
                kept[start + index] = index % HIGH < LOW
    return kept


@pytest.mark.parametrize("rows", range(ROWS + 6))
def test_length_of_every_beginning(rows: int) -> None:
    assert shallow_length(rows, SPANS, LOW, HIGH) == sum(written_out(rows))


def test_positions_of_a_prompt() -> None:
    positions, delta = row_positions(ROWS, SPANS, LOW, HIGH)
    kept = written_out(ROWS)
    assert kept_rows(positions, LOW).tolist() == kept
    assert positions[0][torch.tensor(kept)].tolist() == list(range(sum(kept)))
    assert delta == sum(kept) - ROWS
    image = positions[1] == TEXT
    assert image.sum() == 3 * HIGH
    assert positions[2][image].tolist() == list(range(HIGH)) * 3


def test_a_row_after_the_prompt_is_text() -> None:
    """The server gives it one number, its own plus the delta, three times."""
    _, delta = row_positions(ROWS, SPANS, LOW, HIGH)
    generated = torch.full((3, 1), ROWS + delta)
    assert kept_rows(generated, LOW).tolist() == [True]
    assert int(generated[0]) == sum(written_out(ROWS))


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 24, 24),  # all
        (0, 3, 3),  # up to an image
        (0, 4, 3),  # one placeholder of it
        (0, 12, 3),  # all but one
        (0, 13, 13),  # the whole image
        (3, 12, 3),  # nothing fits
        (13, 19, 15),
        (13, 20, 20),
    ],
)
def test_prefill_does_not_stop_inside_an_image(start: int, end: int, expected: int) -> None:
    assert chunk_end(start, end, SPANS) == expected


def test_step_of_a_chunk_a_generated_row_and_a_padding_request() -> None:
    """The second part of one prompt, the 30th row of another, and a request that has no row in the step."""
    positions, delta = row_positions(ROWS, SPANS, LOW, HIGH)
    start = 13
    step = torch.cat([positions[:, start:], torch.full((3, 1), 29 + delta)], dim=1)
    starts = torch.tensor([0, ROWS - start, ROWS - start + 1, ROWS - start + 1], dtype=torch.int32)
    kept = kept_rows(step, LOW)
    shallow = shallow_step(step, starts, kept)
    run = sum(written_out(ROWS)[start:])
    assert shallow.starts.tolist() == [0, run, run + 1, run + 1]
    assert shallow.lengths.tolist() == [sum(written_out(ROWS)), 30 + delta, 0]
    before = sum(written_out(start))
    assert shallow.positions.tolist() == [*range(before, before + run), 29 + delta]
    assert shallow.request.tolist() == [0] * run + [1]
    blocks = torch.tensor([[7, 3, 9, 1], [2, 8, 5, 4], [0, 0, 0, 0]], dtype=torch.int32)
    wanted = [blocks[r][p // 8] * 8 + p % 8 for r, p in zip(shallow.request, shallow.positions, strict=True)]
    assert cache_slots(shallow, blocks, 8).tolist() == wanted


@pytest.mark.parametrize(
    ("shallow", "deep", "parts", "groups"),
    [
        (8, 16, (1, 1), (8, 3)),  # divides
        (10, 22, (1, 2), (11, 3)),  # one layer of 33 is empty; with parts of 10 and 22 layers, 8 of 40 were
        (3, 29, (1, 1), (3, 11)),
        (12, 20, (3, 5), (4, 8)),
    ],
)
def test_layers_in_groups(shallow: int, deep: int, parts: tuple[int, int], groups: tuple[int, int]) -> None:
    assert layer_parts(shallow, deep) == parts
    assert vllm_groups(part_sizes(shallow, deep, parts)) == groups


def test_one_group_where_many_would_be_needed() -> None:
    """A single shallow layer would make groups of one layer each."""
    assert layer_parts(1, 11) == (1, 1)
    assert layer_parts(1, 12) is None


def test_groups_leave_little_empty() -> None:
    """Worst of all models of up to 48 layers: 3 of 20 layers, with 7 shallow ones of 17."""
    for layers in range(2, 49):
        for shallow in range(1, layers):
            parts = layer_parts(shallow, layers - shallow)
            if parts is not None:
                width, number = vllm_groups(part_sizes(shallow, layers - shallow, parts))
                assert number <= MOST_GROUPS
                assert (width * number - layers) / (width * number) <= 0.15, (shallow, layers, parts)
