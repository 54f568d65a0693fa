# SPDX-License-Identifier: Apache-2.0
"""Stops of one differentiation, and refusals of a second one, under every transformation of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_ebm as ebm
from numpyro_ebm.program.derivatives import constant_once, once_differentiable

pytestmark = pytest.mark.usefixtures("x64")

X = 0.7


def surrogate(x):
    product = constant_once(jnp.sin(x)) * jnp.sin(x)
    return product - 0.5 * constant_once(product)


def plain(x):
    return 0.5 * jnp.sin(x) ** 2


def _in_scan(f):
    return lambda x: jax.lax.scan(lambda c, _: (c + f(x), None), 0.0, None, length=3)[0]


WAYS = {
    "grad grad": lambda f: jax.grad(jax.grad(f)),
    "forward over reverse": lambda f: jax.jacfwd(jax.jacrev(f)),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f)),
    "forward twice": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "jit at every step": lambda f: jax.jit(jax.grad(jax.jit(jax.grad(jax.jit(f))))),
    "vmap inside": lambda f: jax.hessian(lambda x: jnp.sum(jax.vmap(f)(jnp.stack([x, 2 * x])))),
    "vmap outside": lambda f: lambda x: jax.vmap(jax.hessian(f))(jnp.stack([x, 2 * x])),
    "scan inside": lambda f: jax.hessian(_in_scan(f)),
    "gradient in scan": lambda f: jax.grad(_in_scan(jax.grad(f))),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(jax.grad(jax.checkpoint(f)))),
    "three times": lambda f: jax.grad(jax.grad(jax.grad(f))),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_constant_of_one_differentiation_has_all_later_ones(way):
    derive = WAYS[way]
    np.testing.assert_allclose(derive(surrogate)(X), derive(plain)(X), rtol=1e-12)
    assert surrogate(X) == plain(X)
    assert jax.grad(surrogate)(X) == jax.grad(plain)(X)


@pytest.mark.parametrize("way", WAYS)
def test_a_second_derivative_is_refused(way):
    def once(x):
        return once_differentiable(plain(x), "The reason.")

    assert once(X) == plain(X) and jax.grad(once)(X) == jax.grad(plain)(X)
    assert jax.jvp(once, (X,), (1.0,))[1] == jax.grad(plain)(X)
    with pytest.raises(ebm.ModelError, match="^The reason"):
        WAYS[way](once)(X)


def test_it_costs_nothing_to_run():
    text = [
        jax.jit(jax.grad(f)).lower(X).compile().cost_analysis()["flops"]
        for f in (plain, lambda x: once_differentiable(plain(x), ""))
    ]
    assert text[0] == text[1]
