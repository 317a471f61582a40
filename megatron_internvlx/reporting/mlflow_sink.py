"""Metrics, settings and pictures of a run in MLflow; training never waits for the server.

Calls only fill a queue, and a thread does the rest. While the server does not answer, metrics are kept with their
steps and times, also in `mlflow_pending.jsonl` beside the checkpoints, and are sent once it is back; if the run
ends before, or is killed, the next start sends the file. A kill loses the metrics that came while a request was
waiting: the last 10 s at most.

Store: MLFLOW_TRACKING_URI, else an SQLite file beside the checkpoints. All starts of a run write to one
MLflow run, which `mlflow_run.json` remembers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_internvlx.reporting.spool import Spool, Value

# MLflow waits four minutes for a dead server by default; here every call is tried again later anyway.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
}
RUN_FILE, PENDING_FILE = "mlflow_run.json", "mlflow_pending.jsonl"
_BATCH = 500  # metrics of one request; the server takes 1000
_LONGEST_WAIT = 10.0  # seconds between two tries
BUILT_FROM = ".git_commit"
MOST_KEPT = (
    200_000  # metrics held during an outage; beyond it the oldest are dropped, and their number is printed
)


@dataclass
class RunInfo:
    """Description of a run, written once when the run is created."""

    experiment: str
    name: str | None = None
    parameters: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    """Artifacts by file name: the whole configuration, the layout."""


class MlflowSink:
    """One MLflow run, written by a thread of its own.

    Args:
        info: description of the run.
        folder: directory of the local store and the two files; the `--save` directory.
        uri: tracking URI. None: MLFLOW_TRACKING_URI, else SQLite in `folder`.
    """

    def __init__(self, info: RunInfo, folder: Path, uri: str | None = None) -> None:
        self.info, self.folder = info, folder
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.absolute()}/mlflow.db"
        self.lost = 0
        """Number of metrics dropped, because an outage was too long."""
        self.run_id: str | None = None
        self._values: list[Value] = []
        self._spool = Spool(folder / PENDING_FILE, 2 * MOST_KEPT)
        self._orders: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._artifacts: list[Path] = []
        self._texts: dict[str, str] = {}
        self._client: Any = None
        self._outage_reported = False
        self._closing: str | None = None
        self._keeping = threading.Lock()  # `close` may keep the rest while the thread waits for a server
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log values of a step; None is left out. Returns at once."""
        now = int(time.time() * 1000)
        batch = [Value(key, float(v), now, step) for key, v in values.items() if v is not None]
        self._orders.put(("values", batch))

    def artifact(self, path: str | Path) -> None:
        """Store a copy of a file with the run, as it is when sent. Returns at once."""
        self._orders.put(("artifact", Path(path)))

    def close(self, status: str, seconds: float = 60.0) -> None:
        """End the run as FINISHED, FAILED, KILLED or SCHEDULED (to be continued); waits at most `seconds`."""
        self._orders.put(("close", status))
        self._thread.join(seconds)
        if self._thread.is_alive() or self._values:
            self._save_undelivered()

    def _work(self) -> None:
        """The thread: take orders, deliver, and wait longer after every failure."""
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        # One line per outage is ours; MLflow's connections would add one per try.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        wait = 0.0
        with self._keeping:
            self._values = self._spool.read()
        while True:
            idle = not (self._values or self._has_pending()) and self._client is not None
            self._take_orders(None if idle else 0.0)
            try:
                self._deliver()
                wait = 0.0
            except Exception as error:  # MLflow raises its own, requests' and SQL's
                self._report_outage(error)
                if self._closing is not None:
                    return
                wait = min(max(2 * wait, 0.5), _LONGEST_WAIT)
                self._collect_for(wait)
                continue
            if self._closing is not None and not self._values and not self._has_pending():
                self._finish()
                return

    def _collect_for(self, seconds: float) -> None:
        """Collect values until the next try; the end of the run ends the wait at once."""
        end = time.monotonic() + seconds
        self._spool_values()
        while self._closing is None and (left := end - time.monotonic()) > 0:
            self._take_orders(left)
            self._spool_values()

    def _spool_values(self) -> None:
        """Write undelivered values to the file too: the process may be killed."""
        with self._keeping:
            self._spool.add(self._values)

    def _has_pending(self) -> bool:
        return bool(self._artifacts or self._texts) or not self._orders.empty()

    def _take_orders(self, seconds: float | None) -> None:
        """Take all queued orders; if there are none, wait for one, at most `seconds` (None: without limit)."""
        block = seconds is None or seconds > 0
        with contextlib.suppress(queue.Empty):
            while block or not self._orders.empty():
                kind, what = self._orders.get(block, seconds)
                block = False
                if kind == "values":
                    self._add(what)
                elif kind == "artifact":
                    self._artifacts.append(what)
                else:
                    self._closing = what

    def _add(self, values: list[Value]) -> None:
        with self._keeping:
            self._values += values
            if (surplus := len(self._values) - MOST_KEPT) > 0:
                self._drop(surplus)
                self.lost += surplus

    def _drop(self, count: int) -> None:
        """Drop the oldest values, delivered or lost; call it with `_keeping` held."""
        del self._values[:count]
        self._spool.written = max(self._spool.written - count, 0)

    def _deliver(self) -> None:
        """Send everything pending; raises at the first failure and keeps what was not sent."""
        if self._client is None:
            self._open()
        from mlflow.entities import Metric

        while self._values:
            batch = self._values[:_BATCH]
            self._client.log_batch(
                self.run_id, metrics=[Metric(v.key, v.value, v.time, v.step) for v in batch]
            )
            with self._keeping:
                self._drop(len(batch))
        self._spool.clear()
        while self._artifacts:
            if self._artifacts[0].is_file():
                self._client.log_artifact(self.run_id, str(self._artifacts[0]))
            del self._artifacts[0]
        for name in list(self._texts):
            self._client.log_text(self.run_id, self._texts[name], name)
            del self._texts[name]
        if self._outage_reported:
            self._outage_reported = False
            lost = f", {self.lost} metrics were lost" if self.lost else ", nothing was lost"
            print(f"mlflow: {self.uri} answers again{lost}", file=sys.stderr, flush=True)

    def _open(self) -> None:
        """Find the run of earlier starts, or create one."""
        from mlflow import MlflowClient

        client = MlflowClient(self.uri)
        known = _read(self.folder / RUN_FILE)
        if known.get("uri") == self.uri:
            self.run_id = known["run_id"]
            client.update_run(self.run_id, status="RUNNING")
        else:
            found = client.get_experiment_by_name(self.info.experiment)
            # Beside a local store; MLflow would take the working directory.
            store = self.uri.removeprefix("sqlite:///")
            place = (Path(store).parent / "mlflow-artifacts").as_uri() if store != self.uri else None
            experiment = (
                found.experiment_id if found else client.create_experiment(self.info.experiment, place)
            )
            run = client.create_run(experiment, tags=self.info.tags, run_name=self.info.name)
            self.run_id = run.info.run_id
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / RUN_FILE).write_text(json.dumps({"uri": self.uri, "run_id": self.run_id}))
            self._log_parameters(client)
        for key, value in self.info.tags.items():
            client.set_tag(self.run_id, key, value)
        self._texts = dict(self.info.texts)
        self._client = client

    def _log_parameters(self, client: Any) -> None:
        from mlflow.entities import Param

        items = [Param(key, value[:6000]) for key, value in self.info.parameters.items()]
        for start in range(0, len(items), 100):  # as many as a request takes
            client.log_batch(self.run_id, params=items[start : start + 100])

    def _finish(self) -> None:
        try:
            self._client.set_terminated(self.run_id, self._closing)
        except Exception as error:
            self._report_outage(error)

    def _report_outage(self, error: Exception) -> None:
        """Print the error, once per outage."""
        if not self._outage_reported:
            self._outage_reported = True
            cause = str(error).split("\n")[0][:200]
            print(
                f"mlflow: {self.uri} does not answer, metrics are kept: {cause}", file=sys.stderr, flush=True
            )

    def _save_undelivered(self) -> None:
        """Save undelivered metrics for the next start."""
        self._take_orders(0.0)
        self._spool_values()
        if self._values:
            where = f"kept in {self._spool.path} for the next start"
            if self._spool.error is not None:
                where = f"lost: {self._spool.error}"
            print(f"mlflow: {len(self._values)} metrics undelivered, {where}", file=sys.stderr, flush=True)


def _read(path: Path) -> dict[str, str]:
    try:
        content: dict[str, str] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content


def mark_failed(folder: Path) -> bool:
    """Mark the run of a `--save` directory as FAILED, if all its processes were killed; False if not done."""
    known = _read(folder / RUN_FILE)
    if not known:
        return False
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    try:
        MlflowClient(known["uri"]).set_terminated(known["run_id"], "FAILED")
    except Exception as error:
        print(f"mlflow: the run could not be marked FAILED: {error}", file=sys.stderr)
        return False
    return True


def git_state(repository: Path, run: Callable[..., Any] = subprocess.run) -> dict[str, str]:
    """Tags of a run: the commit, and whether files differ from it.

    A container has no repository, but a file with the commit that it was built from (Dockerfile). Without either,
    no tags.
    """

    def ask(*words: str) -> str | None:
        try:
            done = run(["git", "-C", str(repository), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    if commit is None:
        built_from = repository / BUILT_FROM
        return {"mlflow.source.git.commit": built_from.read_text().strip()} if built_from.is_file() else {}
    return {
        "mlflow.source.git.commit": commit,
        "git.changed": str(bool(ask("status", "--porcelain", "-uno"))),
    }
