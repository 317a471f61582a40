"""What tracking costs: step time with metrics to an MLflow server that answers, is dead, and is back.

    python -m benchmarks.tracking            # writes benchmarks/results/tracking-DATE.md

A real server on the loopback interface of the same two cores, killed and started again while a small model
trains. Blocks of ten steps with twelve metrics in their middle (a run's --log-interval is 10) alternate with blocks
without, and which comes first alternates too; the ratio is the median over neighbouring blocks, with the interval
that holds 95 % of the medians of samples drawn from them. At the end the server is asked for every metric.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

from benchmarks.common import ROOT, table, write
from benchmarks.step_time import QUICK, argv
from megatron_internvlx.evaluation.served_answers import free_port

TOKENIZER = ROOT / "tests" / "golden" / "data" / "tokenizers" / "qwen2_fast"
BLOCK, ROUNDS, KEYS = 10, 48, 12


class Server:
    """`mlflow server` with an SQLite store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Returns when it answers."""
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"),
            *("--artifacts-destination", str(self.folder / "artifacts")),
        ]
        log = (self.folder / "server.log").open("a")
        self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + 300  # its imports alone are 20 s of work
        while self.process.poll() is None and time.monotonic() < end:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).read()
                return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"the server did not start:\n{(self.folder / 'server.log').read_text()[-2000:]}")

    def kill(self) -> None:
        """At once, with its workers."""
        if self.process is not None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = None


def main() -> int:
    """Train, kill, restart, count; returns 1 if a metric is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="pairs of blocks in each state")
    rounds = parser.parse_args().rounds
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    import torch

    torch.set_num_threads(1)
    from benchmarks.trainer import Trainer
    from megatron_internvlx.reporting.mlflow_sink import MlflowSink, RunInfo

    trainer = Trainer(argv(QUICK, "pvtc", 2, TOKENIZER), [[(2, 96), (1, 64)]])
    for _ in range(5):
        trainer.step()
    rows: list[list[str]] = [["server", "ms per step, no metrics", "with", "ratio (95 %)"]]
    logged = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(folder)
        server.start()
        sink = MlflowSink(RunInfo("benchmark", "tracking"), folder / "run", server.uri)
        while sink.run_id is None:
            time.sleep(0.1)

        def block(log: bool) -> float:
            nonlocal logged
            start = time.perf_counter()
            for number in range(BLOCK):
                trainer.step()
                if log and number == BLOCK // 2:  # its sending is to fall into the same block
                    logged += 1
                    sink.metrics(logged, {f"metric{key}": logged / (key + 1) for key in range(KEYS)})
            return (time.perf_counter() - start) / BLOCK * 1e3

        def pair(first: bool) -> tuple[float, float]:
            """(without, with) metrics; `first`: those with metrics come first."""
            one, two = block(first), block(not first)
            return (two, one) if first else (one, two)

        everything = []
        for state in ("answers", "is dead", "is back"):
            if state == "is dead":
                server.kill()
            elif state == "is back":
                server.start()
            pairs = [pair(first=bool(number % 2)) for number in range(rounds)]
            without, with_ = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratios = np.array([b / a for a, b in pairs])
            everything.append(ratios)
            rows.append([state, f"{without:.1f}", f"{with_:.1f}", middle(ratios)])
        rows.append(["all three", "", "", middle(np.concatenate(everything))])
        sink.close("FINISHED", seconds=120)
        found = count(server.uri, sink.run_id)
        server.kill()
    text = f"{logged} intervals with {KEYS} metrics each; {found} of {logged * KEYS} are in the server at the end."
    write("tracking", "Tracking", "python -m benchmarks.tracking", [*table(rows), "", text])
    return int(found != logged * KEYS)


def middle(ratios: np.ndarray) -> str:
    """Median, and the interval that holds 95 % of the medians of as many ratios drawn from these."""
    drawn = np.random.default_rng(0).choice(ratios, (4000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return f"{np.median(ratios):.3f} ({low:.3f}-{high:.3f})"


def count(uri: str, run_id: str) -> int:
    """Different steps of all metrics that the server holds."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    return sum(
        len({m.step for m in client.get_metric_history(run_id, f"metric{key}")}) for key in range(KEYS)
    )


if __name__ == "__main__":
    sys.exit(main())
