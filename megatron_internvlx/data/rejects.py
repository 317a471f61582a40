"""Bad samples: the error of one record, and the log that counts them and stops a run with too many."""

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
"""All causes of a `BadSample`, in a fixed order, so that ranks can add their counts."""

# Samples before the rate is checked: earlier it is random.
RATE_AFTER = 200


class BadSample(Exception):
    """Record that is unusable for training.

    `key` names the record (`file.jsonl:12`), `cause` is one of `CAUSES`, and `detail` gives the finding and the
    remedy. Picklable, for data workers.
    """

    def __init__(self, key: str, cause: str, detail: str):
        key, detail = printable(key), printable(detail)
        super().__init__(key, cause, detail)
        self.key, self.cause, self.detail = key, cause, detail

    def __str__(self) -> str:
        return f"{self.key}: {self.cause}: {self.detail}"

    def with_key(self, key: str) -> "BadSample":
        """Copy under the name of the record that it belongs to."""
        return BadSample(key, self.cause, self.detail)


def printable(text: str) -> str:
    """Text in which characters that cannot be encoded (half of a surrogate pair) are escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def blamed_on(key: str) -> Iterator[None]:
    """Convert any error of the `with` block to a `BadSample` named `key`.

    Tokenizers, codecs and storage clients raise errors of nearly any class on odd input; a list of classes would be
    incomplete, and an error that is missed ends the run at the same record after every restart. Errors of the code or
    of the machine are not hidden: all records are bad then, which ends the run with that error.
    """
    try:
        yield
    except BadSample as bad:
        raise bad.with_key(key) from bad
    except Exception as error:
        raise BadSample(key, "unexpected_error", f"{type(error).__name__}: {error}"[:500]) from error


class UnusableData(ValueError):
    """Data that stops a run, found while it runs."""


class TooManyRejects(UnusableData):
    """More bad records than the run allows."""


class RejectLog:
    """Counts bad records per cause and appends one JSON line for each to `path`.

    A record is counted once, however often it is read. Lines already in `path` (a resumed run) are not written
    again. Give each data-parallel rank its own path: processes that share one write a record several times.

    Args:
        path: file of the lines; None: no file.
        max_rejects: number of distinct bad records that is accepted; None: any number.
        max_rate: share of bad samples among those of `count_samples` that is accepted, checked after 200 samples;
            None: any share.
    """

    def __init__(self, path: str | Path | None, max_rejects: int | None, max_rate: float | None = None):
        if max_rejects is not None and max_rejects < 0:
            raise ValueError(f"max_rejects {max_rejects} must be at least 0, or None to accept any number")
        if max_rate is not None and not 0 <= max_rate <= 1:
            raise ValueError(f"max_rate {max_rate} must be between 0 and 1, or None for no limit")
        self.path = Path(path) if path is not None else None
        self.max_rejects, self.max_rate = max_rejects, max_rate
        self.good = self.bad = self.pictured = 0
        self.last: BadSample | None = None
        self.counts: Counter[str] = Counter()
        self.cut_tiles = self.cut_tokens = 0
        """Tiles and tokens removed so far from samples over the sequence length or a budget."""
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
                continue  # a line cut by a killed run: its record is written again
        return written

    @property
    def total(self) -> int:
        """Number of distinct bad records in this run."""
        return len(self._seen)

    def add(self, bad: BadSample) -> None:
        """Count a bad record. Raises TooManyRejects, chained to it, if there are more than `max_rejects`."""
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

    def count_samples(self, good: int, bad: int, pictured: int = 0) -> None:
        """Count the samples that were read, `pictured` of the good ones with images.

        Raises TooManyRejects if the share of bad ones is over `max_rate`; a record that is read twice counts twice.
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

    def count_removed(self, tiles: int, tokens: int) -> None:
        """Count what was removed from samples to fit the sequence length and the budgets."""
        self.cut_tiles += tiles
        self.cut_tokens += tokens

    def nothing_found(self, tries: str) -> str:
        """Message that `tries` ("64 tries") in a row gave no usable sample, with causes and remedy."""
        return f"{tries} in a row found no usable record ({self._found()})"

    def _found(self) -> str:
        """Causes so far, the likely reason, the last record, and the file that lists all."""
        text = f"different records bad so far: {self.summary()}"
        if self.counts["missing_image"] and not self.pictured:
            text += "; no image was found: `root` in meta.json is probably wrong"
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
        """Counts per cause for the log line, most frequent first: `missing_image 3, bomb 1`."""
        return ", ".join(f"{cause} {count}" for cause, count in self.counts.most_common()) or "none"
