# SPDX-License-Identifier: Apache-2.0
"""A function run as one program is the function, and what it closes over are arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from numpyro_ebm.program.compilation import constants_as_arguments, run_compiled

TABLE = jnp.arange(12.0).reshape(3, 4)
KEY = jax.random.key(7)


def closes_over_tables(x):
    noise = jax.random.normal(KEY, (3,))
    total, rows = lax.scan(lambda c, row: (c + row @ x, row * x), 0.0, TABLE)
    return {"total": total, "rows": rows, "noise": noise, "none": None}


def test_it_is_the_function():
    x = jnp.array([1.0, -2.0, 0.5, 3.0])
    found = run_compiled(closes_over_tables, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, closes_over_tables(x)
    )
    assert found["none"] is None


def test_no_array_is_left_as_a_constant():
    x = jnp.ones(4)
    program, constants = constants_as_arguments(closes_over_tables, x)
    assert any(np.shape(c) == (3, 4) for c in constants)
    assert jax.make_jaxpr(closes_over_tables)(x).consts
    assert not jax.make_jaxpr(program)(constants, x).consts


@pytest.mark.parametrize(
    "transform", [jax.jit, jax.vmap, jax.jacobian, lambda f: jax.vmap(jax.jit(f))]
)
def test_it_may_be_a_part_of_what_is_traced(transform):
    def of_rows(x):
        return run_compiled(lambda: jnp.sum(TABLE * x, -1))

    x = jnp.ones((2, 4)) if transform is not jax.jacobian else jnp.ones(4)
    x = x[0] if transform is jax.jit else x
    plain = transform(lambda x: jnp.sum(TABLE * x, -1))
    np.testing.assert_allclose(transform(of_rows)(x), plain(x), rtol=1e-6)
