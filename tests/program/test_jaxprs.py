# SPDX-License-Identifier: Apache-2.0
"""Functions rewritten through their jaxprs: nothing but the work changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from numpyro_ebm.program.draws import scan_keys, split_off_draws
from numpyro_ebm.program.jaxprs import at_zero, needed, without_repeats, written_out


def primitives(jaxpr):
    return [eqn.primitive.name for eqn in jaxpr.eqns]


def noisy_step(key, x, scale):
    """Draws in nested jits, in a branch that reads the state, and one that nothing needs."""
    key_a, key_b, key_c = jax.random.split(key, 3)
    nested = jax.jit(lambda key, x: x + jnp.sqrt(scale) * jax.random.normal(key, x.shape))
    x = nested(key_a, x)
    jax.random.normal(key_c, (1_000,))
    return {"x": jnp.where(x > 0, x, x * jax.random.uniform(key_b)), "key": key_c, "one": 1.0}


@pytest.mark.slow
def test_draws_are_split_off_without_a_change():
    x, scale = jnp.array([0.3, -0.7, 1.1]), jnp.array(2.0)
    draw, finish, size = split_off_draws(noisy_step, jax.random.key(0), x, scale)
    for seed in range(5):
        key = jax.random.key(seed)
        expected = noisy_step(key, x, scale)
        found = jax.jit(lambda key, x: finish(draw(key), x, scale))(key, x)
        np.testing.assert_array_equal(found["x"], jax.jit(noisy_step)(key, x, scale)["x"])
        assert found["key"] == expected["key"] and found["one"] == 1.0
    # Three normals, one uniform, a key of two words: the thousand that nobody needs are not drawn.
    assert size == 4 * (3 + 1 + 2)
    late = jax.make_jaxpr(finish)(draw(jax.random.key(0)), x, scale).jaxpr
    assert not any("random" in name or "threefry" in name for name in primitives(late))


def test_what_a_step_draws_twice_by_the_same_key_is_drawn_once():
    def twice(key, x):
        noise = lambda: jax.random.normal(jax.random.fold_in(key, 3), x.shape)  # noqa: E731
        other = jax.random.normal(jax.random.fold_in(key, 4), x.shape)
        return x * noise() + jnp.sin(x) * noise() + other

    x = jnp.array([0.3, -0.7])
    draw, finish, size = split_off_draws(twice, jax.random.key(0), x)
    assert size == 4 * (2 + 2)
    found = jax.jit(lambda key, x: finish(draw(key), x))(jax.random.key(1), x)
    np.testing.assert_array_equal(found, jax.jit(twice)(jax.random.key(1), x))


def test_repeats_are_left_out_and_nothing_else():
    def repeated(x, y):
        a, b = jnp.sin(x) * 2.0, jnp.sin(x) * 2.0
        return a + jnp.sin(y), b, jnp.sin(x) * 3.0, jnp.sin(y) * 2.0

    closed = jax.make_jaxpr(repeated)(1.0, 2.0)
    once = without_repeats(closed.jaxpr)
    assert sorted(primitives(closed.jaxpr)) == ["add", "mul", "mul", "mul", "mul", *["sin"] * 5]
    assert sorted(primitives(once)) == ["add", "mul", "mul", "mul", "sin", "sin"]
    for args in ((1.0, 2.0), (0.3, -0.4)):
        np.testing.assert_array_equal(
            jax.core.eval_jaxpr(once, closed.consts, *args),
            jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *args),
        )


def test_a_result_thrown_away_is_not_taken_for_one_that_is_needed():
    def largest(x):
        values, _ = lax.top_k(jnp.sin(x), 2)
        _, indices = lax.top_k(jnp.sin(x), 2)
        return values, indices

    x = jnp.array([0.3, 1.2, -0.4])
    closed = jax.make_jaxpr(largest)(x)
    found = jax.core.eval_jaxpr(without_repeats(closed.jaxpr), closed.consts, x)
    for left, right in zip(found, largest(x), strict=True):
        np.testing.assert_array_equal(left, right)


def test_zeros_keep_their_shape_where_a_number_is_added():
    for fn in (
        lambda h: jnp.sum(h + 1.0),
        lambda h: jnp.sum(jnp.ones(3) * (2.0 * h - 1.0)),
        lambda h: (h.reshape(1, 3) - jnp.arange(3.0).reshape(1, 3)).sum(),
    ):
        np.testing.assert_allclose(at_zero(fn, jnp.ones(3)), fn(jnp.zeros(3)))


@pytest.mark.slow
def test_draws_of_many_steps_at_once_are_those_of_every_step():
    keys = jax.random.split(jax.random.key(1), 50)
    scale = jnp.array(0.1)
    step = lambda key, x: noisy_step(key, x, scale)["x"]  # noqa: E731
    one_by_one, _ = lax.scan(lambda x, key: (step(key, x), None), jnp.zeros(3), keys)
    np.testing.assert_allclose(scan_keys(step, jnp.zeros(3), keys), one_by_one, rtol=1e-6)
    np.testing.assert_array_equal(
        scan_keys(step, jnp.zeros(3), keys[:1]), step(keys[0], jnp.zeros(3))
    )


def test_scan_keys_of_a_step_that_draws_nothing():
    keys = jax.random.split(jax.random.key(1), 5)
    assert scan_keys(lambda key, x: 2.0 * x, jnp.array(1.0), keys) == 32.0


@pytest.mark.slow
def test_scan_keys_can_be_differentiated_in_what_the_step_closes_over():
    keys = jax.random.split(jax.random.key(2), 4)

    def by_scan_keys(rate):
        return scan_keys(lambda key, x: rate * x + jax.random.normal(key), jnp.array(1.0), keys)

    def by_hand(rate):
        x = jnp.array(1.0)
        for key in keys:
            x = rate * x + jax.random.normal(key)
        return x

    for derivative in (jax.grad, jax.jacfwd, lambda f: jax.grad(jax.grad(f))):
        np.testing.assert_allclose(derivative(by_scan_keys)(0.7), derivative(by_hand)(0.7), 1e-5)


def affine(h, W, b, v):
    """Affine in h, through a nested jit; b may be infinite."""
    products = jax.jit(lambda h: jnp.sum((v @ W) * h, -1))(h)
    return -(0.5 * jnp.sum(v**2, -1) - h @ b - products) + jnp.sum(-h / 2.0, -1) - (3.0 - h[:, 0])


def test_at_zero_leaves_out_what_vanishes():
    rng = np.random.default_rng(0)
    W, b, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 4), 4, (5, 2)))
    h = jnp.zeros((5, 4))

    def fn(W, v):
        return at_zero(lambda h: affine(h, W, b, v), h)

    np.testing.assert_allclose(fn(W, v), affine(h, W, b, v), rtol=1e-6)
    names = [eqn.primitive.name for eqn in needed(written_out(fn, W, v)[0].jaxpr)]
    assert "dot_general" not in names and "reduce_sum" in names
    gradient = jax.grad(lambda v: jnp.sum(fn(W, v)))(v)
    np.testing.assert_allclose(gradient, -v, rtol=1e-6)
    assert np.isfinite(at_zero(lambda h: affine(h, W, b * jnp.inf, v), h)).all()


@pytest.mark.parametrize(
    "fn",
    [
        lambda h: jnp.cos(h) + h,
        lambda h: 1.0 - h,
        lambda h: h - 1.0,
        lambda h: jnp.where(h > 0.5, 1.0, 2.0) * h,
        lambda h: {"a": h * 2.0, "b": (h + h, jnp.ones(3))},
        lambda h: jnp.sum(h**2, -1) + jnp.exp(h) / (h + 2.0),
        lambda h: lax.scan(lambda x, y: (x + y, x), jnp.zeros(()), h)[0] + 1.0,
    ],
)
def test_at_zero_is_the_function_at_zeros(fn):
    h = jnp.ones(3)
    jax.tree.map(np.testing.assert_array_equal, at_zero(fn, h), fn(jnp.zeros(3)))


def test_needed_drops_what_no_result_depends_on():
    jaxpr = jax.make_jaxpr(lambda x: (jnp.sin(x), x + 1.0)[1])(1.0).jaxpr
    assert [eqn.primitive.name for eqn in needed(jaxpr)] == ["add"]
