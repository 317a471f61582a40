"""Which commit a run says it is of: the repository's, or the one that an image was built from."""

import re
import subprocess
from pathlib import Path

from megatron_internvlx.reporting.mlflow_sink import BUILT_FROM, git_state

ROOT = Path(__file__).parents[3]


def test_a_repository_says_commit_and_changes(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *who, *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    (tmp_path / BUILT_FROM).write_text("another\n")
    expected = {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "git.changed": "False"}
    assert git_state(tmp_path) == expected
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == expected | {"git.changed": "True"}


def test_an_image_says_what_it_was_built_from(tmp_path: Path) -> None:
    """Its build leaves .git out, and writes the file that is looked for."""
    assert git_state(tmp_path) == {}
    (tmp_path / BUILT_FROM).write_text("0123abc\n")
    assert git_state(tmp_path) == {"mlflow.source.git.commit": "0123abc"}
    assert ".git" in (ROOT / ".dockerignore").read_text().splitlines()
    assert re.search(
        rf'^RUN .*echo "\$GIT_COMMIT" > {re.escape(BUILT_FROM)};', (ROOT / "Dockerfile").read_text(), re.M
    )
