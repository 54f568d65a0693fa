# SPDX-License-Identifier: Apache-2.0
"""Every public tool of NumPyro is in the registry, and the page of the manual says what it says."""

import importlib
import pkgutil
from pathlib import Path

import numpyro.contrib
import pytest
from registry.not_tools import NOT_TOOLS
from registry.numpyro_tools import (
    ELBOS,
    GUIDES,
    HANDLERS,
    KERNELS,
    REPARAMS,
    SAME,
    TOOLS,
    UTILITIES,
    Nothing,
    Refused,
)

PAGE = Path(__file__).parents[2] / "docs" / "tools.md"
MODULES = [
    "infer",
    "infer.autoguide",
    "infer.calibration",
    "infer.initialization",
    "infer.inspect",
    "infer.reparam",
    "infer.util",
    "handlers",
]
CONTRIBUTED = ["contrib." + found.name for found in pkgutil.iter_modules(numpyro.contrib.__path__)]


def public_names(name):
    module = importlib.import_module("numpyro." + name)
    if hasattr(module, "__all__"):
        return set(module.__all__)
    return {
        k
        for k, x in vars(module).items()
        if not k.startswith("_") and getattr(x, "__module__", None) == module.__name__
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", MODULES + CONTRIBUTED)
def test_every_public_name_is_a_tool_or_is_not(module):
    """A name that NumPyro adds is entered in `numpyro_tools.py` or in `not_tools.py`."""
    if module in NOT_TOOLS:
        return
    prefix = module + "." if module.startswith("contrib.") else ""
    tools = {name.split(",")[0] for name in TOOLS}
    missing = {prefix + name for name in public_names(module)} - tools - NOT_TOOLS.keys()
    assert not missing


def test_no_entry_is_of_a_name_that_is_gone():
    found = set(MODULES + CONTRIBUTED)
    for module in MODULES + [x for x in CONTRIBUTED if x not in NOT_TOOLS]:
        prefix = module + "." if module.startswith("contrib.") else ""
        found |= {prefix + name for name in public_names(module)}
    assert {name.split(",")[0] for name in TOOLS} | NOT_TOOLS.keys() <= found
    assert not {name.split(",")[0] for name in TOOLS} & NOT_TOOLS.keys()


WORDS = {SAME: "same", Refused: "refused", Nothing: "—"}


def table(tools):
    """Rows of the page."""
    lines = [
        "| tool | `fixed` | `normalized` | `generalized` | `EnergySVI` |",
        "|---|---|---|---|---|",
    ]
    for name, tool in tools.items():
        verdicts = tool.fixed, tool.normalized, tool.generalized, tool.energy_svi
        words = [WORDS[SAME if x == SAME else type(x)] for x in verdicts]
        first, *rest = name.split(", ")
        label = ", ".join([f"`{first}`", *rest])
        lines.append(f"| {label} | " + " | ".join(words) + " |")
    return "\n".join(lines)


def test_the_page_says_what_the_registry_says():
    page = PAGE.read_text(encoding="utf-8")
    for tools in (KERNELS, ELBOS, GUIDES, HANDLERS, REPARAMS, UTILITIES):
        assert table(tools) in page, "write this table into docs/tools.md:\n" + table(tools)


def test_there_are_tools_enough():
    assert len(TOOLS) >= 60
