# SPDX-License-Identifier: Apache-2.0
"""Intervals of generalised posteriors over many data sets, by the benchmark of the manual."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import numpyro_ebm as ebm

pytestmark = pytest.mark.slow
FILE = Path(__file__).parents[2] / "benchmarks" / "coverage.py"
WRONG = {"bits": "β by traces", "gaussian": "β = 1", "truncated": "β = 1"}
"""Posteriors that are known to be too narrow."""


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("coverage_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["bits", "gaussian", "truncated", "lattice"])
def test_adjusted_intervals_cover_at_their_nominal_rates(x64, benchmark, name):
    table, num_sets = benchmark.coverage(name, jax.random.key(1), 80)
    assert num_sets >= 78
    for route in ("exact", "adjusted"):
        share, error, _ = table[route]
        assert np.all(np.abs(share - benchmark.LEVELS) < 0.02 + 3 * error), (route, share)
    if name in WRONG:
        share, error, _ = table[WRONG[name]]
        assert np.all(share < np.array(benchmark.LEVELS) - 3 * error)


@pytest.mark.parametrize(("name", "num_groups"), [("bits", 355), ("truncated", 200)])
def test_the_benchmark_calibrates_as_the_library_does(x64, benchmark, name, num_groups):
    case = benchmark.CASES[name](jax.random.key(2), 2)
    unravel, model = ravel_pytree(case.truth)[1], ebm.generalized(case.model, case.objective)

    def loss(x, data):
        return model.loss(jax.random.key(0), unravel(x), data)

    found = benchmark.estimate(case, loss, ravel_pytree(case.truth)[0])
    calibration = model.calibrate(case.data[0], num_resamples=num_groups)
    np.testing.assert_allclose(found.point[0], calibration.point, atol=1e-4)
    np.testing.assert_allclose(found.hessian[0], calibration.hessian, atol=1e-4)
    np.testing.assert_allclose(found.score_covariance[0], calibration.score_covariance, atol=1e-3)
