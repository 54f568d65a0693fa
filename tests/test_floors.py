# SPDX-License-Identifier: Apache-2.0
"""The layout: imports run down the floors, no two files import each other, names are unique."""

import ast
import collections
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "numpyro_ebm"

# From the ground up. A file may import from its own folder and from the floors below.
FLOORS = [
    {"error_pages"},
    {"_compat", "errors", "keys", "types"},
    {"signatures", "inputs", "printed"},
    {"datasets"},
    {"language", "program"},
    {"samplers"},
    {"model", "models"},
    {"guides"},
    {"marginals"},
    {"log_normalizers"},
    {"objectives"},
    {"mcmc", "svi"},
    {"diagnostics"},
    {"posteriors"},
]
FLOOR_OF = {folder: i for i, floor in enumerate(FLOORS) for folder in floor}

# The protocol of a BlackJAX algorithm, which every sampler has.
BLACKJAX = {"init", "build_kernel", "as_top_level_api"}

FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}


def is_for_types(node):
    """Whether a statement is `if TYPE_CHECKING`, whose imports are there for annotations alone."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imported(tree):
    """The files of the package that one file imports, wherever in it the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if of_package(name) else node.module for name in whole]
        else:
            continue
        yield from filter(None, map(of_package, names))


def of_package(name):
    """The file of a module of the package; ``None`` for what is none."""
    inside = name.removeprefix("numpyro_ebm.")
    candidates = (inside, f"{inside}.__init__") if inside != name else ()
    return next((file for file in candidates if file in FILES), None)


IMPORTS = {file: set(imported(tree)) for file, tree in FILES.items()}


def folder(file):
    return file.split(".")[0]


def test_every_folder_has_a_floor():
    assert {folder(file) for file in FILES} - {"__init__"} <= set(FLOOR_OF)


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__"])
def test_imports_run_down(file):
    mine = FLOOR_OF[folder(file)]
    up = {
        other
        for other in IMPORTS[file]
        if folder(other) != folder(file) and FLOOR_OF.get(folder(other), len(FLOORS)) >= mine
    }
    assert not up, f"{file} is on floor {mine} and imports {up}"


def test_no_two_files_import_each_other():
    # Packages hand on what their files define, so that a file may not import its own package.
    at_run_time = {
        file: set(imported(ast.Module([x for x in tree.body if not is_for_types(x)], [])))
        for file, tree in FILES.items()
    }
    graphlib.TopologicalSorter(at_run_time).prepare()


def test_no_name_is_defined_twice():
    where = collections.defaultdict(set)  # overloads of a function are in one file
    for file, tree in FILES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                where[node.name].add(file)
    twice = {name: files for name, files in where.items() if len(files) > 1}
    assert set(twice) <= BLACKJAX, twice


def test_every_folder_says_what_lives_there():
    for file, tree in FILES.items():
        if file.endswith("__init__"):
            assert ast.get_docstring(tree), f"{file} has no docstring"
