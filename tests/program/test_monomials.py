# SPDX-License-Identifier: Apache-2.0
"""Energies written out as sums of products of indicators, against their values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from discrete_energies import MEETS_ITSELF, TAKEN
from test_multi_affine import form_of, rows_of

from numpyro_ebm.program.monomials import monomials

DEFAULT = ("three sites", "a chain by scan", "a loop of sums")
NOT_WRITTEN_OUT = ("all sites", "a convolution")
ALL = {**TAKEN, **MEETS_ITSELF}  # squares of indicators are they themselves


@pytest.mark.parametrize(
    "name", [pytest.param(k, marks=[] if k in DEFAULT else [pytest.mark.slow]) for k in ALL]
)
def test_products_of_indicators_add_up_to_the_energy(x64, name):
    energy = ALL[name]
    params = jax.tree.map(jnp.asarray, energy.params)
    form = form_of(energy, 1)
    indicators = form.indicators(rows_of(energy, 6))

    @jax.jit  # parameters are not known
    def value(params, x):
        like = (1, *x.shape[1:])
        fn = lambda flat: form(params, flat.reshape(like))[0]  # noqa: E731
        width = 1 if form.is_binary else x.shape[-1]
        found = monomials(fn, x[0].size, width)
        if found is None:
            return None
        factors = jnp.concatenate([x.reshape(len(x), -1), jnp.ones((len(x), 1))], 1)
        return jnp.prod(factors[:, found.variables], -1) @ found.coefficients

    found = value(params, indicators)
    assert (found is None) == (name in NOT_WRITTEN_OUT)
    if found is not None:
        np.testing.assert_allclose(found, energy.fn(params, rows_of(energy, 6)), atol=1e-10)


def test_products_are_those_of_the_edges_and_triangles():
    pairs = np.triu_indices(6, 1)

    def network(y):
        A = jnp.zeros((6, 6)).at[pairs].set(y)
        A = A + A.T
        return 2.0 * jnp.sum(y) + 0.5 * jnp.einsum("ij,jk,ki->", A, A, A)

    found = monomials(network, 15)
    ends = [{*pairs[0][v[v >= 0]], *pairs[1][v[v >= 0]]} for v in found.variables]
    values = dict(zip(map(frozenset, ends), found.coefficients.tolist(), strict=True))
    assert sorted(map(len, values)) == [2] * 15 + [3] * 20
    assert {len(k): v for k, v in values.items()} == {2: 2.0, 3: 3.0}
    assert {v for k, v in values.items() if len(k) == 3} == {3.0}


def test_products_of_two_matrices_of_different_sizes():
    """Batches, free axes and sums of a contraction, with differences of its results."""
    a, b = np.random.default_rng(3).normal(size=(2, 3, 4)), np.arange(12.0).reshape(2, 2, 3)

    def fn(x):
        left = jnp.einsum("bij,bki->bjk", a * x[:4], b * x[4])  # (2, 4, 2)
        right = left[::-1] - left * x[5]
        return jnp.sum(right**2 / 2.0) + left[1, 2, 0] - right[0, 3, 1]

    found = monomials(fn, 6)
    for x in np.random.default_rng(4).integers(0, 2, (8, 6)).astype(float):
        value = np.prod(np.append(x, 1.0)[found.variables], -1) @ found.coefficients
        np.testing.assert_allclose(value, fn(x), rtol=1e-4, atol=1e-4)


def test_what_is_no_polynomial_is_not_written_out():
    assert monomials(lambda x: jnp.max(x), 3) is None
    assert monomials(lambda x: jnp.sum(x) / (1 + x[0]), 3) is None
    assert monomials(lambda x: jnp.sum(x) ** 9, 200) is None  # too many
