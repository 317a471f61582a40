"""train.sbatch on a real SLURM of two nodes, two ranks each: `make test-slurm`.

Every scenario ends with the weights and optimizer state of the unbroken run, bit for bit.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))

from megatron_internvlx import files  # noqa: E402
from megatron_internvlx.lifecycle import resume  # noqa: E402
from testing.checkpoints import differing  # noqa: E402
from tools import make_demo_data  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0
    or any(shutil.which(name) is None for name in ("slurmctld", "slurmd", "sbatch", "munged")),
    reason="needs root and Debian's slurmctld slurmd slurm-client munge (tests/slurm/cluster.sh install)",
)
# Long enough that a signal arrives well before the next checkpoint, and before the end.
STEPS, EVERY = 45, 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """SLURM's commands in this environment."""
    folder = tmp_path_factory.mktemp("slurm")
    script = REPOSITORY / "tests" / "slurm" / "cluster.sh"
    up = subprocess.run(["bash", script, "up", folder], capture_output=True, text=True, timeout=60)
    assert up.returncode == 0, up.stderr
    yield os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run(["bash", script, "down", folder], timeout=30)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    assert make_demo_data.main(["--out", str(folder), "--train", "48", "--val", "4"]) == 0
    return folder


class Job:
    """One job of train.sbatch, and what it did."""

    def __init__(
        self, cluster: dict, demo: Path, save: Path, arguments: tuple[str, ...] = (), **environment: str
    ) -> None:
        self.cluster, self.save = cluster, save
        self.log = save.parent / f"{save.name}.out"
        values = {
            "RECIPE": "examples/demo/demo.yaml",
            "DATA": demo / "meta.json",
            "TOKENIZER": demo / "tokenizer",
            "SAVE": save,
            "VENV": Path(sys.executable).parents[1],
            "GPUS_PER_NODE": "2",
            "CLUSTER_ENV": "none",
            "PREFLIGHT": "0",
            "GLOO_SOCKET_IFNAME": "lo",
            "SHUTDOWN_SECONDS": "10",
            **environment,
        }
        settings = (
            "--loader-workers 0 --log-interval 1 --eval-iters 0 --micro-batch-size 1 --global-batch-size 4 "
            f"--max-tiles 2 --train-iters {STEPS} --lr-decay-iters {STEPS} --save-interval {EVERY}"
        ).split()
        command = [
            "sbatch",
            "--parsable",
            "--nodes",
            "2",
            "--output",
            self.log,
            "examples/slurm/train.sbatch",
        ]
        done = subprocess.run(
            [*command, *settings, *arguments],
            env=cluster | {key: str(value) for key, value in values.items()},
            cwd=REPOSITORY, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.strip()

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.cluster, capture_output=True, text=True, timeout=30)
        return done.stdout.strip()

    def shown(self, key: str) -> str:
        found = re.search(rf"\b{key}=(\S+)", self.run("scontrol", "show", "job", self.id))
        return found[1] if found else ""

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def until(self, condition, what: str, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                pytest.fail(f"no {what} in {seconds} s; job {self.shown('JobState')}:\n{self.text()[-4000:]}")
            time.sleep(0.1)

    def until_step(self, step: int) -> None:
        self.until(lambda: re.search(rf"step +{step}/{STEPS} ", self.text()), f"step {step}")

    def until_state(self, *states: str) -> None:
        self.until(lambda: self.shown("JobState") in states, f"state {states}")

    def ranks(self) -> list[int]:
        """Process ids of the ranks of this job, whose parents are torchrun."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                command = (entry / "cmdline").read_bytes().split(b"\0")
                if b"pretrain_vlm.py" in command[:3] and os.fsencode(self.save) in command:
                    found.append(int(entry.name))
        return found


@pytest.fixture(scope="module")
def unbroken(cluster, demo, tmp_path_factory) -> Path:
    save = tmp_path_factory.mktemp("unbroken") / "run"
    job = Job(cluster, demo, save)
    job.until_state("COMPLETED", "FAILED")
    assert job.shown("JobState") == "COMPLETED", job.text()
    assert "finished" in job.text()
    return save


def check(job: Job, unbroken: Path) -> None:
    job.until_state("COMPLETED", "FAILED")
    assert job.shown("JobState") == "COMPLETED", job.text()
    final = files.checkpoint_directory(job.save, STEPS)
    assert resume.fault(final) is None
    assert differing(final, files.checkpoint_directory(unbroken, STEPS)) == []


def test_signal_before_the_limit_leads_to_checkpoint_requeue_and_resume(cluster, demo, unbroken, tmp_path):
    job = Job(cluster, demo, tmp_path / "run")
    job.until_step(2)
    job.run("scancel", "--batch", "--signal", "USR1", job.id)
    job.until(lambda: "requeueing" in job.text(), "requeue")
    assert "stopped by a signal, after a checkpoint" in job.text()
    reached = files.iterations(job.save)[0]
    assert 2 <= reached < EVERY  # between the regular checkpoints
    check(job, unbroken)
    assert f"resuming from {files.checkpoint_directory(job.save, reached)}" in job.text()
    assert job.shown("Restarts") == "1"


def test_cancelled_job_goes_on_when_submitted_again(cluster, demo, unbroken, tmp_path):
    job = Job(cluster, demo, tmp_path / "run")
    job.until_step(EVERY + 1)
    job.run("scancel", job.id)
    job.until_state("CANCELLED")
    job.until(lambda: not job.ranks(), "end of the ranks")
    reached = resume.newest_complete(job.save)[0]
    assert reached is not None and reached > EVERY  # saved on SIGTERM, after the last regular checkpoint
    again = Job(cluster, demo, tmp_path / "run")
    check(again, unbroken)
    assert f"resuming from {files.checkpoint_directory(job.save, reached)}" in again.text()


def test_killed_and_stopped_ranks_are_restarted(cluster, demo, unbroken, tmp_path):
    job = Job(cluster, demo, tmp_path / "run", ("--stall-minutes", "0.5"))
    job.until_step(EVERY + 1)
    os.kill(job.ranks()[-1], signal.SIGKILL)
    going_on = f"resuming from {files.checkpoint_directory(job.save, EVERY)}"
    again = re.compile(rf"{re.escape(going_on)}.* step +{EVERY + 1}/{STEPS} ", re.S)
    job.until(lambda: again.search(job.text().replace("\n", " ")), "step after the restart")
    victim = job.ranks()[0]
    os.kill(victim, signal.SIGSTOP)
    check(job, unbroken)
    said = job.text()
    assert said.count(going_on) == 2
    assert "exitcode: -9" in said and f"(pid {victim}) has written no heartbeat" in said
    assert job.shown("Restarts") == "0"  # torchrun's restarts, not SLURM's


def test_job_of_a_dead_node_is_requeued(cluster, demo, unbroken, tmp_path):
    """SLURM gives the node up, as it does when its daemon does not answer."""
    job = Job(cluster, demo, tmp_path / "run")
    job.until_step(EVERY + 1)
    job.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    job.until(lambda: job.shown("Restarts") == "1", "requeue by SLURM")
    job.until(lambda: not job.ranks(), "end of the ranks")
    job.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    check(job, unbroken)
    # The other node's ranks are told to stop, and here those of the "dead" one can still save with them.
    (reached,) = re.findall(r"resuming from .*/iter_(\d+)", job.text())
    assert int(reached) >= EVERY


def test_signalled_job_waits_for_a_drained_node(cluster, demo, unbroken, tmp_path):
    job = Job(cluster, demo, tmp_path / "run")
    job.until_step(1)
    job.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    job.run("scancel", "--batch", "--signal", "USR1", job.id)
    job.until(lambda: "requeueing" in job.text(), "requeue")
    job.until_state("PENDING")
    time.sleep(3)
    assert job.shown("JobState") == "PENDING"  # one of two nodes is left
    job.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    check(job, unbroken)


def test_missing_settings_are_named(cluster, demo, tmp_path):
    job = Job(cluster, demo, tmp_path / "run", DATA="")
    job.until_state("FAILED")
    assert "DATA is not set" in job.text()
