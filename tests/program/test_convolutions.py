# SPDX-License-Identifier: Apache-2.0
"""Convolutions in loops are the same ones with their axes in order, wherever they are written."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from numpyro_ebm.program import convolutions
from numpyro_ebm.program.compilation import constants_as_arguments
from numpyro_ebm.program.draws import split_off_draws

KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3, 3)), jnp.float32)
ROWS = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 5, 6)), jnp.float32)


def rows_of(jaxpr, in_loop=False):
    """Dimension numbers of the convolutions in the loops of a jaxpr."""
    found = []
    for eqn in jaxpr.eqns:
        if in_loop and eqn.primitive.name == "conv_general_dilated":
            found.append(eqn.params["dimension_numbers"].lhs_spec)
        for inner in convolutions.inner_jaxprs(eqn):
            found += rows_of(inner, in_loop or eqn.primitive.name in ("scan", "while"))
    return found


def is_in_order(found):
    return all(x == (0, len(x) - 1, *range(1, len(x) - 1)) for x in found)


def same(x):
    """Channels first; padded to the shape of x."""
    return lax.conv_general_dilated(x, KERNEL.astype(x.dtype), (1, 1), "SAME")


@jax.custom_jvp
def ruled(x):
    return jnp.sin(same(x))


ruled.defjvp(lambda x, t: (ruled(*x), jnp.cos(same(*x)) * same(*t)))


def repeated(body):
    return lambda x: lax.fori_loop(0, 2, lambda _, x: body(x), x)


def unbounded(body):
    return lambda x: lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, body(s[1])), (0, x))[1]


PROGRAMS = {
    "scan": lambda x: lax.scan(lambda x, _: (same(x), x.sum()), x, None, 2),
    "while": unbounded(same),
    "a loop in a loop": repeated(repeated(same)),
    "a branch": repeated(lambda x: lax.cond(x.sum() > 0, same, lambda x: x, x)),
    "a function of its own": repeated(jax.jit(same)),
    "recomputed": repeated(jax.grad(lambda x: jax.checkpoint(same)(x**2).sum())),
    "a rule of its own": repeated(ruled),
    "its rule": repeated(jax.grad(lambda x: ruled(x).sum())),
    "the second derivative": repeated(
        jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(same(x) ** 3))(x) ** 2))
    ),
    "many kernels": repeated(
        lambda x: jax.vmap(lambda w: lax.conv(x, w, (1, 1), "SAME"))(KERNEL[None] * 0.5)[0]
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_do_the_same_with_their_convolutions_in_order(name):
    fn = PROGRAMS[name]
    before, after = jax.make_jaxpr(fn)(ROWS), constants_as_arguments(fn, ROWS)
    program, constants = after
    rewritten = jax.make_jaxpr(program)(constants, ROWS)
    assert not is_in_order(rows_of(before.jaxpr))
    assert rows_of(rewritten.jaxpr) and is_in_order(rows_of(rewritten.jaxpr))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4),
        jax.jit(program)(constants, ROWS),
        jax.jit(fn)(ROWS),
    )


@pytest.mark.parametrize("case", range(8))
def test_strides_dilations_padding_and_groups_are_kept(case):
    rng = np.random.default_rng(case)
    num, groups = 1 + case % 3, 1 + case // 4
    rows = rng.normal(size=(3, 2 * groups, *rng.integers(6, 8, num)))
    kernel = rng.normal(size=(4, 2, *rng.integers(1, 4, num)))
    orders = [rng.permutation(num + 2) for _ in range(3)]
    numbers = lax.ConvDimensionNumbers(*(tuple(map(int, np.argsort(o))) for o in orders))
    rows, kernel = jnp.asarray(rows, jnp.float32), jnp.asarray(kernel, jnp.float32)
    options = {
        "window_strides": rng.integers(1, 3, num).tolist(),
        "padding": [(int(a), int(b)) for a, b in rng.integers(-1, 3, (num, 2))],
        "lhs_dilation": rng.integers(1, 3, num).tolist(),
        "rhs_dilation": rng.integers(1, 3, num).tolist(),
        "feature_group_count": groups,
        "dimension_numbers": numbers,
    }
    rows, kernel = jnp.transpose(rows, orders[0]), jnp.transpose(kernel, orders[1])

    def fn(key, x):
        return lax.conv_general_dilated(x, kernel, **options)

    draw, finish, _ = split_off_draws(fn, jax.random.key(0), rows)
    drawn = draw(jax.random.key(0))
    found = rows_of(jax.make_jaxpr(finish)(drawn, rows).jaxpr, True)
    assert found and is_in_order(found)
    expected = fn(None, rows)
    assert expected.size
    np.testing.assert_allclose(finish(drawn, rows), expected, rtol=1e-5, atol=1e-5)


def test_what_runs_once_or_is_no_faster_stays(x64):
    for fn, x, in_loop in ((same, ROWS, True), (repeated(same), ROWS.astype(float), False)):
        program, constants = constants_as_arguments(fn, x)
        found = rows_of(jax.make_jaxpr(program)(constants, x).jaxpr, in_loop)
        assert found and not is_in_order(found)


def test_it_is_told_once(caplog):
    convolutions._tell.cache_clear()
    with caplog.at_level(logging.INFO, logger=convolutions.__name__):
        for _ in range(2):
            constants_as_arguments(PROGRAMS["while"], ROWS)[0]([KERNEL], ROWS)
    assert len(caplog.records) == 1
