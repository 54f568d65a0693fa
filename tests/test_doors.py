# SPDX-License-Identifier: Apache-2.0
"""The table of kinds of faults in CONTRIBUTING.md: what it names exists, with five members each."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAST_MEMBERS = 5


def kinds():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("## Kinds of faults")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {kind.strip(): (doors, tests) for kind, doors, tests in rows[1:]}


def named(text):
    return re.findall(r"`(\S+?\.py)::(\w+)`", text)


KINDS = kinds()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_door(kind):
    doors, tests = KINDS[kind]
    assert named(doors) or "the same" in doors
    assert named(tests)
    for folder, names in (("numpyro_ebm", named(doors)), ("tests", named(tests))):
        for path, name in names:
            code = (ROOT / folder / path).read_text(encoding="utf-8")
            assert re.search(rf"^(def|class) {name}\b", code, re.MULTILINE), (path, name)


@pytest.mark.slow
def test_every_kind_has_five_members():
    ids = [f"tests/{path}::{name}" for _, tests in KINDS.values() for path, name in named(tests)]
    files = sorted({one.split("::")[0] for one in ids})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", *files]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for kind, (_, tests) in KINDS.items():
        members = [
            line
            for path, name in named(tests)
            for line in found.splitlines()
            if line.split("[")[0] == f"tests/{path}::{name}"
        ]
        assert len(members) >= LEAST_MEMBERS, (kind, members)
