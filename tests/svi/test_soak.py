# SPDX-License-Identifier: Apache-2.0
"""A process that trains and samples again and again: the short form of `benchmarks/soak.py`."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_runs_and_draws_leave_nothing_behind():
    spec = importlib.util.spec_from_file_location("soak_benchmark", FILE)
    assert spec is not None and spec.loader is not None
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    found = dict(soak.soak(steps=20_000, runs=12, objects=0, samples=12))
    assert len(found) == 3
    for name, told in found.items():
        assert told["compiled"] == 0, name
        assert told["arrays more"] <= 0, name
        assert told["MiB more"] < 20, name
