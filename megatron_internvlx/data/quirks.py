"""Behaviours of the released code's data path that training leaves out unless asked."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReleasedQuirks:
    """Behaviours of the released code that are off by default; True turns one on.

    `mask_id_zero`: tokens with id 0 get no attention ("!" for Qwen2), as `attention_mask = ids != 0`.
    `literal_surplus_placeholders`: `<image>` beyond the number of images stays as plain text.
    `drop_surplus_images`: images without an `<image>` are dropped and the sample gives no loss.
    `ignore_exif`: the EXIF orientation of images is ignored.
    `ignore_labels_on_length_mismatch`: internlm2-chat and Hermes-2 samples whose parts tokenize to
    another length than the whole (a pad token in the text, an empty answer) give no loss.
    `partial_answers`: a text above the length limit is cut anywhere, also inside an answer.
    """

    mask_id_zero: bool = False
    literal_surplus_placeholders: bool = False
    drop_surplus_images: bool = False
    ignore_exif: bool = False
    ignore_labels_on_length_mismatch: bool = False
    partial_answers: bool = False

    @classmethod
    def all(cls) -> "ReleasedQuirks":
        """Turn on all behaviours of the released code."""
        return cls(*[True] * len(cls.__dataclass_fields__))


NO_QUIRKS = ReleasedQuirks()
