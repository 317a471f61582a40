"""Bad samples: what is wrong with one record, and the log that counts them and stops the run in time."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CAUSES = (
    "missing_image",
    "unreadable_image",
    "truncated_image",
    "bomb",
    "malformed_json",
    "missing_key",
    "bad_message",
    "video",
    "placeholder_mismatch",
    "reserved_token",
    "empty_answer",
    "no_supervision",
    "answer_truncated",
    "image_truncated",
    "too_many_images",
    "too_long",
    "unexpected_error",
)
"""Every cause a `BadSample` may have; a fixed order lets ranks add up their counts."""

# A rate says nothing before this many samples.
RATE_AFTER = 200


class BadSample(Exception):
    """One record that cannot be trained on.

    ``key`` names the record (``file.jsonl:12``), ``cause`` is a short slug that can be counted
    (``missing_image``, ``truncated_image``, ``malformed_json``, ``placeholder_mismatch``, ...), ``detail``
    says what was found and what to do. It pickles, so that data workers can hand it over.
    """

    def __init__(self, key: str, cause: str, detail: str):
        key, detail = printable(key), printable(detail)
        super().__init__(key, cause, detail)
        self.key, self.cause, self.detail = key, cause, detail

    def __str__(self) -> str:
        return f"{self.key}: {self.cause}: {self.detail}"

    def with_key(self, key: str) -> "BadSample":
        """The same finding under the name of the record it belongs to."""
        return BadSample(key, self.cause, self.detail)


def printable(text: str) -> str:
    """`text` with what no file or terminal takes (half of a surrogate pair) written as an escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def blamed_on(key: str) -> Iterator[None]:
    """Whatever the work on the record `key` raises becomes a `BadSample` of that name.

    Tokenizers, codecs and storage clients raise nearly every class there is on odd input; a list of kinds
    would always lack one, and an error that passes ends the run at the same record after every restart. A
    mistake of ours or of the machine is not hidden: all records are bad then, which ends the run with it.
    """
    try:
        yield
    except BadSample as bad:
        raise bad.with_key(key) from bad
    except Exception as error:
        raise BadSample(key, "unexpected_error", f"{type(error).__name__}: {error}"[:500]) from error


class UnusableData(ValueError):
    """Data that a run cannot go on with, found while it runs."""


class TooManyRejects(UnusableData):
    """More bad records than the run allows."""


class RejectLog:
    """Counts bad records per cause and appends one JSON line for each to ``path``.

    A record is counted once, however often it comes up again. Lines already in ``path`` (a resumed run)
    are not written twice. ``max_rejects`` is the number of distinct bad records that is still accepted;
    None accepts any number. Several processes may share a path (lines are appended whole), but each then
    knows only its own records: give each data-parallel rank its own path to keep lines distinct.
    ``max_rate`` is the share of bad samples among those reported by ``saw`` that is still accepted, judged from
    200 samples on; None accepts any.
    Samples that were shortened to fit are counted too: see ``shortened``.
    """

    def __init__(self, path: str | Path | None, max_rejects: int | None, max_rate: float | None = None):
        if max_rejects is not None and max_rejects < 0:
            raise ValueError(f"max_rejects is {max_rejects}; use 0 to accept none, None to accept any number")
        if max_rate is not None and not 0 <= max_rate <= 1:
            raise ValueError(f"max_rate is {max_rate}; it is a share between 0 and 1, or None for no limit")
        self.path = Path(path) if path is not None else None
        self.max_rejects, self.max_rate = max_rejects, max_rate
        self.good = self.bad = self.pictured = 0
        self.last: BadSample | None = None
        self.counts: Counter[str] = Counter()
        self.cut_tiles = self.cut_tokens = 0
        """Given up so far by samples over the sequence length or a budget."""
        self._seen: set[tuple[str, str]] = set()
        self._written = self._read_back()

    def _read_back(self) -> set[tuple[str, str]]:
        written: set[tuple[str, str]] = set()
        if self.path is None or not self.path.exists():
            return written
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                written.add((entry["key"], entry["cause"]))
            except (ValueError, KeyError, TypeError):
                continue  # a line cut by a killed run: its record is written again when it comes up
        return written

    @property
    def total(self) -> int:
        """Distinct bad records seen by this run."""
        return len(self._seen)

    def add(self, bad: BadSample) -> None:
        """Count ``bad``; raise TooManyRejects, chained to it, once more than ``max_rejects`` were seen."""
        name = (bad.key, bad.cause)
        self.last = bad
        if name in self._seen:
            return
        self._seen.add(name)
        self.counts[bad.cause] += 1
        if self.path is not None and name not in self._written:
            self._written.add(name)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            entry = {"key": bad.key, "cause": bad.cause, "detail": bad.detail}
            with self.path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if self.max_rejects is not None and self.total > self.max_rejects:
            raise TooManyRejects(self._verdict()) from bad

    def saw(self, good: int, bad: int, pictured: int = 0) -> None:
        """Count samples that came up, `pictured` of the good ones with images.

        Raises TooManyRejects if too large a share of them was bad, a record that came up twice counting twice.
        """
        self.good += good
        self.bad += bad
        self.pictured += pictured
        samples = self.good + self.bad
        if self.max_rate is not None and samples >= RATE_AFTER and self.bad > self.max_rate * samples:
            raise TooManyRejects(
                f"{self.bad} of {samples} samples are bad, {self.bad / samples:.1%}; the limit is "
                f"{self.max_rate:.1%} ({self._found()}). Repair or remove them, or raise --max-reject-rate"
            )

    def shortened(self, tiles: int, tokens: int) -> None:
        """Count what samples gave up to fit the sequence length and the budgets."""
        self.cut_tiles += tiles
        self.cut_tokens += tokens

    def nothing_found(self, tries: str) -> str:
        """Why `tries` ("64 tries") in a row gave no usable sample, and what to do about it."""
        return f"{tries} in a row found no usable record ({self._found()})"

    def _found(self) -> str:
        """Causes so far, what they say of the data as a whole, the last record, and where all are listed."""
        text = f"different records bad so far: {self.summary()}"
        if self.counts["missing_image"] and not self.pictured:
            text += "; not one image was found: `root` in meta.json is probably wrong"
        text += (
            f"; they are listed in {self.path}" if self.path else "; --rejects-file FILE or --save lists them"
        )
        return f"{text}; the last is {self.last}" if self.last else text

    def _verdict(self) -> str:
        return (
            f"{self.total} bad records, {self.max_rejects} are allowed ({self._found()}). Repair or remove them, or "
            "raise --max-rejects"
        )

    def summary(self) -> str:
        """Counts per cause, most frequent first, for the log line: ``missing_image 3, bomb 1``."""
        return ", ".join(f"{cause} {count}" for cause, count in self.counts.most_common()) or "none"
