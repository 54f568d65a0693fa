# SPDX-License-Identifier: Apache-2.0
"""What the README and the pages of the manual show is what happens."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def same(printed, shown):
    """Equal words; numbers may differ in their last digit, as they do between versions of JAX."""
    try:
        return abs(float(printed) - float(shown)) <= 1.01 * 10 ** -len(shown.partition(".")[2])
    except ValueError:
        return printed == shown


def blocks(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```(python|text)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


# Every page of the manual that has code. All but two are slow, and some of those are in `LONGEST`.
QUICK = ("CONTRIBUTING.md", "docs/language.md")
NAMES = [file.relative_to(ROOT).as_posix() for file in FILES]
PAGES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in NAMES
    if not name.startswith("docs/_build") and blocks(name)
]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(page):
    """Python blocks run in order in one namespace; a text block is what the one before printed."""
    namespace, printed = {"__name__": "page"}, ""
    for language, source in blocks(page):
        if language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
                exec(compile(source, page, "exec"), namespace)
            printed = output.getvalue()
        else:
            words, shown = printed.split(), source.split()
            assert len(words) == len(shown), printed
            assert all(map(same, words, shown)), printed


def test_the_commands_are_marked_for_ci():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, part in (("run", "examples/checkerboard.py"), ("test", "pytest")):
        found = re.search(rf"<!-- command: {name} -->\n```bash\n(.+)\n```", readme)
        assert found and part in found[1]
