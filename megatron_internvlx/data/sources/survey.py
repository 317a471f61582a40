"""Read data sets once: mend and check every record and image, count what is found, and keep the good ones in order."""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import batched, chain, islice
from pathlib import Path
from typing import Any

from megatron_internvlx.data.rejects import printable
from megatron_internvlx.data.rvtc import tile_count, tile_grid
from megatron_internvlx.data.sample import EncoderSettings
from megatron_internvlx.data.sources.mend import mend_record
from megatron_internvlx.data.sources.pictures import (
    ImageFinder,
    Picture,
    choose_root,
    examine,
    suggest_root,
)
from megatron_internvlx.data.sources.record import LeftOut, Source, SourceImage, SourceRecord
from megatron_internvlx.data.sources.rounds import merge_rounds
from megatron_internvlx.files import atomic_path

_CHUNK = 64  # records in memory at a time, with the bytes of their images
_PEEK = 64  # records whose image names choose the root
_MOST_MISSING = 200  # missing images by which another root is suggested
SHOWN = 5
"""Left-out records of a data set that are shown as examples."""


@dataclass(frozen=True)
class SurveySettings:
    """Settings of a survey; `limit` is the number of usable records of a set after which reading stops."""

    encoder: EncoderSettings
    """Template, tiles and lengths of the training."""
    max_characters: int
    strip_prefix: str | None = None
    copy: bool = False
    limit: int | None = None
    decode: bool = True
    threads: int = 8
    rounds: bool = False
    """Whether consecutive records of the same images become one conversation."""


@dataclass
class SetReport:
    """Findings in one data set. Sizes of images are (width, height) in pixels."""

    source: Source
    root: Path
    records: int = 0
    rounds: int = 0
    tiles: int = 0
    characters: int = 0
    images: set[int] = field(default_factory=set)
    stored: bool = False
    """Whether images were written to the output directory."""
    left_out: Counter[str] = field(default_factory=Counter)
    examples: list[LeftOut] = field(default_factory=list)
    mends: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    hint: str = ""
    stopped: bool = False
    """Whether `limit` ended the reading."""


class _Groups:
    """Disjoint sets of numbers, joined pair by pair; each is named by its smallest number."""

    def __init__(self) -> None:
        self.parent = array("q")

    def add(self) -> int:
        """Number of a new set of one."""
        self.parent.append(len(self.parent))
        return len(self.parent) - 1

    def find(self, number: int) -> int:
        """Name of the set of a number."""
        while self.parent[number] != number:
            self.parent[number] = self.parent[self.parent[number]]
            number = self.parent[number]
        return number

    def join(self, a: int, b: int) -> None:
        """Join the sets of two numbers."""
        low, high = sorted((self.find(a), self.find(b)))
        self.parent[high] = low


class Survey:
    """Good records of all data sets, spooled to a file, with what a split and a page need to know of each.

    Args:
        work: directory that is written; embedded images become files below `images/` in it.
        settings: see `SurveySettings`.
    """

    def __init__(self, work: Path, settings: SurveySettings):
        self.work, self.settings = work, settings
        self.reports: list[SetReport] = []
        self.offsets, self.set_of, self.node_of = array("q"), array("i"), array("q")
        self.characters, self.tiles = array("q"), array("i")
        self.groups = _Groups()
        self.digests: list[bytes] = []
        """Content of each node of `groups`: an image, or the text of a record without images."""
        self.sizes: list[tuple[int, int]] = []
        self.stored: set[bytes] = set()
        self._by_digest: dict[bytes, int] = {}
        self._by_path: dict[str, Picture | LeftOut] = {}
        self._seen: dict[bytes, str] = {}
        self.spool, self.left_out = work / "spool.jsonl", work / "left_out.jsonl"

    def __len__(self) -> int:
        return len(self.offsets)

    def run(self, sources: Iterable[Source], progress: Callable[[str, int], None]) -> None:
        """Read all data sets; `progress` is called with name and records so far, now and then."""
        with self.spool.open("wb") as spool, self.left_out.open("w", encoding="utf-8") as lost:
            for source in sources:
                self._read_set(source, spool, lost, progress)

    def _read_set(self, source: Source, spool: Any, lost: Any, progress: Callable[[str, int], None]) -> None:
        records = merge_rounds(source.records, self._mend) if self.settings.rounds else source.records
        first = list(islice(records, _PEEK))
        names = [image.name for one in first if isinstance(one, SourceRecord) for image in one.images
                 if image.data is None]  # fmt: skip
        root, _ = choose_root(names, source.roots)
        report = SetReport(source, root)
        self.reports.append(report)
        self._seen.clear()  # sets may share records on purpose
        missing: list[str] = []
        finder = ImageFinder(root, self.settings.strip_prefix)
        read = 0
        with ThreadPoolExecutor(self.settings.threads) as threads:
            for chunk in batched(chain(first, records), _CHUNK):
                for record, pictures in self._checked(chunk, finder, threads):
                    read += 1
                    if self.settings.limit is not None and report.records >= self.settings.limit:
                        report.stopped = True
                        break
                    error = (
                        record if isinstance(record, LeftOut) else self._keep(record, pictures, report, spool)
                    )
                    if error is not None:
                        self._leave_out(error, report, lost)
                        if isinstance(record, SourceRecord) and error.cause == "missing_image":
                            missing += [image.name for image in record.images if image.data is None]
                            del missing[_MOST_MISSING:]
                progress(source.name, read)
                if report.stopped:
                    break
        if missing:
            report.hint = suggest_root(missing, [*source.roots[:1], root, root.absolute().parent])

    def _leave_out(self, error: LeftOut, report: SetReport, lost: Any) -> None:
        report.left_out[error.cause] += 1
        if len(report.examples) < SHOWN or report.left_out[error.cause] == 1:
            report.examples.append(error)
        entry = {"set": report.source.name, "key": error.key, "cause": error.cause, "detail": error.detail}
        lost.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def _checked(
        self, chunk: Iterable[SourceRecord | LeftOut], finder: ImageFinder, threads: ThreadPoolExecutor
    ) -> Iterator[tuple[SourceRecord | LeftOut, list[tuple[Path | bytes, Picture | LeftOut]]]]:
        """Mended records of a chunk with their images examined, or why one is left out."""
        mended: list[SourceRecord | LeftOut] = []
        for record in chunk:
            if isinstance(record, SourceRecord):
                error = self._mend(record)
                mended.append(error or record)
            else:
                mended.append(record)
        jobs = [(record, image) for record in mended if isinstance(record, SourceRecord)
                for image in record.images]  # fmt: skip
        results = iter(list(threads.map(lambda job: self._look(job[1], finder, job[0]), jobs)))
        for record in mended:
            if isinstance(record, SourceRecord):
                yield record, [next(results) for _ in record.images]
            else:
                yield record, []

    def _mend(self, record: SourceRecord) -> LeftOut | None:
        try:
            mend_record(record, self.settings.encoder.template, self.settings.max_characters)
        except LeftOut as left_out:
            return left_out
        except Exception as error:  # whatever a record does costs this record alone
            return LeftOut(record.key, "unexpected_error", f"{type(error).__name__}: {error}")
        return None

    def _look(
        self, image: SourceImage, finder: ImageFinder, record: SourceRecord
    ) -> tuple[Path | bytes, Picture | LeftOut]:
        """Place of an image, and its findings or the reason why it cannot be used. Runs in threads."""
        source: Path | bytes = image.data if image.data is not None else b""
        known: Picture | LeftOut | None = None
        try:
            if image.data is None:
                source, mend = finder.find(image.name)
                known = self._by_path.get(str(source))
                if mend and mend not in record.mends:
                    record.mends.append(mend)
            found = known or examine(source, decode=self.settings.decode)
        except LeftOut as left_out:
            found = left_out
        except Exception as error:  # whatever a decoder raises costs this record alone
            found = LeftOut("", "unexpected_error", f"{type(error).__name__}: {error}")
        if isinstance(source, Path):
            self._by_path[str(source)] = found
        return source, found

    def _keep(
        self,
        record: SourceRecord,
        pictures: list[tuple[Path | bytes, Picture | LeftOut]],
        report: SetReport,
        spool: Any,
    ) -> LeftOut | None:
        """Write a good record to the spool; returns why it is left out, if it is."""
        for image, (source, found) in zip(record.images, pictures, strict=True):
            if isinstance(source, Path) and printable(str(source)) != str(source):
                remedy = "the name of its image's file is not UTF-8: rename the file"
                return LeftOut(record.key, "bad_encoding", remedy)
            if isinstance(found, LeftOut):
                name = "" if image.data is not None or image.name in found.detail else f"{image.name}: "
                return LeftOut(record.key, found.cause, f"{name}{found.detail}")
        good = [found for _, found in pictures if isinstance(found, Picture)]
        text = json.dumps(record.turns, ensure_ascii=False)
        content = hashlib.sha256(b"".join(picture.digest for picture in good) + text.encode()).digest()[:16]
        if content in self._seen:
            return LeftOut(record.key, "duplicate", f"the same as {self._seen[content]}: remove one")
        self._seen[content] = record.key
        places = [self._place(source, picture, report)
                  for (source, _), picture in zip(pictures, good, strict=True)]  # fmt: skip
        nodes = [self._node(picture.digest, (picture.width, picture.height)) for picture in good]
        nodes = nodes or [self._node(content, (0, 0))]
        for other in nodes[1:]:
            self.groups.join(nodes[0], other)
        tiles = self._count_tiles(good, report.source.entry.max_dynamic_patch)
        self.offsets.append(spool.tell())
        self.set_of.append(len(self.reports) - 1)
        self.node_of.append(nodes[0])
        self.characters.append(sum(len(turn["value"]) for turn in record.turns))
        self.tiles.append(tiles)
        line = {"key": printable(record.key), "images": places, "turns": record.turns, "extra": record.extra,
                "mends": record.mends}  # fmt: skip
        spool.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        report.records += 1
        report.rounds += sum(turn["from"] == "gpt" for turn in record.turns)
        report.tiles += tiles
        report.characters += self.characters[-1]
        report.images.update(nodes if good else ())
        report.mends.update(record.mends)
        report.remarks.update({picture.remark for picture in good if picture.remark})
        return None

    def _node(self, digest: bytes, size: tuple[int, int]) -> int:
        if digest not in self._by_digest:
            self._by_digest[digest] = self.groups.add()
            self.digests.append(digest)
            self.sizes.append(size)
        return self._by_digest[digest]

    def _place(self, source: Path | bytes, picture: Picture, report: SetReport) -> str:
        """Path of an image: absolute where it lies, or below `work` if it is embedded or copied."""
        if isinstance(source, Path) and not self.settings.copy:
            return str(source.absolute())
        report.stored = True
        name = picture.digest.hex()
        relative = f"images/{name[:2]}/{name}{picture.suffix}"
        if picture.digest not in self.stored:
            self.stored.add(picture.digest)
            if not (self.work / relative).exists():
                with atomic_path(self.work / relative) as partial:
                    if isinstance(source, Path):
                        shutil.copyfile(source, partial)
                    else:
                        partial.write_bytes(source)
        return relative

    def _count_tiles(self, pictures: list[Picture], own: int | None) -> int:
        """Tiles of the pictures of a record; `own` is the most tiles that its set allows, None for the run's."""
        settings = self.settings.encoder
        if not settings.dynamic_image_size:
            return len(pictures)
        most = max(1, (own or settings.max_tiles) // max(1, len(pictures)))
        grids = (
            tile_grid(
                picture.width,
                picture.height,
                tile_size=settings.tile_size,
                min_tiles=min(settings.min_tiles, most),
                max_tiles=most,
                policy=settings.rvtc,
            )
            for picture in pictures
        )
        return sum(tile_count(*grid, thumbnail=settings.use_thumbnail) for grid in grids)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Good records in order: key, images, turns, extra, mends."""
        with self.spool.open("rb") as file:
            for line in file:
                yield json.loads(line)

    def line(self, number: int) -> dict[str, Any]:
        """One good record by its number."""
        with self.spool.open("rb") as file:
            file.seek(self.offsets[number])
            return json.loads(file.readline())

    def held_out(self, validation: float | None, seed: int) -> set[int]:
        """Groups of records that are kept for validation: whole groups, so no image is on both sides.

        Args:
            validation: number of records (1 or more) or their share (below 1); None: 5 %, at most 1,000.
            seed: changes which groups are taken; with the same seed and data they are the same.

        Raises:
            ValueError: fewer records than are to be held out.
        """
        total = len(self)
        wanted = min(1000, total * 0.05) if validation is None else validation
        target = round(total * wanted) if 0 < wanted < 1 and validation is not None else round(wanted)
        if validation is not None and target >= total:
            raise ValueError(
                f"--validation {validation:g}: only {total:,} records are usable; hold out fewer"
            )
        if validation == 0 or total < 2:
            return set()
        sizes = Counter(self.groups.find(node) for node in self.node_of)
        target = max(1, target)
        order = sorted(sizes, key=lambda g: hashlib.sha256(b"%d/" % seed + self.digests[g]).digest())
        chosen, count = set(), 0
        for group in order:
            if count + sizes[group] <= target:
                chosen.add(group)
                count += sizes[group]
        if not chosen and len(order) > 1:
            chosen = {min(order, key=lambda group: sizes[group])}
        return chosen if len(chosen) < len(order) else set()
