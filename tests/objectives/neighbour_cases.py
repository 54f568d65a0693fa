# SPDX-License-Identifier: Apache-2.0
"""What the tests of objectives share."""

import itertools

import jax
import numpy as np
from registry.objectives import formulas

KEY = jax.random.key(0)
RNG = np.random.default_rng(2)
BITS = np.array(list(itertools.product([0, 1], repeat=3)), float)
FORMULAS = formulas("discrete", "binary")


def site_kernel(perturbation, num_values, probability):
    """q(y | x) of one coordinate, written out."""
    q = np.zeros((num_values, num_values))
    for x in range(num_values):
        if perturbation == "uniform":
            targets = [y for y in range(num_values) if y != x]
        elif perturbation == "cyclical":
            targets = [(x - 1) % num_values, (x + 1) % num_values]
        else:
            targets = [max(x - 1, 0), min(x + 1, num_values - 1)]
        for y in targets:
            q[x, y] += probability / len(targets)
        q[x, x] += 1.0 - probability
    assert np.array_equal(q, q.T) and np.allclose(q.sum(1), 1.0)
    return q


def assert_close(a, b, rtol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12), a, b)
