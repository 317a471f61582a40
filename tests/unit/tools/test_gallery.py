"""Pictures of the gallery: small, and the colour of a thin line survives."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import gallery


def test_thin_line_keeps_its_colour_beside_a_photograph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "MOST_BYTES", 95_000)  # allows 64 colours of this picture
    noise = np.random.default_rng(0).integers(90, 130, (300, 400, 3), dtype=np.uint8)
    noise[150] = (27, 94, 167)
    Image.fromarray(noise).save(tmp_path / "drawn.png")
    gallery.shrink(tmp_path / "drawn.png", tmp_path / "out" / "small.png")
    assert (tmp_path / "out" / "small.png").stat().st_size <= gallery.MOST_BYTES
    line = np.asarray(Image.open(tmp_path / "out" / "small.png").convert("RGB"))[150]
    # Measured: 0; with median cut 50.
    assert np.abs(line.astype(int) - (27, 94, 167)).max() <= 8
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["small.png"]


def test_gallery_without_a_demo_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks report\.png.*make demo"):
        gallery.check_demo(tmp_path)
