# SPDX-License-Identifier: Apache-2.0
"""Coefficients of quadratic forms, against the Hessian of one row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_ebm.program.quadratic import quadratic_form

D = 5
RNG = np.random.default_rng(0)
CENTER = np.array([0.5, 1.0, 0.5, 0.0, 2.0])
J, FIELD = jnp.asarray(RNG.normal(size=(D, D))), jnp.asarray(RNG.normal(size=D))
W, BIAS = jnp.asarray(RNG.normal(size=(D, 3))), jnp.asarray(RNG.normal(size=3))


def spins(x):
    return 2.0 * x - 1.0


SIMPLE = {
    "matrix": lambda x: jnp.sum((x @ J) * x, -1) + x @ FIELD,
    "spins": lambda x: -jnp.sum((spins(x) @ J) * spins(x), -1) / 3.0 - spins(x) @ FIELD,
    "einsum": lambda x: jnp.einsum("ni,ij,nj->n", spins(x), J, x),
    "the other side": lambda x: jnp.sum(x.T * (J @ x.T), 0),
    "jitted": jax.jit(lambda x: jnp.sum(x * jnp.dot(x, J), axis=1)),
    "squares": lambda x: jnp.sum(FIELD * (x - 0.3) ** 2, -1),
    "what is left of a number": lambda x: jnp.sum(J[0] - jnp.abs(J[1]) * x, -1) - (x @ FIELD) ** 2,
    "taken from zero": lambda x: jnp.sum((jnp.zeros(D) - x @ J) * x, -1),
    "factors": lambda x: 0.5 * jnp.sum((x @ W - BIAS) ** 2, -1),
    "linear": lambda x: x @ FIELD + 1.0,
    "scaled": lambda x: jnp.sum(((spins(x) * FIELD) @ J) * (spins(x) / FIELD), -1),
    "scaled squares": lambda x: jnp.sum(((x - 0.3) * FIELD) ** 2, -1) + jnp.sum(x * FIELD * x, -1),
    "one factor": lambda x: jnp.sum(x * FIELD, -1) ** 2 / 3.0,
    "a kept axis": lambda x: jnp.sum(x * jnp.sum(x * FIELD, -1, keepdims=True), -1),
    "a bias of spins": lambda x: jnp.sum(((spins(x) + 0.5) @ J) * (spins(x) + 0.5), -1),
    "biases of spins": lambda x: jnp.einsum("ni,ij,nj->n", spins(x) + FIELD, J, FIELD - spins(x)),
    "scaled by NumPy's": lambda x: jnp.sum(((x * np.arange(1.0, 6.0)) @ J) * x, -1),
    "row by row": jax.vmap(lambda x: (x * FIELD) @ J @ (x * FIELD)),
    "sum": lambda x: jnp.sum(x, -1) ** 2,
}
OTHERWISE = {
    "neighbours on a line": lambda x: jnp.sum(x[:, 1:] * x[:, :-1], -1),
    "pairs": lambda x: jnp.sum(J * x[:, :, None] * x[:, None, :], (1, 2)),
}


def form(log_density):
    return quadratic_form(jax.grad(lambda x: jnp.sum(log_density(x))), CENTER)


@pytest.mark.parametrize("name", SIMPLE)
def test_equals_gradient_and_hessian(x64, name):
    log_density = SIMPLE[name]
    one = lambda x: log_density(x[None])[0]  # noqa: E731
    for wrap in (lambda f: f, jax.jit):
        b, H = wrap(lambda: form(log_density))()
        np.testing.assert_allclose(
            0.0 if b is None else b, jax.grad(one)(jnp.asarray(CENTER)), atol=1e-12
        )
        np.testing.assert_allclose(H, jax.hessian(one)(jnp.zeros(D)), atol=1e-12)


@pytest.mark.parametrize("name", OTHERWISE)
def test_other_programs_have_no_simple_form(x64, name):
    assert form(OTHERWISE[name]) is None


def test_products_with_diagonal_matrices_are_none(x64):
    """One scaled sum of J and its transpose, and no gradient where the center is a zero of s."""

    def coefficients(J):
        log_density = lambda x: jnp.sum((spins(x) @ J) * spins(x))  # noqa: E731
        return quadratic_form(jax.grad(log_density), np.full(D, 0.5))

    assert coefficients(J)[0] is None
    program = jax.make_jaxpr(lambda J: coefficients(J)[1])(J)
    assert "dot_general" not in str(program)
    np.testing.assert_allclose(coefficients(J)[1], 4 * (J + J.T))
    slope = jax.grad(lambda J: jnp.sum(coefficients(J)[1] ** 2))(J)
    np.testing.assert_allclose(slope, 64 * (J + J.T))
