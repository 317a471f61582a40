"""The MLflow sink: what arrives, across restarts, crashes and outages of a real server."""

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from megatron_internvlx import platform

platform.setup()

from benchmarks.tracking import Server  # noqa: E402
from megatron_internvlx.lifecycle.resume import RunState  # noqa: E402
from megatron_internvlx.reporting import mlflow_sink  # noqa: E402
from megatron_internvlx.reporting.mlflow_sink import MlflowSink, RunInfo  # noqa: E402
from megatron_internvlx.reporting.spool import Spool, Value  # noqa: E402
from tests.namespaces import parsed  # noqa: E402

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


def history(folder: Path, key: str, uri: str | None = None) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    known = json.loads((folder / mlflow_sink.RUN_FILE).read_text())
    client = MlflowClient(uri or known["uri"])
    return [(m.step, m.value) for m in client.get_metric_history(known["run_id"], key)]


def run_of(folder: Path):
    from mlflow import MlflowClient

    known = json.loads((folder / mlflow_sink.RUN_FILE).read_text())
    return MlflowClient(known["uri"]).get_run(known["run_id"])


def info() -> RunInfo:
    return RunInfo("tests", "a run", {"lr": "0.1"}, {"layout": "TP2"}, {"arguments.json": "{}"})


def test_one_run_over_two_starts_in_a_local_store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    picture = tmp_path / "report.png"
    picture.write_bytes(b"picture")
    first = MlflowSink(info(), tmp_path)
    first.metrics(1, {"loss": 2.0, "mfu": None})
    first.artifact(picture)
    first.close("SCHEDULED", seconds=120)
    assert run_of(tmp_path).info.status == "SCHEDULED"
    run = run_of(tmp_path).info.run_id
    second = MlflowSink(info(), tmp_path)
    second.metrics(2, {"loss": 1.0})
    second.close("FINISHED", seconds=120)
    assert run_of(tmp_path).info.run_id == run
    assert history(tmp_path, "loss") == [(1, 2.0), (2, 1.0)]
    assert run_of(tmp_path).info.status == "FINISHED"
    assert run_of(tmp_path).data.params == {"lr": "0.1"}
    assert run_of(tmp_path).data.tags["layout"] == "TP2"
    assert {path.name for path in tmp_path.rglob("artifacts/*")} == {"report.png", "arguments.json"}
    crash_on_a_rank_without_sinks(tmp_path, monkeypatch)
    assert run_of(tmp_path).info.status == "FAILED"


def crash_on_a_rank_without_sinks(save: Path, monkeypatch) -> None:
    """Rank 0 of two fails; the sink is on the last, which nobody asks."""
    from megatron_internvlx.lifecycle import signals
    from megatron_internvlx.lifecycle.outcome import Outcome
    from megatron_internvlx.lifecycle.setup import setup_from
    from megatron_internvlx.reporting.tracking import Trackers

    monkeypatch.setattr(signals.interrupts, "last_acts", [])
    args = parsed(world_size=2, save=str(save), auto_resume=True, mlflow_experiment="tests")
    Outcome(setup_from(args), signals.StopSignals(), Trackers(args).close).failed("a bug")
    assert "rank 0 on" in RunState.read(save).reason


@pytest.fixture
def server(tmp_path):
    one = Server(tmp_path)
    yield one
    one.kill()


@pytest.mark.heavy
def test_metrics_of_an_outage_follow(server, tmp_path, monkeypatch, capsys):
    server.start()
    folder = tmp_path / "run"
    sink = MlflowSink(info(), folder, server.uri)
    connect, connecting = socket.socket.connect, set()

    def seen(self, address):
        connecting.add(threading.current_thread().name)
        return connect(self, address)

    def log(steps: range) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "connect", seen)
            for step in steps:
                sink.metrics(step, {"loss": 1 / step, "lr": 0.1})
                time.sleep(0.01)

    log(range(1, 50))
    while not (folder / mlflow_sink.RUN_FILE).exists():
        time.sleep(0.05)
    server.kill()
    log(range(50, 150))
    server.start()
    log(range(150, 200))
    sink.close("FINISHED", seconds=120)
    assert connecting == {"mlflow"}  # the caller, who trains, waits for no server
    assert [step for step, _ in history(folder, "loss")] == list(range(1, 200))
    assert run_of(folder).info.status == "FINISHED"
    said = capsys.readouterr().err
    assert said.count("does not answer") == 1 and "nothing was lost" in said
    assert "Retrying" not in said


def test_without_a_server_metrics_wait_for_the_next_start(tmp_path, monkeypatch, capsys):
    dead = "http://127.0.0.1:9"
    sink = MlflowSink(info(), tmp_path, dead)
    sink.metrics(3, {"loss": 0.5})
    start = time.monotonic()
    sink.close("FAILED", seconds=5)
    assert time.monotonic() - start < 20
    assert "kept in" in capsys.readouterr().err
    again = MlflowSink(info(), tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    again.metrics(4, {"loss": 0.4})
    again.close("FINISHED", seconds=120)
    assert history(tmp_path, "loss") == [(3, 0.5), (4, 0.4)]
    assert not (tmp_path / mlflow_sink.PENDING_FILE).exists()


def test_a_kill_during_an_outage_loses_no_metric(tmp_path, capsys):
    killed, after = tmp_path / "killed", tmp_path / "after"
    sink = MlflowSink(info(), killed, "http://127.0.0.1:9")
    pending = killed / mlflow_sink.PENDING_FILE
    for step in (1, 2, 3):  # the later ones come while it waits for another try
        sink.metrics(step, {"loss": 1 / step})
        end = time.monotonic() + 60
        while not (pending.exists() and pending.read_text().count("\n") == step):
            assert time.monotonic() < end, "not in the file"
            time.sleep(0.02)
    after.mkdir()
    # What a SIGKILL leaves, the last line torn.
    (after / mlflow_sink.PENDING_FILE).write_text(pending.read_text() + '{"key": "loss", "val')
    sink.close("FAILED", seconds=20)
    again = MlflowSink(info(), after, f"sqlite:///{after}/mlflow.db")
    again.metrics(4, {"loss": 0.25})
    again.close("FINISHED", seconds=120)
    assert history(after, "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert not (after / mlflow_sink.PENDING_FILE).exists()
    assert "1 of 4 lines in" in capsys.readouterr().err


def test_the_file_of_an_outage_does_not_grow_for_ever(tmp_path):
    spool = Spool(tmp_path / "pending", most=10)
    values = [Value("loss", float(n), n, n) for n in range(30)]
    for n in range(30):  # as many as five wait at a time
        spool.written = max(spool.written - (n >= 5), 0)
        spool.add(values[max(n - 4, 0) : n + 1])
    assert len((tmp_path / "pending").read_text().splitlines()) <= 10
    assert Spool(tmp_path / "pending", 10).read()[-5:] == values[-5:]


def test_a_disk_without_room_for_metrics_is_said_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    spool = Spool(tmp_path / "file" / "pending", most=10)
    for count in (1, 2):
        spool.add([Value("loss", 1.0, 0, step) for step in range(count)])
    assert spool.error is not None and spool.written == 0
    assert capsys.readouterr().err.count("are kept in memory only") == 1


def test_too_long_an_outage_states_what_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_sink, "MOST_KEPT", 10)
    sink = MlflowSink(info(), tmp_path, "http://127.0.0.1:9")
    for step in range(25):
        sink.metrics(step, {"loss": 1.0})
    sink.close("FAILED", seconds=5)
    assert sink.lost == 15
