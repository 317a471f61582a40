"""Which pages the documentation site has, and where its links lead. `make docs` builds it, warnings being errors."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="make docs installs it")
from mkdocs.config import load_config

from tests.unit.test_structure import ORDER, PACKAGE, ROOT
from tools import site_pages

KNOWN = {
    "README.md",
    "docs/data.md",
    "docs/lvtc.md",
    "benchmarks/results/index.md",
    "api/model.md",
    "api/settings.md",
}


def test_every_room_has_a_page() -> None:
    folders = {room for line in ORDER for room in line if (ROOT / PACKAGE / room).is_dir()}
    assert set(site_pages.ROOMS) == folders


def test_every_module_has_a_place_in_the_api() -> None:
    text = "\n".join(text for _, text in site_pages.api_pages())
    shown = re.findall(r"^::: (\S+)$", text, re.M)
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / PACKAGE).rglob("*.py")
        if path.stem != "__init__"
    }
    assert len(shown) == len(set(shown))
    assert set(shown) - {f"{PACKAGE}.platform"} == modules


@pytest.mark.parametrize(
    ("target", "page", "leads"),
    [
        ("docs/lvtc.md", "README.md", "docs/lvtc.md"),
        ("data.md#packing", "docs/lvtc.md", "data.md#packing"),
        ("#bytes", "docs/lvtc.md", "#bytes"),
        ("https://example.org/a.md", "README.md", "https://example.org/a.md"),
        ("../benchmarks/results/", "docs/lvtc.md", "../benchmarks/results/index.md"),
        ("../README.md", "docs/lvtc.md", "../README.md"),
        ("megatron_internvlx/config.py", "README.md", "api/settings.md#megatron_internvlx.config"),
        ("../megatron_internvlx/model/lvtc.py", "docs/lvtc.md", "../api/model.md#megatron_internvlx.model.lvtc"),
        ("examples/demo/demo.yaml", "README.md", None),
    ],
)  # fmt: skip
def test_links(target: str, page: str, leads: str | None) -> None:
    assert site_pages.resolve(target, page, KNOWN) == leads


def test_a_link_to_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"README.md: the link to docs/none.md leads nowhere"):
        site_pages.resolve("docs/none.md", "README.md", KNOWN)


def test_links_in_code_stay() -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="README.md"))
    files = SimpleNamespace(src_uris=dict.fromkeys(KNOWN))
    text = "[a](examples/demo/demo.yaml)\n```\n[a](none.md)\n```\n| `x\\|y` | b |"
    changed = site_pages.on_page_markdown(text, page, None, files)  # type: ignore[arg-type]
    assert changed == "a\n```\n[a](none.md)\n```\n| `x|y` | b |"


def test_every_document_is_a_page_of_the_navigation() -> None:
    config = load_config(str(ROOT / "mkdocs.yml"))
    site_pages.on_config(config)
    named = [
        page
        for title in config.nav
        for part in title.values()
        for page in ([part] if isinstance(part, str) else part)
    ]
    assert len(named) == len(set(named))
    assert set(named) == site_pages.pages().keys()
    documents = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")}
    assert documents <= set(named)


@pytest.mark.parametrize(
    "tag",
    [
        "<script src=https://cdn.example.org/x.js></script>",
        '<img alt="" src="http://example.org/x.png">',
        '<link rel="preconnect" href="https://fonts.example.org" crossorigin>',
        '<link rel="stylesheet" href="https://fonts.example.org/x.css">',
    ],
)
def test_a_page_that_loads_from_a_network_is_an_error(tmp_path: Path, tag: str) -> None:
    config = SimpleNamespace(site_dir=str(tmp_path))
    (tmp_path / "a.html").write_text('<a href="https://example.org">link</a><img src="x.png">')
    site_pages.on_post_build(config)  # type: ignore[arg-type]
    (tmp_path / "b.html").write_text(tag)
    with pytest.raises(ValueError, match=r"b\.html loads https?://.*example\.org"):
        site_pages.on_post_build(config)  # type: ignore[arg-type]
