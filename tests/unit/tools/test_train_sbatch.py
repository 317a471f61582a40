"""train.sbatch without SLURM: what is unset or wrong is named, and what it would start."""

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
        env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", **names},
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
        ({"VALID_DATA": "/nowhere.json"}, "VALID_DATA /nowhere.json: no such file"),
        ({"PREFLIGHT": "yes"}, "PREFLIGHT is 'yes': 0 for no check"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, message):
    code, err = submit(tmp_path, **changes)
    assert code == 1
    assert message in err


def started(tmp_path: Path, **changes: str) -> list[str]:
    """The steps that srun is asked for. The fake scontrol knows one node, and cannot requeue."""
    fakes = {
        "srun": f'printf "%s " "$@" >> {tmp_path}/steps; echo >> {tmp_path}/steps',
        "scontrol": '[ "$1" = show ] && echo n1',
    }
    (tmp_path / "bin").mkdir()
    for name, text in fakes.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_ON_NODE": "96"}
    code, err = submit(tmp_path, **slurm, **changes)
    assert code == 75 and "could not requeue" in err, err
    return (tmp_path / "steps").read_text().splitlines()


def test_a_node_is_checked_and_a_run_is_tracked_and_has_all_cores(tmp_path):
    check, run = started(tmp_path)
    assert "check_cluster.py --node" in check and "pretrain_vlm.py" in run
    assert "--cpus-per-task 96" in check and "--cpus-per-task 96" in run
    assert "--mlflow-experiment save " in run
    assert "--valid-data" not in run and "--numa-binding" not in run


def test_held_out_data_is_validated_on_and_the_network_checked(tmp_path):
    (tmp_path / "data" / "validation").mkdir(parents=True)
    (tmp_path / "data" / "validation" / "meta.json").write_text("{}")
    changes = {
        "PREFLIGHT": "2",
        "NUMA_BINDING": "node",
        "CPUS_PER_TASK": "48",
        "MLFLOW_EXPERIMENT_NAME": "mine",
    }
    _, network, run = started(tmp_path, **changes)
    assert f"check_cluster.py --shared {tmp_path}/save" in network and "torch.distributed.run" in network
    assert f"--valid-data {tmp_path}/data/validation/meta.json" in run
    assert "--numa-binding node" in run and "--cpus-per-task 48" in run and "--mlflow-experiment mine" in run


@pytest.mark.parametrize(
    ("asked", "given"),
    [(None, ""), ("mine", "--mlflow-experiment mine"), ("none", "--without mlflow_experiment")],
)
def test_the_experiment_of_a_recipe_stands(tmp_path, asked, given):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("mlflow_experiment: grid\n")
    changes = {"PREFLIGHT": "0", "RECIPE": str(recipe), "VALID_DATA": "none"}
    (run,) = started(tmp_path, **changes, **({"MLFLOW_EXPERIMENT_NAME": asked} if asked else {}))
    assert given in run and (given or "mlflow" not in run)
