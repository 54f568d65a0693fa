# SPDX-License-Identifier: Apache-2.0
"""Trees as vectors, means over draws, and their error bars."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

# The lowest level of XLA's optimiser compiles several times faster; the arithmetic is the same.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def flat(tree):
    """All leaves of a tree as one vector."""
    return ravel_pytree(tree)[0]


def arrays(params):
    """Parameters of an oracle, NumPy arrays, as those of a model."""
    return jax.tree.map(jnp.asarray, params)


def value_and_gradient(fn):
    """A loss and its gradient as one vector."""
    return lambda params: flat(jax.value_and_grad(fn)(params))


def draws(fn, rng_key, num_draws):
    """``fn`` of many keys, its leaves flattened: an array of shape (num_draws, size)."""
    keys = jax.random.split(rng_key, num_draws)
    return np.asarray(jit(jax.vmap(lambda key: flat(fn(key))))(keys))


def z_scores(samples, expected):
    """(mean - expected) / standard error, column by column."""
    samples, expected = np.asarray(samples), np.asarray(expected)
    error = samples.mean(0) - expected
    standard_error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    rounding = 1e-9 * (1.0 + np.abs(expected))
    return np.where(np.abs(error) <= rounding, 0.0, error / np.maximum(standard_error, 1e-300))


def assert_unbiased(samples, expected, what="", limit=4.0):
    """Every column of ``samples`` has the expected mean, within ``limit`` standard errors."""
    z = z_scores(samples, expected)
    worst = np.max(np.abs(z))
    print(f"{what}: max |z| = {worst:.2f} over {z.size} components, {len(samples)} draws")
    assert worst <= limit, f"{what}: max |z| = {worst:.2f}, mean {samples.mean(0)}, not {expected}"
