# SPDX-License-Identifier: Apache-2.0
"""The library has one random key of its own, which no test takes: shared draws hide faults."""

import ast
from pathlib import Path

import jax

from numpyro_ebm.keys import DEFAULT_SEED, default_key

ROOT = Path(__file__).parents[1]


def calls(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def is_constant_key(call):
    name = ast.unparse(call.func)
    return name.endswith(("random.key", "PRNGKey")) and all(map(is_number, call.args))


def test_the_library_makes_no_other_key():
    files = [p for p in sorted((ROOT / "numpyro_ebm").rglob("*.py")) if p.name != "keys.py"]
    found = {str(p): ast.unparse(c) for p in files for c in calls(p) if is_constant_key(c)}
    assert not found, f"`numpyro_ebm.keys.default_key()` instead of {found}"


def test_no_test_takes_the_default_key():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        numbers = {n.value for n in ast.walk(ast.parse(path.read_text())) if is_number(n)}
        assert DEFAULT_SEED not in numbers, path
    assert jax.random.key_data(default_key()).tolist() != [0, 0]


def is_number(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, int)
