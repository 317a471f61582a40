#!/usr/bin/env python
"""Pictures in docs/assets, taken in headless Chromium. Nothing but this machine is reached.

    python tools/screenshots.py --chromium /usr/bin/chromium    # MLflow and TensorBoard, for docs/tracking.md
    python tools/screenshots.py gallery --demo runs/demo        # what the commands draw, for docs/gallery.md

The first trains the demo twice and opens both; the runs stay in --work and are not trained again if they are there.
The second draws from what `make demo` wrote, and trains nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

if __name__ == "__main__":  # works without an installed package too
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_internvlx.evaluation.served_answers import free_port
from tools.gallery import add_options, draw_gallery

REPOSITORY = Path(__file__).resolve().parents[1]
RUNS = {"lr_1.5e-3": "1.5e-3", "lr_3e-4": "3e-4"}
"""Name of each run, and its learning rate."""
MOST_BYTES = 200_000
"""Size of a picture in the repository at most."""
EXPERIMENT = "demo"
ASSISTANT = 0.262  # share of the width at the right of every page of MLflow
PAGE_MS = 120_000  # time of the page, not of the machine: until all charts are drawn
PATIENCE = 900  # seconds for a server or a page, on a busy machine


def train(work: Path, steps: int) -> None:
    """Train the demo once per learning rate, all in one MLflow store and one TensorBoard directory."""
    data = work / "data"
    if not data.exists():
        _run([sys.executable, "tools/make_demo_data.py", "--out", str(data)])
    for name, rate in RUNS.items():
        if (work / name / "report.png").exists():
            continue
        _run(
            [
                *(sys.executable, "-m", "megatron_internvlx.launch", "--standalone", "--nproc-per-node", "2"),
                *(
                    "pretrain_vlm.py",
                    "--recipe",
                    "examples/demo/demo.yaml",
                    "--lr",
                    rate,
                    "--min-lr",
                    "1.5e-5",
                ),
                *("--data", str(data / "meta.json"), "--valid-data", str(data / "meta_val.json")),
                *("--tokenizer-model", str(data / "tokenizer"), "--save", str(work / name)),
                *("--train-iters", str(steps), "--eval-interval", "40", "--save-interval", "80"),
                *("--mlflow-experiment", EXPERIMENT, "--tensorboard-dir", str(work / "tensorboard" / name)),
            ],
            MLFLOW_TRACKING_URI=_store(work),
            OMP_NUM_THREADS="1",
        )


def _store(work: Path) -> str:
    return f"sqlite:///{work.absolute()}/mlflow.db"


def _run(command: list[str], **environment: str) -> None:
    subprocess.run(command, cwd=REPOSITORY, env=os.environ | environment, check=True)


@contextlib.contextmanager
def served(command: list[str], port: int) -> Iterator[str]:
    """Start a server; gives its address once it answers, and ends it. Raises TimeoutError after PATIENCE seconds."""
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    process = subprocess.Popen(
        command, env=os.environ | quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    end = time.monotonic() + PATIENCE
    try:
        while True:
            try:
                urllib.request.urlopen(address, timeout=10).close()
                break
            except (urllib.error.URLError, OSError) as error:
                if time.monotonic() > end or process.poll() is not None:
                    raise TimeoutError(f"{' '.join(command)} does not answer: {error}") from error
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@dataclass(frozen=True)
class Page:
    """Part of a page, and its size in the picture."""

    path: str
    """Path, query and fragment."""
    window: tuple[int, int]
    """Width and height of the browser's window, in pixels."""
    cut: float = 0.0
    """Share of the width at the right that is left out."""
    scale: float = 1.0


def take(chromium: str, address: str, picture: Path, window: tuple[int, int]) -> None:
    """Write what a browser shows of an address, in a window of this width and height in pixels."""
    width, height = window
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            # TensorBoard draws its lines in SVG then, which are in the picture for certain.
            *(
                "--disable-3d-apis",
                "--hide-scrollbars",
                f"--window-size={width},{height}",
                f"--user-data-dir={folder}/profile",
            ),
            *(f"--virtual-time-budget={PAGE_MS}", f"--screenshot={picture}", address),
        ]
        subprocess.run(command, check=True, timeout=PATIENCE, capture_output=True)


def photograph(chromium: str, address: str, page: Page, picture: Path) -> None:
    """Write what a browser shows, in few colours.

    Raises ValueError if the page is empty or the picture too large for the repository.
    """
    width, height = page.window
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "page.png"
        take(chromium, address + page.path, raw, page.window)
        shown = Image.open(raw).convert("RGB").crop((0, 0, round(width * (1 - page.cut)), height))
    colours = shown.getcolors(1 << 24) or []
    if max(count for count, _ in colours) > 0.995 * shown.width * shown.height:
        raise ValueError(f"{address}{page.path} shows an empty page")
    small = shown.resize((round(shown.width * page.scale), round(shown.height * page.scale)))
    picture.parent.mkdir(parents=True, exist_ok=True)
    small.quantize(64, dither=Image.Dither.NONE).save(picture, optimize=True)
    if picture.stat().st_size > MOST_BYTES:
        raise ValueError(f"{picture} has {picture.stat().st_size:,} bytes, at most {MOST_BYTES:,} are wanted")
    print(f"{picture}: {picture.stat().st_size // 1000} kB", flush=True)


def tensorboard_pages() -> dict[str, Page]:
    """Pages of TensorBoard by the file name of the picture."""
    shown = urllib.parse.quote("^(loss|loss validation|accuracy validation|internvlx/tokens_per_s)$")
    page = f"/?darkMode=false&tagFilter={shown}#timeseries"
    return {"tensorboard.png": Page(page, (1400, 1050), scale=0.7)}


def mlflow_pages(work: Path) -> dict[str, Page]:
    """Pages of MLflow by the file name of the picture, without the assistant at the right."""
    with contextlib.closing(sqlite3.connect(work / "mlflow.db")) as store:
        found = store.execute("SELECT name, run_uuid, experiment_id FROM runs ORDER BY start_time").fetchall()
    runs = {name: run for name, run, _ in found}
    experiment = found[0][2]

    def quoted(value: Any) -> str:
        return urllib.parse.quote(json.dumps(value))

    both = f"runs={quoted(list(runs.values()))}&experiments={quoted([str(experiment)])}"
    keys = f"metric={quoted('loss')}&plot_metric_keys={quoted(['loss', 'validation_loss'])}"
    place = f"/#/experiments/{experiment}/runs"
    return {
        "mlflow_compare.png": Page(f"/#/metric?{both}&{keys}", (1700, 1000), ASSISTANT, 0.7),
        "mlflow_run.png": Page(f"{place}/{next(iter(runs.values()))}", (1700, 1500), ASSISTANT, 0.7),
        "mlflow_runs.png": Page(f"{place}?compareRunsMode=CHART", (2000, 2000), ASSISTANT, 0.6),
    }


def main() -> int:
    """Take the pictures of the guide to tracking, or those of the gallery; returns the exit code."""
    gallery = sys.argv[1:2] == ["gallery"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "assets", help="for the pictures")
    parser.add_argument("--chromium", default=shutil.which("chromium") or "chromium", help="the browser")
    if gallery:
        add_options(parser)
        options = parser.parse_args(sys.argv[2:])
        try:
            draw_gallery(options, partial(take, options.chromium), served, free_port)
        except ValueError as error:
            print(f"screenshots.py: {error}", file=sys.stderr)
            return 2
        return 0
    parser.add_argument(
        "--work", type=Path, default=REPOSITORY / "runs" / "tracking", help="for the two runs"
    )
    parser.add_argument("--steps", type=int, default=160, help="of each run; default 160")
    photograph_tracking(parser.parse_args())
    return 0


def photograph_tracking(options: argparse.Namespace) -> None:
    """Train, and photograph TensorBoard and MLflow."""
    options.work.mkdir(parents=True, exist_ok=True)
    train(options.work, options.steps)
    port = free_port()
    server = [sys.executable, "-m", "tensorboard.main", "--logdir", str(options.work / "tensorboard")]
    with served([*server, "--port", str(port)], port) as address:
        for name, page in tensorboard_pages().items():
            photograph(options.chromium, address, page, options.out / name)
    port = free_port()
    server = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", _store(options.work)]
    with served([*server, "--workers", "1", "--port", str(port)], port) as address:
        for name, page in mlflow_pages(options.work).items():
            photograph(options.chromium, address, page, options.out / name)


if __name__ == "__main__":
    sys.exit(main())
