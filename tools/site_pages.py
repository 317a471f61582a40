"""Pages of the documentation site: the repository's own documents at their own paths, and the API.

MkDocs calls the `on_*` functions (mkdocs.yml names this file as a hook). Documents keep their paths, so that a
relative link works in the repository and on the site alike. A link to a file that is not a page, such as a source
or a recipe, becomes plain text; one to a module of the package leads to the API.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation, Section
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_internvlx"

# Title in the navigation bar -> documents, as patterns from the repository's root.
DOCUMENTS = {
    "Start": ["README.md"],
    "Guides": ["docs/*.md"],
    "Examples": ["examples/*.py", "examples/*/README.md", "examples/*/*.py"],
    "API": [],
    "Measurements": ["benchmarks/results/*.md"],
    "Project": ["CONTRIBUTING.md", "RELEASING.md", "CHANGELOG.md"],
}
ASSETS = ["benchmarks/results/*.png", "docs/*.png", "docs/assets/*.png", "CITATION.cff", "LICENSE"]
# Rooms in the order of CONTRIBUTING's tour; the files beside them make a page of their own.
ROOMS = [
    "platform", "data", "parallel", "model", "planning", "training", "reporting", "lifecycle", "checkpoint",
    "evaluation", "harness", "serving", "chat", "commands", "hf",
]  # fmt: skip
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\[]+)\]\((?P<target>[^)\s]+)\)")
FENCE = re.compile(r"^(```|~~~)")
# What a browser loads by itself, unlike a link that a reader follows.
LOADED = re.compile(r"<(?:script|img|iframe)\b[^>]*\bsrc=[\"']?(https?://[^\"'\s>]+)")
STYLE = re.compile(
    r"<link\b[^>]*\brel=[\"']?(?:stylesheet|preconnect|icon)[^>]*\bhref=[\"']?(https?://[^\"'\s>]+)"
)
CODE = re.compile(r"`[^`]+`")


def documents() -> dict[str, list[str]]:
    """Title in the navigation bar -> paths of its documents, from the repository's root."""
    found = {
        title: [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))]
        for title, patterns in DOCUMENTS.items()
    }
    found["Measurements"].sort(reverse=True, key=lambda name: name[-len("2026-01-01.md") :])
    return found


def page_of_example(path: Path) -> tuple[str, str]:
    """(path, text) of the page that shows a program: its docstring, then its code."""
    source = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix()
    summary = (ast.get_docstring(ast.parse(source)) or "").split("\n", 1)[0].rstrip(".")
    text = f"# {summary}\n\n`python {name}`\n\n```python\n{source}```\n"
    return str(PurePosixPath(name).with_suffix(".md")), text


def modules(room: str) -> list[str]:
    """Dotted names of a room's modules, folders in it included; of the files beside the rooms if `room` is empty."""
    paths = (ROOT / PACKAGE / room).glob("**/*.py" if room else "*.py")
    names = (path.relative_to(ROOT).with_suffix("") for path in sorted(paths) if path.stem != "__init__")
    return [".".join(name.parts) for name in names]


def api_pages() -> Iterator[tuple[str, str]]:
    """(path, text) of every page of the API; mkdocstrings fills in what the text names."""
    rows = []
    for room in ["", *ROOMS]:
        name = room or "settings"
        init = ROOT / PACKAGE / room / "__init__.py"
        docstring = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        about = docstring.split("\n\n", 1)[0].replace("\n", " ") if room else SETTINGS
        rows.append(f"| [{name}]({name}.md) | {about} |")
        blocks = "\n\n".join(f"::: {module}" for module in modules(room))
        if room == "platform":
            blocks = f"::: {PACKAGE}.platform\n\n{blocks}"
        yield f"api/{name}.md", f"# {name}\n\n{about}\n\n{blocks}\n"
    yield (
        "api/index.md",
        "# API\n\nRooms of the package `megatron_internvlx`, lowest first.\n\n"
        + "\n".join(["| room | about |", "|---|---|", *rows, ""]),
    )


SETTINGS = "Settings, recipes, and what every room may use."


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Builds the navigation from the documents that are there."""
    nav: list[Any] = []
    for title, names in documents().items():
        if title == "API":
            pages: list[Any] = ["api/index.md", *(f"api/{room}.md" for room in ["settings", *ROOMS])]
        elif title == "Measurements":
            pages = ["benchmarks/results/index.md", *names]
        else:
            pages = [str(PurePosixPath(name).with_suffix(".md")) for name in names]
        nav.append({title: pages[0] if len(pages) == 1 else pages})
    config.nav = nav
    return config


def pages() -> dict[str, str]:
    """Path -> text of every page of the site."""
    found = dict(api_pages())
    for title, names in documents().items():
        for name in names:
            if name.endswith(".py"):
                path, text = page_of_example(ROOT / name)
            else:
                path, text = name, (ROOT / name).read_text(encoding="utf-8")
            found[path] = text
        if title == "Measurements":
            found["benchmarks/results/index.md"] = measurements(names)
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The site's files: those of the theme, the documents under their own paths, the API."""
    for file in list(files.documentation_pages()):
        files.remove(file)
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    for pattern in ASSETS:
        for asset in sorted(ROOT.glob(pattern)):
            name = asset.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(asset)))
    return files


def measurements(names: list[str]) -> str:
    """The page that lists the dated tables, newest first."""
    lines = ["# Measurements\n", "Each table gives its date, hardware, versions and command.\n"]
    for name in names:
        stem = PurePosixPath(name).stem
        lines.append(f"- [{stem[:-11].replace('_', ' ')}]({stem}.md), {stem[-10:]}")
    return "\n".join(lines) + "\n"


def resolve(target: str, page: str, known: set[str]) -> str | None:
    """Target of a link on the site; None if it is not a page of the site.

    Args:
        target: as it is written.
        page: path of the page it stands on.
        known: paths of all files of the site.

    Raises:
        ValueError: the target is not in the repository either.
    """
    path, _, anchor = target.partition("#")
    if not path or "://" in target or target.startswith("mailto:"):
        return target
    folder = posixpath.dirname(page)
    full = posixpath.normpath(posixpath.join(folder, path))
    candidates = [full, f"{full}/index.md", f"{full}/README.md", str(PurePosixPath(full).with_suffix(".md"))]
    parts = PurePosixPath(full).parts
    if parts[0] == PACKAGE:
        candidates.append(f"api/{parts[1] if len(parts) > 1 and parts[1] in ROOMS else 'settings'}.md")
        if full.endswith(".py"):
            anchor = anchor or full.removesuffix(".py").replace("/", ".")
    for candidate in candidates:
        if candidate in known:
            return posixpath.relpath(candidate, folder or ".") + (f"#{anchor}" if anchor else "")
    if not (ROOT / full).exists():
        raise ValueError(f"{page}: the link to {target} leads nowhere: {full} is not in the repository")
    return None


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files of the repository into links of the site, and tables into MkDocs's dialect."""
    known = set(files.src_uris)

    def replaced(match: re.Match[str]) -> str:
        found = resolve(match["target"], page.file.src_uri, known)
        return match["text"] if found is None else f"[{match['text']}]({found})"

    lines, fenced = [], False
    for line in markdown.split("\n"):
        fenced ^= bool(FENCE.match(line.lstrip()))
        if not fenced:
            line = LINK.sub(replaced, line)
            if line.startswith("|"):  # elsewhere than on this site, a | in code would end the cell
                line = CODE.sub(lambda code: code[0].replace("\\|", "|"), line)
        lines.append(line)
    return "\n".join(lines)


def on_post_build(config: MkDocsConfig) -> None:
    """Looks through what was built. Raises ValueError if a page would load something from a network."""
    for page in sorted(Path(config.site_dir).rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        if found := LOADED.search(text) or STYLE.search(text):
            raise ValueError(f"{page.name} loads {found[1]} from a network; put a copy into docs/assets")


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """Measurements are listed by name and date: their headings are sentences."""
    for item in nav.items:
        if isinstance(item, Section) and item.title == "Measurements":
            for page in item.children or []:
                name = PurePosixPath(page.file.src_uri).stem if isinstance(page, Page) else "index"
                if name != "index":
                    page.title = f"{name[:-11].replace('_', ' ')}, {name[-10:]}"
    return nav
