"""What people and services read of the project beside its code: versions, citation, templates, workflow."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import megatron_internvlx

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_one_version() -> None:
    setup = re.search(r'version="([^"]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert setup is not None
    assert setup[1] == read(ROOT / "CITATION.cff")["version"] == megatron_internvlx.__version__


def test_citation_has_what_the_format_asks_for() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["url"].endswith(paper["identifiers"][0]["value"].removeprefix("arXiv:"))


def test_the_workflow_runs_what_a_laptop_runs() -> None:
    (job,) = read(GITHUB / "workflows" / "ci.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_forms(name: str) -> None:
    form = read(GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    for field in form["body"]:
        assert field["type"] in ("textarea", "dropdown", "input", "checkboxes")
        assert field["attributes"]["label"]


def test_every_command_of_make_that_documents_name_is_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    documents = [ROOT / "CONTRIBUTING.md", ROOT / "RELEASING.md", GITHUB / "PULL_REQUEST_TEMPLATE.md"]
    for path in documents:
        for line in re.findall(r"`make ([\w -]+)`", path.read_text(encoding="utf-8")):
            assert set(line.split()) <= targets, f"{path.name}: make {line}"
