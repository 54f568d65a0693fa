# SPDX-License-Identifier: Apache-2.0
"""Which energies are polynomials, and of which degree."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from gibbs_cases import straight
from jax import lax

from numpyro_ebm.program.polynomial import degree, structure
from numpyro_ebm.samplers.chromatic_gibbs import _polynomial_logits
from numpyro_ebm.samplers.gibbs_blocks import Block

ONES = jnp.ones((3, 2))
MATRIX = np.array([[1.0, 0.3], [0.2, -0.5]])
INF = float("inf")


@pytest.mark.parametrize(
    "fn, expected, separable",
    [
        (lambda x: 3.0, 0, True),
        (lambda x: jnp.ones(3) + 0 * x[0, 0], 1, True),  # an upper bound
        (lambda x: jnp.sum(x @ MATRIX, -1) / 2 - 1, 1, True),
        (lambda x: jnp.cumsum(jnp.pad(x, 1)[::-1].T.reshape(-1)), 1, True),
        (lambda x: jnp.mean(jnp.concatenate([x, -x])[1:]), 1, True),
        (lambda x: x[jnp.array([0, 2])] + x[0], 1, True),
        (lambda x: jnp.where(ONES > 0, x, 2.0) ** 2, 2, True),
        (lambda x: jnp.sum(((x - 1) / jnp.array([0.5, 2.0])) ** 2, -1), 2, True),
        (lambda x: jnp.square(x).sum() + x @ MATRIX[0], 2, True),
        (lambda x: jnp.einsum("ni,ni->n", x - 1, x - 1), 2, True),
        (lambda x: jnp.einsum("ni,ij,nj->n", x, MATRIX, x), 2, False),
        (lambda x: jnp.sum(x, -1) ** 2, 2, False),
        (lambda x: x * x[:, ::-1], 2, False),
        (lambda x: jnp.vdot(x, x[::-1]), 2, False),
        (lambda x: jnp.stack([x, x])[0] * x, 2, False),  # true, but not told
        (lambda x: x**3 * x, 4, True),
        (lambda x: x**2.0, 2, True),
        (lambda x: x**0, 0, True),
        (lambda x: jax.checkpoint(jax.jit(lambda y: y * y))(x), 2, True),
        (lambda x: straight(x) * x, 2, True),
        (lambda x: dist.Normal(1.0, 2.0).log_prob(x), 2, True),
        (lambda x: dist.Normal(jnp.ones(2), 2.0).to_event(1).log_prob(x), 2, True),
        (lambda x: dist.MultivariateNormal(jnp.ones(2), jnp.eye(2)).log_prob(x), 2, False),
        (lambda x: jnp.exp(jnp.ones(3)) + jnp.sum(x), 1, True),
        (lambda x: jnp.exp(x), INF, False),
        (lambda x: jnp.abs(x), INF, False),
        (lambda x: 1 / x, INF, False),
        (lambda x: x**0.5, INF, False),
        (lambda x: x**-1, INF, False),
        (lambda x: jnp.maximum(x, 0), INF, False),
        (lambda x: jnp.where(x > 0, x, 0), INF, False),
        (lambda x: lax.stop_gradient(x), INF, False),
        (lambda x: jnp.arange(3.0)[x.astype(int)], INF, False),
        (lambda x: lax.scan(lambda c, y: (c + y[0], y), 0.0, x)[0], INF, False),
        (lambda x: jnp.ones(3) * (x[:, 0] == 1), INF, False),
    ],
)
def test_degree_and_separability(fn, expected, separable):
    assert degree(fn, ONES) == expected
    found = structure(jax.jit(fn), ONES)
    assert (found.degree, found.separable) == (expected, separable)


def test_degree_is_joint_and_knows_number_types():
    x = {"a": jnp.ones(3), "b": jnp.ones(3)}
    assert degree(lambda x: jnp.sum(x["a"] * x["b"]), x) == 2
    assert degree(lambda x: {"c": x["a"], "d": x["b"] ** 3}, x) == 3
    bits = jnp.ones(3, int)
    assert degree(lambda h: (1 - h) * 0.5 + h / 2, bits) == 1
    assert degree(lambda h: h // 2, bits) == INF
    assert degree(lambda h: h.astype(bool) * 1.0, bits) == INF
    assert degree(lambda h: -h.astype(jnp.uint8), bits) == INF
    assert degree(lambda h: h * 2.0, bits.astype(bool)) == 1
    assert structure(lambda x: x["a"], x).true_gradient
    assert not structure(lambda x: straight(x["a"]), x).true_gradient


def test_symbolic_work_only():
    """A big model is walked, not run: shapes are enough."""
    shape = jax.ShapeDtypeStruct((10_000, 4_000), jnp.float32)
    assert structure(lambda x: jnp.sum(x**2, -1), shape) == (2, False, True)  # too many to label


def test_log_ratios_of_a_cubic_of_three_values():
    """0.1 (Σ x)³ from 3 to 4 and 5: two nodes of the quadrature, one is not enough."""
    x = jnp.array([[0.0, 2.0, 1.0]])
    block = Block(("x",), "coloured", {"x": [0, 1, 2]}, degree=3)
    moving, table = jnp.array([True, False, False]), np.tile([0.0, 1.0, 2.0], (3, 1))
    cubic = lambda x: 0.1 * jnp.sum(x, -1) ** 3  # noqa: E731
    logits = _polynomial_logits(cubic, x, moving, table, block)
    np.testing.assert_allclose(logits[:, 0, 0], 0.1 * (np.array([27.0, 64, 125]) - 27), rtol=1e-5)
