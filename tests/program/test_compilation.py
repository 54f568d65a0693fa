# SPDX-License-Identifier: Apache-2.0
"""A function run as one program is the function, and what it closes over are arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from numpyro_ebm.program.compilation import constants_as_arguments, run_compiled
from numpyro_ebm.program.constants import evaluate_known

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


def compilations(caplog, fn, name="jit(program)"):
    """What ``fn`` returns, and the names of the programs that were compiled for it."""
    with caplog.at_level("WARNING"), jax.log_compiles():
        caplog.clear()
        result = fn()
    lines = [x.getMessage() for x in caplog.records]
    return result, [x for x in lines if x.startswith("Finished XLA compilation of " + name)]


def test_indices_are_counted_without_a_program(caplog):
    closed = jax.make_jaxpr(lambda: jnp.arange(237))()
    found, compiled = compilations(caplog, lambda: evaluate_known(closed, []), "")
    assert not compiled
    np.testing.assert_array_equal(found[0], np.arange(237))
    assert found[0].dtype == jnp.result_type(int)
    jax.make_jaxpr(lambda: np.asarray(evaluate_known(closed, [])[0]))()  # known there as well


def line(slope, name="y"):
    return lambda x: {name: slope * x + 1.0}


def test_a_program_that_was_run_before_is_not_compiled_again(caplog):
    x, cubic = jnp.arange(5.0), lambda slope: lambda x: slope * x**3 - 2.5
    first, compiled = compilations(caplog, lambda: run_compiled(cubic(jnp.float32(2.0)), x))
    assert len(compiled) == 1
    second, compiled = compilations(caplog, lambda: run_compiled(cubic(jnp.float32(3.0)), x + 1))
    assert not compiled
    np.testing.assert_array_equal(first, 2 * np.arange(5.0) ** 3 - 2.5)
    np.testing.assert_array_equal(second, 3 * np.arange(1.0, 6.0) ** 3 - 2.5)


@pytest.mark.parametrize(
    "one, other, x",
    [
        (line(2.0), line(2.0, "z"), jnp.ones(2)),  # names of what is returned
        (line(np.float32(2.0)), line(np.float32(4.0)), jnp.ones(2)),  # constants
        (lambda k: k, jax.random.key_data, jax.random.key(3)),  # types that compilers do not know
        (lambda x: x[0], lambda x: x, (jnp.ones(2),)),
        (
            lambda x: jax.pure_callback(lambda y: y + 1, x, x),  # functions of the host
            lambda x: jax.pure_callback(lambda y: y + 2, x, x),
            jnp.ones(2),
        ),
    ],
)
def test_programs_that_differ_are_told_apart(one, other, x):
    for fn in (one, other, one):
        found, expected = run_compiled(fn, x), fn(x)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype and jnp.array_equal(a, b)
