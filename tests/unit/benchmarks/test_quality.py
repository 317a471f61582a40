"""The quality study: recipes of all combinations, and what its tables say about them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import quality, quality_report, quality_runs


def run(projector, expansion, rvtc, fine, coarse, seed=1):
    kinds = {"digit": [fine, 10], "colour": [coarse, 100]}
    names = {"projector": projector, "expansion": expansion, "rvtc": rvtc}
    return names | {"seed": seed, "kinds": kinds, "commit": "abc"}


PLAIN, SHALLOW, CUT = ("pvtc", "off", "off"), ("pvtc", "L/2", "off"), ("pvtc", "off", "edge")
RUNS = [run(*PLAIN, 8, 90), run(*SHALLOW, 6, 90), run(*CUT, 9, 80)]
MS = {PLAIN: 100.0, SHALLOW: 60.0, CUT: 50.0}


def test_effects_compare_the_same_runs_with_and_without():
    rows = {row[0]: row[1:] for row in quality_report.effect_rows(RUNS, MS)[1:]}
    assert rows == {
        "LVTC L/2": ["1", "-20.0", "+0.0", "60 %"],
        "RVTC edge": ["1", "+10.0", "-10.0", "50 %"],
    }


def test_kinds_have_equal_weight_and_questions_in_the_total():
    assert quality_report.share(RUNS[0], ["digit", "colour"]) == pytest.approx(85)
    assert quality_report.share_of_all(RUNS[0]) == pytest.approx(100 * 98 / 110)


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
    digests = [
        quality.run_digest(PLAIN, 1, base_steps, steps) for base_steps, steps in ((6, 2), (7, 2), (6, 3))
    ]
    assert len(set(digests)) == 3


def test_base_is_taken_without_its_projectors_and_with_all_else(tmp_path):
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = {
        f"{name}.weight": torch.ones(2) for name in ("projector.q", "lvtc_projectors.2.q", "vision_model.q")
    }
    save_file(tensors, weights)
    config.write_text(json.dumps({"compression": {"expand_layer": 2, "low_ratio": 0.25}}))
    quality_runs.without_projectors(tmp_path)
    assert list(load_file(weights)) == ["vision_model.q.weight"]
    compression = json.loads(config.read_text())["compression"]
    assert compression == {"expand_layer": None, "inject_layers": [], "low_ratio": 0.25}
    with pytest.raises(AssertionError, match="has no projectors"):
        quality_runs.without_projectors(tmp_path)
