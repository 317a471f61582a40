"""Convert OpenAI chat records (`messages`) to InternVL's (`conversations`), one JSON object per line.

    python tools/convert_messages.py IN.jsonl OUT.jsonl [--images FOLDER]

Images embedded in a record (data: URLs) are written to FOLDER, the `root` of the data set in meta.json; paths are
kept. Unusable records are printed with file and line, and skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_internvlx.data.manifest import JsonlFile
from megatron_internvlx.data.messages import conversation_of
from megatron_internvlx.data.rejects import BadSample, blamed_on
from megatron_internvlx.files import atomic_path

SHOWN = 20  # maximum number of printed errors


def convert(source: Path, out: Path, images: Path) -> tuple[int, list[BadSample]]:
    """Convert a file; returns the number of written records, and the errors of skipped ones.

    Raises ValueError if no record can be converted; `out` is then not written.
    """
    if not source.is_file():
        raise ValueError(f"no such file: {source}")
    file, written, bad = JsonlFile(source, source.name), 0, []
    with atomic_path(out) as partial, partial.open("w", encoding="utf-8") as lines:
        for index in range(len(file)):
            key = file.key(index)
            try:
                with blamed_on(key):
                    line = json.dumps(conversation_of(file[index], key, images), ensure_ascii=False)
                    lines.write(line + "\n")
            except BadSample as reject:
                bad.append(reject)
                continue
            written += 1
        if not written:
            why = f"; first error: {bad[0]}" if bad else ""
            raise ValueError(f"{source}: none of {len(file)} records can be converted{why}")
    return written, bad


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="JSONL file with OpenAI's messages")
    parser.add_argument("out", type=Path, help="JSONL file to write, an annotation for meta.json")
    parser.add_argument("--images", type=Path, help="folder for images in data: URLs (default: OUT's folder)")
    options = parser.parse_args(argv)
    try:
        written, bad = convert(options.source, options.out, options.images or options.out.parent)
    except (ValueError, OSError) as error:
        print(f"convert_messages: {error}", file=sys.stderr)
        return 2
    for reject in bad[:SHOWN]:
        print(reject, file=sys.stderr)
    if len(bad) > SHOWN:
        print(f"... and {len(bad) - SHOWN} more", file=sys.stderr)
    print(f"{written} records written to {options.out}, {len(bad)} skipped")
    return 0
