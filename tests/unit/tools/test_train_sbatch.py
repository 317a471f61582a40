"""train.sbatch before it starts anything: what is unset or wrong is named, without SLURM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def submit(tmp_path: Path, **changes: str) -> tuple[int, str]:
    (tmp_path / "data").mkdir(exist_ok=True)
    values = {
        "SLURM_SUBMIT_DIR": ROOT,
        "SLURM_JOB_ID": "1",
        "CLUSTER_ENV": "none",
        "RECIPE": "examples/demo/demo.yaml",
        "DATA": tmp_path / "data",
        "TOKENIZER": tmp_path / "data",
        "SAVE": tmp_path / "save",
        "GPUS_PER_NODE": "2",
        "VENV": Path(sys.executable).parents[1],
        **changes,
    }
    names = {name: str(value) for name, value in values.items()}
    job = subprocess.run(
        ["bash", str(ROOT / "examples" / "slurm" / "train.sbatch")],
        env={"PATH": os.environ["PATH"], **names},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return job.returncode, job.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"DATA": "", "SAVE": ""}, "DATA is not set, SAVE is not set, give it with --export"),
        ({"VENV": ""}, "VENV or CONTAINER is not set"),
        ({"CLUSTER_ENV": "nowhere.env"}, "CLUSTER_ENV nowhere.env: no such file"),
        ({"GPUS_PER_NODE": "two"}, "GPUS_PER_NODE is 'two', not a number"),
        ({"RECIPE": "nowhere.yaml"}, "RECIPE nowhere.yaml: no such file below"),
        ({"DATA": "/nowhere"}, "DATA /nowhere: no such file or directory"),
        ({"TOKENIZER": "/nowhere"}, "TOKENIZER /nowhere: no such directory"),
        ({"SAVE": "/proc/nowhere"}, "SAVE /proc/nowhere cannot be made"),
        ({"SLURM_SUBMIT_DIR": "/"}, "/ is not the repository"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, message):
    code, err = submit(tmp_path, **changes)
    assert code == 1
    assert message in err
