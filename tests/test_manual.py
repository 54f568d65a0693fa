# SPDX-License-Identifier: Apache-2.0
"""The manual has all that is public, and says the same everywhere."""

import importlib.util
import inspect
import json
import os
import re
import tomllib
from pathlib import Path

import pytest

import numpyro_ebm as ebm

ROOT = Path(__file__).parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference():
    return load(ROOT / "docs/_ext/reference.py")


def test_every_public_name_has_one_page(reference):
    listed = reference.objects()
    assert sorted(listed) == sorted(set(listed))
    modules = {name for name in ebm.__all__ if inspect.ismodule(getattr(ebm, name))}
    absent = set(ebm.__all__) - modules - set(listed)
    assert not absent, f"write them into a group of docs/_ext/reference.py: {absent}"
    for name in listed:
        found = reference.find(name)
        assert inspect.getdoc(found) or not callable(found), name


def test_pages_show_no_member_that_is_not_there(reference):
    assert set(reference.MEMBERS) <= set(reference.objects())
    for name, members in reference.MEMBERS.items():
        for member in filter(None, members.split(", ")):
            assert hasattr(reference.find(name), member), f"{name}.{member}"


def test_the_version_is_said_once_and_the_recipe_follows():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    recipe = (ROOT / ".ci/recipe/recipe.yaml").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert re.search(r"^## \[(\d.*?)\]", changelog, re.MULTILINE)[1] == ebm.__version__
    assert re.search(r'^  version: "(.*)"', recipe, re.MULTILINE)[1] == ebm.__version__
    run = re.search(r"^  run:\n(.*?)\n\n", recipe, re.MULTILINE | re.DOTALL)[1]
    needed = [line.replace("    - ", "").replace(" ", "") for line in run.splitlines()]
    assert sorted(needed[1:]) == sorted(project["dependencies"])
    python = re.search(r'^  python_min: "(.*)"', recipe, re.MULTILINE)[1]
    assert project["requires-python"] == f">={python}"


def test_the_readme_links_to_files_that_are_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://|#)([^)\s#]+)", readme)
    assert len(links) > 10
    assert not [link for link in links if not (ROOT / link).is_file()]


def test_every_picture_is_drawn_by_a_script_that_a_page_names():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"(?:python |`)((?:docs|examples|benchmarks)/\w+\.py)", text))
    assert not [script for script in named if not (ROOT / script).is_file()]
    pictures = [file for file in (ROOT / "docs").iterdir() if file.suffix in (".png", ".gif")]
    for picture in pictures:
        stems = [Path(script).stem for script in named]
        # A script has the name of its picture, or draws several: `digits_pcd.png`.
        drawing = [x for x in stems if x.startswith(picture.stem) or f"{x}_" in picture.stem]
        assert drawing, f"say on a page which script draws docs/{picture.name}"


def test_every_command_is_that_of_a_script_in_the_tree():
    """Figures are traced to commands: the script is there, and knows the options."""
    command = r"python ((?:benchmarks|docs|examples|tests)/\S+?\.py)([^`\n]*(?:\n[^`\n]+(?=`))?)"
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    pages += (ROOT / "docs/gallery").glob("*.md")
    found = [x for page in pages for x in re.findall(command, page.read_text(encoding="utf-8"))]
    assert len(found) > 30
    for script, options in found:
        source = (ROOT / script).read_text(encoding="utf-8")
        for option in re.findall(r"(?<!\S)--[a-z-]+", options):
            assert f'"{option}"' in source, f"{script} {option}"


def test_the_table_of_the_checkerboard_is_that_of_its_file(capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # the script sets a default
    module = load(ROOT / "benchmarks/reproduction.py")
    module.table(json.loads(module.RESULTS.read_text(encoding="utf-8")))
    rows = capsys.readouterr().out.replace("-0.000", "0.000").splitlines()
    page = (ROOT / "docs/reproduction.md").read_text(encoding="utf-8").replace("−", "-")
    assert len(rows) > 30 and not [row for row in rows if row not in page]
