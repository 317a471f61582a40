"""The quality study: recipes of all combinations, and what its tables say about them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import quality, quality_report, quality_runs


def run(projector, expansion, rvtc, fine, coarse, seed=1):
    kinds = {"digit": [fine, 10], "colour": [coarse, 100], "text_only": [50, 50]}
    names = {"projector": projector, "expansion": expansion, "rvtc": rvtc}
    return names | {"seed": seed, "kinds": kinds, "commit": "abc"}


PLAIN, SHALLOW, CUT = ("pvtc", "off", "off"), ("pvtc", "L/2", "off"), ("pvtc", "off", "edge")
RUNS = [run(*PLAIN, 8, 90), run(*SHALLOW, 6, 90), run(*CUT, 9, 80)]
MS = {PLAIN: 100.0, SHALLOW: 60.0, CUT: 50.0}


def test_effects_compare_the_same_runs_with_and_without():
    rows = {row[0]: row[1:] for row in quality_report.effect_rows(RUNS, MS)[1:]}
    assert rows == {
        "LVTC L/2": ["1", "-20.0", "+0.0", "98.0 %", "60 %"],
        "RVTC edge": ["1", "+10.0", "-10.0", "90.8 %", "50 %"],
    }


def test_kinds_have_equal_weight_and_questions_in_the_total():
    assert quality_report.share(RUNS[0], ["digit", "colour"]) == pytest.approx(85)
    assert quality_report.share_of_all(RUNS[0]) == pytest.approx(100 * 98 / 110)


def test_timed_images_have_the_tiles_of_the_data_under_every_rule():
    """Every hundredth image is large, as in data that are drawn in turns."""
    sizes = [(400, 300) if number % 104 == 52 else (100 + number % 90, 112) for number in range(6656)]
    timed = quality.timed_sizes(sizes)
    assert len(timed) == quality.TIMED
    for rule in quality_report.RULES:
        means = quality.mean_tiles(timed, rule), quality.mean_tiles(sizes, rule)
        assert means[0] == pytest.approx(means[1], abs=0.1), rule


def test_what_two_rules_cut_otherwise_is_counted(tmp_path):
    def record(width, height, asked, image="a.png"):
        turns = [{"from": who, "value": "x"} for _ in range(asked) for who in ("human", "gpt")]
        return json.dumps({"image": image, "width": width, "height": height, "conversations": turns})

    (tmp_path / "train.jsonl").write_text("\n".join([record(224, 224, 1), record(170, 170, 2)]) + "\n")
    held_out = [record(170, 170, 3), record(224, 224, 4), record(1, 1, 1, ["a.png", "b.png"])]
    (tmp_path / "val.jsonl").write_text("\n".join(held_out) + "\n")
    text = quality.about_pictures(quality.pictures_of(tmp_path))
    assert "cuts 2 of 4 pictures otherwise than `edge`, 1 of the 2 held-out ones, with 3 questions" in text


def test_report_has_a_line_per_combination(tmp_path):
    tokens = dict.fromkeys(MS, (2.0, 20.0))
    same = {rule: rule for rule in quality_report.RULES}
    lines = quality_report.report_lines(RUNS, MS, tokens, same)
    assert sum(line.startswith("| pvtc ") for line in lines) == 3
    quality_report.plot(RUNS, MS, tokens, same, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size


def test_every_combination_is_another_recipe():
    recipes = [quality_runs.recipe(key, 1, 20) for key in quality_runs.COMBINATIONS]
    assert len({quality_runs.digest(settings) for settings in recipes}) == len(recipes) == 24
    assert {settings["expand_layer"] for settings in recipes} == {None, 1, 2, 3}


def test_visual_tokens_are_the_mean_of_the_layers():
    sizes = [(100, 100), (224, 112)]  # one tile; two and a thumbnail
    assert quality.compression(sizes, ("pvtc", "off", "edge")) == (2.0, 2 * 16)
    assert quality.compression(sizes, ("pvtc", "3L/4", "edge")) == (2.0, 2 * (0.75 * 1 + 0.25 * 16))


def test_a_run_is_another_one_if_what_it_starts_from_is():
    demo, plain = (quality.Stage(key, 6) for key in (quality.DEMO, quality.UNCOMPRESSED))
    starts = ([demo], [plain], [demo, plain], [plain, demo], [demo, plain._replace(steps=7)])
    digests = [quality.run_digest(PLAIN, 1, start, steps) for start in starts for steps in (2, 3)]
    assert len(set(digests)) == len(digests) == 10


def test_second_training_of_the_start_begins_with_the_first_and_new_projectors(tmp_path, monkeypatch):
    trained, imported = [], []

    def train(data, settings, *flags, ranks):
        trained.append((settings["projector"], settings["train_iters"], flags))
        return {"digit": (1, 2)}

    def start_of(base, combination, seed):
        imported.append((base, combination, seed))
        return tmp_path / "start"

    monkeypatch.setattr(quality_runs, "train", train)
    monkeypatch.setattr(quality_runs, "start_of", start_of)
    monkeypatch.setattr(
        quality_runs, "run_python", lambda *arguments: Path(arguments[-1]).mkdir(parents=True)
    )
    monkeypatch.setattr(quality_runs, "without_projectors", lambda folder: None)
    stages = (quality.Stage(quality.DEMO, 6), quality.Stage(quality.UNCOMPRESSED, 7))
    hf = quality_runs.trained_base(tmp_path, tmp_path / "work", stages)
    (first, steps, flags), (second, more_steps, more_flags) = trained
    assert (first, steps, second, more_steps) == ("pvtc", 6, "mlp", 7)
    assert "--pretrained-checkpoint" not in flags
    assert more_flags[-2:] == ("--pretrained-checkpoint", str(tmp_path / "start"))
    ((base, combination, seed),) = imported
    assert (combination, seed) == (quality.UNCOMPRESSED, quality_runs.BASE_SEED) and base != hf
    assert base == quality_runs.trained_base(tmp_path, tmp_path / "work", stages[:1])
    assert len(trained) == 2, "what is there is trained again"


@pytest.mark.parametrize(
    ("prefixes", "compression"),
    [
        (("projector.", "lvtc_projectors.2."), {"expand_layer": 2, "low_ratio": 0.25}),
        (("mlp1.0.",), None),  # InternVL's own form, which a model without compression has
    ],
)
def test_base_is_taken_without_its_projectors_and_with_all_else(tmp_path, prefixes, compression):
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    save_file({f"{name}q.weight": torch.ones(2) for name in (*prefixes, "vision_model.")}, weights)
    config.write_text(json.dumps({"compression": compression} if compression else {}))
    quality_runs.without_projectors(tmp_path)
    assert list(load_file(weights)) == ["vision_model.q.weight"]
    kept = json.loads(config.read_text()).get("compression")
    assert kept == (compression and {"expand_layer": None, "inject_layers": [], "low_ratio": 0.25})
    with pytest.raises(AssertionError, match="has no projectors"):
        quality_runs.without_projectors(tmp_path)
