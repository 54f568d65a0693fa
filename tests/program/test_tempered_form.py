# SPDX-License-Identifier: Apache-2.0
"""Slopes of densities between two others, and of groups of rows, against differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_ebm.program.multi_affine import multi_affine
from numpyro_ebm.program.tempered_form import Tempered

RNG = np.random.default_rng(4)
FIELDS, COUPLINGS = RNG.normal(size=(2, 4, 3)), RNG.normal(size=(4, 3, 4, 3))
COUPLINGS[np.arange(4), :, np.arange(4)] = 0.0
VALUES = {"s": [0, 1, 2]}


def fields(_, x):
    """Each of two rows has its own."""
    return jnp.sum(jnp.asarray(FIELDS)[np.arange(2)[:, None], jnp.arange(4), x["s"]], -1)


def alike(_, x):
    return jnp.sum(jnp.asarray(FIELDS[0])[jnp.arange(4), x["s"]], -1)


def pairs(_, x):
    o = jax.nn.one_hot(x["s"], 3)
    return jnp.einsum("nia,iajb,njb->n", o, jnp.asarray(COUPLINGS), o)


def nothing(_, x):
    return jnp.zeros(len(x["s"]))


def density_of(hot, cold, beta, states):
    """Two rows at a time, as the rows of the program are."""
    parts = [{"s": jnp.asarray(x)} for x in np.split(states, len(states) // 2)]
    hot, cold = (np.concatenate([np.asarray(fn({}, x)) for x in parts]) for fn in (hot, cold))
    return (1 - beta) * hot + beta * cold


@pytest.mark.parametrize(
    "hot, cold",
    [
        (fields, pairs),
        *(pytest.param(x, pairs, marks=pytest.mark.slow) for x in (nothing, alike)),
    ],
)
def test_slopes_are_differences_of_the_density_in_between(hot, cold):
    states = RNG.integers(0, 3, (6, 4))
    beta = np.array([0.0, 0.2, 0.4, 0.6, 0.9, 1.0])
    number = 1 if hot is alike else 2  # of the rows of the programs
    like = {"s": jnp.zeros((number, 4), int)}
    ends = [multi_affine(fn, {}, like, VALUES) for fn in (hot, cold)]
    form = Tempered(ends[1], ends[0] if ends[0].degree else None, jnp.asarray(beta))
    x = form.indicators(jnp.asarray(states))
    slopes = np.asarray(form.secants({}, x, {}))
    one_by_one = form.slopes_one_by_one({})
    at = density_of(hot, cold, beta, states)
    for i in range(4):
        np.testing.assert_allclose(one_by_one(x, i), slopes[:, i], rtol=1e-4, atol=1e-4)
        here = slopes[np.arange(6), i, states[:, i]]
        for k in range(3):
            moved = states.copy()
            moved[:, i] = k
            expected = density_of(hot, cold, beta, moved) - at
            np.testing.assert_allclose(slopes[:, i, k] - here, expected, rtol=1e-4, atol=1e-4)
