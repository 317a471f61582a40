"""Pictures of docs/gallery.md in docs/assets: what the commands draw, from the demo's run, without any training.

`python tools/screenshots.py gallery` calls it, after `make demo`. Nothing but this machine is reached.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
MOST_BYTES = 150_000
"""Size of a picture of the gallery at most."""
WIDTH = 900
"""Width of a picture at most, in pixels."""
PHOTO = "skimage/data/chelsea.png"
"""Photograph that `ivlx tiles` cuts: each of the three policies cuts it in another way."""
PIPELINE = "examples/recipes/internvlx_78b_sft_256gpu_h100_fp8.yaml"
FINE_TUNING = "examples/recipes/small/finetune_demo_cpu.yaml"
SYSTEM = "Answer with one word."
QUESTIONS = ("Which word?", "How many dots?", "Which digit?")
LEAST_TILES = 6
"""Tiles of the picture that is asked about, without its thumbnail."""
PATIENCE_MS = 600_000  # for an answer, on a busy machine

Photograph = Callable[[str, Path, tuple[int, int]], None]
"""Writes what a browser shows of an address, in a window of this width and height, to a file."""
Serve = Callable[[list[str], int], Any]
"""Starts a command that listens on a port; a context manager that gives its address."""


def shrink(drawn: Path, picture: Path) -> None:
    """Write a drawing at most `WIDTH` pixels wide, in as many colours as `MOST_BYTES` allow.

    Raises ValueError if it is too large in the fewest colours too.
    """
    with Image.open(drawn) as image:
        shown = image.convert("RGB")
    if shown.width > WIDTH:
        shown = shown.resize((WIDTH, round(shown.height * WIDTH / shown.width)), Image.Resampling.LANCZOS)
    picture.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=picture.parent) as folder:
        small = Path(folder) / picture.name
        for colours in (256, 192, 128, 64, 32):
            # The default, median cut, loses the colours of thin lines: a blue curve became grey.
            shown.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=3).save(small, optimize=True)
            if small.stat().st_size <= MOST_BYTES:
                small.replace(picture)
                print(f"{picture}: {picture.stat().st_size // 1000} kB, {colours} colours", flush=True)
                return
        raise ValueError(f"{picture} has {small.stat().st_size:,} bytes, at most {MOST_BYTES:,} are wanted")


def run(*command: str | Path) -> None:
    """Run a program of this repository; raises CalledProcessError if it fails."""
    program = [sys.executable, *map(str, command)]
    subprocess.run(program, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)


def ivlx(*words: str | Path) -> None:
    """Run a command of `ivlx`."""
    run("-m", "megatron_internvlx.commands.ivlx", *words)


def draw_plots(demo: Path, work: Path, out: Path) -> None:
    """Draw what commands write as PNG: the demo's report, tiles, statistics, the timeline of a pipeline."""
    from tools.sample_photos import find_photo

    shrink(demo / "report.png", out / "demo_report.png")
    ivlx("tiles", find_photo(PHOTO), "--out", work / "tiles.png")
    shrink(work / "tiles.png", out / "tiles.png")
    run("tools/prepare_data.py", demo / "data/meta.json", work / "energon")
    run(
        *("tools/prepare_data.py", "stats", work / "energon", "--tokenizer-model", demo / "data/tokenizer"),
        *("--png", work / "stats.png", "--image-size", "112", "--low-ratio", "0.125", "--max-tiles", "6"),
        *("--seq-length", "512", "--shallow-seq-length", "256", "--model-preset", "internvlx_demo"),
    )
    shrink(work / "stats.png", out / "data_stats.png")
    ivlx("plan", "--recipe", PIPELINE, "--timeline", work / "plan.png")
    shrink(work / "plan.png", out / "plan_timeline.png")


def draw_pages(demo: Path, work: Path, out: Path, photograph: Photograph) -> None:
    """Photograph the pages that `ivlx prepare` and `ivlx evaluate` write."""
    if not (work / "data").exists():
        if not (work / "photos").exists():
            run("tools/sample_photos.py", work / "photos")
        ivlx(
            *("prepare", work / "photos", "--out", work / "data", "--recipe", FINE_TUNING),
            *("--tokenizer-model", demo / "data/tokenizer"),
        )
    pages = {
        "prepare.png": (work / "data/page.html", (1000, 1300)),
        "evaluate.png": (demo / "evaluation/page.html", (1000, 1130)),
    }
    for name, (page, window) in pages.items():
        photograph(page.absolute().as_uri(), work / name, window)
        shrink(work / name, out / name)


def find_question(demo: Path) -> Path:
    """Path of the first held-out picture of many tiles. Raises ValueError if there is none."""
    for line in (demo / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        if len(answer["images"]) == 1 and answer["cols"] * answer["rows"] >= LEAST_TILES:
            return demo / "data/images/val" / Path(answer["image"]).name
    raise ValueError(f"{demo}/predictions.jsonl has no picture of {LEAST_TILES} tiles; run `make demo`")


def draw_chat(demo: Path, work: Path, out: Path, chromium: str, port: int, serve: Serve) -> None:
    """Ask the demo's model about a held-out picture on the page of `ivlx chat --web`, and photograph it."""
    from playwright.sync_api import expect, sync_playwright

    command = [
        *(sys.executable, "-m", "megatron_internvlx.commands.ivlx", "chat", str(demo / "hf"), "--web"),
        *("--system", SYSTEM, "--port", str(port)),
    ]
    with serve(command, port) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 860})
        page.set_default_timeout(PATIENCE_MS)
        page.goto(address)
        expect(page.locator("#facts")).to_contain_text("parameters", timeout=PATIENCE_MS)
        page.set_input_files("#files", find_question(demo))
        expect(page.locator("#waiting figure")).to_have_count(1, timeout=PATIENCE_MS)
        for number, question in enumerate(QUESTIONS, 1):
            page.fill("#question", question)
            page.press("#question", "Enter")
            expect(page.locator(".figures")).to_have_count(number, timeout=PATIENCE_MS)
        page.screenshot(path=work / "chat.png")
        browser.close()
    shrink(work / "chat.png", out / "chat.png")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the gallery to a parser."""
    parser.add_argument(
        "--demo", type=Path, default=REPOSITORY / "runs" / "demo", help="what `make demo` wrote"
    )
    parser.add_argument(
        "--work", type=Path, default=REPOSITORY / "runs" / "gallery", help="for photographs and drawings"
    )


def check_demo(demo: Path) -> None:
    """Raise ValueError if the demo's run is not complete."""
    wanted = ("report.png", "predictions.jsonl", "evaluation/page.html", "hf", "data/meta.json")
    missing = [name for name in wanted if not (demo / name).exists()]
    if missing:
        raise ValueError(f"{demo} lacks {', '.join(missing)}: run `make demo` first, or give another --demo")


def draw_gallery(
    options: argparse.Namespace, photograph: Photograph, serve: Serve, port: Callable[[], int]
) -> None:
    """Draw all pictures into `options.out`. Raises ValueError if the demo has not run."""
    demo, work = options.demo.absolute(), options.work.absolute()
    check_demo(demo)
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    draw_plots(demo, work, options.out)
    draw_pages(demo, work, options.out, photograph)
    draw_chat(demo, work, options.out, options.chromium, port(), serve)
