"""The notebook of the quickstart runs from beginning to end, with fewer steps of training."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tools import notebook

ROOT = Path(__file__).parents[2]
# In place of `make demo`, which takes minutes: its data, smaller, and one step.
DEMO = """\
python tools/make_demo_data.py --out runs/demo/data --train 48 --val 8
ivlx train --recipe examples/demo/demo.yaml --pipeline-model-parallel-size 1 --train-iters 1 --eval-interval 1 \\
    --global-batch-size 8 --data runs/demo/data/meta.json --tokenizer-model runs/demo/data/tokenizer \\
    --save runs/demo/checkpoints"""


def shortened(text: str) -> str:
    """A cell with the demo's training replaced, and two steps of fine-tuning on one rank."""
    text = re.sub(r"^make demo$", lambda _: DEMO, text, flags=re.MULTILINE)
    text = text.replace("photos\nhead", "photos --count 20\nhead").replace("--ranks 2", "--train-iters 2")
    return text.replace("ivlx chat", "ivlx chat --max-new-tokens 4").replace(
        "ivlx evaluate", "ivlx evaluate --max-new-tokens 4"
    )


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    for name in (".venv", "examples", "tools", "megatron_internvlx", "pretrain_vlm.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pages = nbformat.reads(json.dumps(notebook.notebook(notebook.GUIDE.read_text(encoding="utf-8"))), 4)
    code = [cell for cell in pages.cells if cell.cell_type == "code"]
    before = [cell.source for cell in code]
    for cell in code[1:]:
        cell.source = shortened(cell.source)
    # Every replacement found its words: the guide's commands are those that run here.
    assert sum(one != cell.source for one, cell in zip(before, code, strict=True)) == 5
    code[0].source = code[0].source.replace('os.chdir("..")', f"os.chdir({str(tmp_path)!r})")
    NotebookClient(pages, timeout=600, kernel_name="python3").execute()
    told = "\n".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "38 records for training, 2 for validation" in told
    assert "finished: step 2" in told
    for name in ("data/page.html", "runs/mine/report.png", "mine-hf/config.json", "evaluation/page.html"):
        assert (tmp_path / name).is_file(), name
    # The answer of the chat is the last cell's but one.
    assert code[-2].outputs
