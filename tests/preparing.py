"""Data sets in the formats that people have, written for tests of `ivlx prepare`, and the command itself."""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from megatron_internvlx.commands import prepare


def photo(seed: int = 0, width: int = 60, height: int = 40, kind: str = "JPEG", **options: Any) -> bytes:
    """Bytes of an image file with smooth random colours."""
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(buffer, kind, **options)
    return buffer.getvalue()


@dataclass
class Item:
    """One record of a set: name and bytes of its image (None: no file is written), question and answer."""

    name: str
    data: bytes | None
    question: str
    answer: str


def items(count: int = 4) -> list[Item]:
    return [Item(f"p{n}.jpg", photo(n), f"What is in picture {n}?", f"Thing {n}.") for n in range(count)]


def write_images(folder: Path, records: list[Item]) -> None:
    for item in records:
        if item.data is not None and not (folder / item.name).exists():
            (folder / item.name).write_bytes(item.data)


def _turns(item: Item, human: str = "human", gpt: str = "gpt") -> list[dict[str, str]]:
    return [{"from": human, "value": f"<image>\n{item.question}"}, {"from": gpt, "value": item.answer}]


def write_csv(folder: Path, records: list[Item]) -> Path:
    import csv

    write_images(folder, records)
    with (folder / "questions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [("image", "question", "answer"), *((one.name, one.question, one.answer) for one in records)]
        )
    return folder


def write_captions(folder: Path, records: list[Item]) -> Path:
    write_images(folder, records)
    for item in records:
        (folder / item.name).with_suffix(".txt").write_text(item.answer, encoding="utf-8")
    return folder


def write_llava(folder: Path, records: list[Item]) -> Path:
    write_images(folder, records)
    rows = [{"id": str(n), "image": one.name, "conversations": _turns(one)} for n, one in enumerate(records)]
    (folder / "llava.json").write_text(json.dumps(rows))
    return folder / "llava.json"


def write_sharegpt(folder: Path, records: list[Item]) -> Path:
    write_images(folder, records)
    rows = [{"images": [one.name], "conversations": _turns(one, "user", "assistant")} for one in records]
    (folder / "sharegpt.json").write_text(json.dumps(rows, indent=2))
    return folder / "sharegpt.json"


def write_messages(folder: Path, records: list[Item]) -> Path:
    write_images(folder, records)
    lines = []
    for one in records:
        asked = [
            {"type": "image_url", "image_url": {"url": one.name}},
            {"type": "text", "text": one.question},
        ]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": one.answer}]
        lines.append(json.dumps({"messages": turns}))
    (folder / "messages.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "messages.jsonl"


def write_internvl(folder: Path, records: list[Item]) -> Path:
    write_images(folder, records)
    lines = [json.dumps({"image": one.name, "conversations": _turns(one)}) for one in records]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


def write_parquet(folder: Path, records: list[Item]) -> Path:
    rows = [
        {
            "image": None if one.data is None else {"bytes": one.data, "path": one.name},
            "question": one.question,
            "answer": one.answer,
        }
        for one in records
    ]
    path = folder / "train-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_shards(folder: Path, records: list[Item]) -> Path:
    path = folder / "shard-000000.tar"
    with tarfile.open(path, "w") as tar:
        for number, one in enumerate(records):
            if one.data is not None:
                add_member(tar, f"{number:06d}{Path(one.name).suffix}", one.data)
            row = {"question": one.question, "answer": one.answer}
            add_member(tar, f"{number:06d}.json", json.dumps(row).encode())
    return path


FORMATS = {
    "csv": write_csv,
    "captions": write_captions,
    "llava": write_llava,
    "sharegpt": write_sharegpt,
    "messages": write_messages,
    "internvl": write_internvl,
    "parquet": write_parquet,
    "webdataset": write_shards,
}
EMBEDDED = ("parquet", "webdataset")
# Key of the record with index 1 in each format.
SECOND = {
    "csv": "questions.csv:3",
    "captions": "p1.jpg",
    "llava": "llava.json[1]",
    "sharegpt": "sharegpt.json[1]",
    "messages": "messages.jsonl:2",
    "internvl": "train.jsonl:2",
    "parquet": "train-00000-of-00001.parquet[1]",
    "webdataset": "shard-000000.tar:000001",
}


class Command:
    """Runs `ivlx prepare` in this process, and keeps what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self.capsys = capsys

    def __call__(self, *words: object, code: int = 0) -> str:
        found = prepare.main([str(word) for word in words])
        printed = self.capsys.readouterr()
        text = printed.out + printed.err
        assert found == code, text
        return text


def records_of(meta: Path) -> list[dict[str, Any]]:
    """All records below a `meta.json`, read as training does."""
    from megatron_internvlx.data.manifest import Manifest
    from megatron_internvlx.data.sample import parse_record

    manifest = Manifest(meta)
    found = []
    for number in range(len(manifest)):
        record = manifest.record(number)
        paths, turns = parse_record(record)
        found.append({"paths": paths, "turns": turns, "data": record.data})
    return found
