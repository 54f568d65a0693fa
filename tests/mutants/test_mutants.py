# SPDX-License-Identifier: Apache-2.0
"""The list of planted faults is up to date; `make mutants` runs it."""

import ast
from pathlib import Path

from plant import ROOT, read_mutants

MUTANTS = read_mutants()


def test_every_fault_can_be_planted():
    """Its line occurs exactly once, and the file with the fault is still a program."""
    assert len(MUTANTS) >= 120
    for mutant in MUTANTS:
        source = (ROOT / "numpyro_ebm" / mutant.file).read_text(encoding="utf-8")
        compile(mutant.planted(source), mutant.file, "exec")
    assert len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)


def test_its_tests_exist():
    names = {}
    for test in {test for mutant in MUTANTS for test in mutant.tests}:
        file, _, name = test.partition("::")
        if file not in names:
            tree = ast.parse(Path(ROOT / file).read_text(encoding="utf-8"))
            names[file] = {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}
        assert not name or name.partition("[")[0] in names[file], test
