"""The Python blocks of the pages run, each page from top to bottom in one namespace."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())],
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_code_runs(page):
  text, names = page.read_text(), {"__name__": "__main__"}
  for block in BLOCK.finditer(text):
    blank = "\n" * text.count("\n", 0, block.start(1))  # so that a traceback shows the page's own line numbers
    exec(compile(blank + block[1], str(page), "exec"), names)
