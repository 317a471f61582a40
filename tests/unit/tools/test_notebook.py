"""The quickstart's notebook is its guide: same text, same commands."""

from tools import notebook


def test_notebook_is_the_guide():
    assert notebook.NOTEBOOK.read_text(encoding="utf-8") == notebook.rendered(), (
        "run: python tools/notebook.py"
    )


def test_cells():
    guide = "# T\n\n[a](a.md) [b](https://b)\n\n```sh\nx\n```\n\n```\nprinted\n```\n\n```bash\nnot here\n```\n\nend\n"
    assert notebook.cells(guide) == [
        ("markdown", "# T\n\n[a](../docs/a.md) [b](https://b)"),
        ("code", notebook.SETUP),
        ("code", "%%bash\nx\n"[:-1]),
        ("markdown", "```bash\nnot here\n```\n\nend"),
    ]
