"""Write examples/quickstart.ipynb from docs/quickstart.md, so that the guide and the notebook are one text.

    python tools/notebook.py

A block marked `sh` becomes a cell that runs; one marked `bash`, which needs a GPU or a cluster, stays text. Blocks
without a mark are what a command printed, and are left out: the notebook prints it anew.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GUIDE, NOTEBOOK = ROOT / "docs" / "quickstart.md", ROOT / "examples" / "quickstart.ipynb"
SETUP = """\
# The commands of the environment, in the repository's folder.
import os
from pathlib import Path

os.chdir("..")
os.environ["PATH"] = os.pathsep.join((str(Path(".venv/bin").absolute()), os.environ["PATH"]))"""
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!\w+://)([^)]+)\)")


def cells(guide: str) -> list[tuple[str, str]]:
    """Pairs of kind (markdown, code) and text, in the order of the guide."""
    found, position = [], 0
    for block in _BLOCK.finditer(guide):
        language, text = block[1], block[2]
        if language and language != "sh":
            continue
        found.append(("markdown", guide[position : block.start()]))
        if language == "sh":
            found.append(("code", f"%%bash\n{text}"))
        position = block.end()
    found.append(("markdown", guide[position:]))
    # Links of the guide are relative to docs/.
    texts = [
        (kind, _LINK.sub(r"](../docs/\1)", text) if kind == "markdown" else text) for kind, text in found
    ]
    stripped = [(kind, text.strip()) for kind, text in texts if text.strip()]
    return [*stripped[:1], ("code", SETUP), *stripped[1:]]


def notebook(guide: str) -> dict[str, Any]:
    """Notebook of format 4.5, without outputs."""
    made: list[dict[str, Any]] = []
    for number, (kind, text) in enumerate(cells(guide)):
        cell = {
            "cell_type": kind,
            "id": f"cell-{number:02}",
            "metadata": {},
            "source": text.splitlines(keepends=True),
        }
        made.append(cell | {"execution_count": None, "outputs": []} if kind == "code" else cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def rendered() -> str:
    """Text of the notebook's file."""
    return json.dumps(notebook(GUIDE.read_text(encoding="utf-8")), indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Write the notebook."""
    NOTEBOOK.write_text(rendered(), encoding="utf-8")
    print(NOTEBOOK.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
