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


def assert_close(a, b, rtol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12), a, b)
