"""The MLflow sink: what arrives, across restarts, crashes and outages of a real server."""

import json
import os
import time
from pathlib import Path

import pytest

from benchmarks.tracking import Server
from megatron_internvlx.training import mlflow_sink
from megatron_internvlx.training.mlflow_sink import MlflowSink, RunInfo

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
    assert mlflow_sink.mark_failed(tmp_path)
    assert run_of(tmp_path).info.status == "FAILED"


@pytest.fixture
def server(tmp_path):
    one = Server(tmp_path)
    yield one
    one.kill()


@pytest.mark.slow
def test_metrics_of_an_outage_follow(server, tmp_path, capsys):
    server.start()
    folder = tmp_path / "run"
    sink = MlflowSink(info(), folder, server.uri)
    slowest = 0.0

    def log(steps: range) -> None:
        nonlocal slowest
        for step in steps:
            start = time.perf_counter()
            sink.metrics(step, {"loss": 1 / step, "lr": 0.1})
            slowest = max(slowest, time.perf_counter() - start)
            time.sleep(0.01)

    log(range(1, 50))
    while not (folder / mlflow_sink.RUN_FILE).exists():
        time.sleep(0.05)
    server.kill()
    log(range(50, 150))
    server.start()
    log(range(150, 200))
    sink.close("FINISHED", seconds=120)
    assert [step for step, _ in history(folder, "loss")] == list(range(1, 200))
    assert run_of(folder).info.status == "FINISHED"
    said = capsys.readouterr().err
    assert said.count("does not answer") == 1 and "nothing was lost" in said
    assert "Retrying" not in said
    assert slowest < 2  # the caller only puts into a queue; a request to a dead server takes longer


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


def test_too_long_an_outage_states_what_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_sink, "MOST_KEPT", 10)
    sink = MlflowSink(info(), tmp_path, "http://127.0.0.1:9")
    for step in range(25):
        sink.metrics(step, {"loss": 1.0})
    sink.close("FAILED", seconds=5)
    assert sink.lost == 15
