# SPDX-License-Identifier: Apache-2.0
"""Discrete energies in one form: every change of one site from one gradient, against evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from discrete_energies import MEETS_ITSELF, NOT_TAKEN, TAKEN, Energy

from numpyro_ebm.program.multi_affine import multi_affine
from numpyro_ebm.program.state_tables import merged_slots


def rows_of(energy: Energy, num_rows, seed=1):
    values = np.asarray(energy.values)
    index = np.random.default_rng(seed).integers(0, len(values), (num_rows, energy.size))
    return jnp.asarray(values[index])


def form_of(energy, num_rows):
    x, params = rows_of(energy, num_rows), jax.tree.map(jnp.asarray, energy.params)
    fn = lambda p, rows: energy.fn(p, rows["x"])  # noqa: E731
    return multi_affine(fn, params, {"x": x}, {"x": energy.values}, in_pairs=True)


def changes(energy, params, x):
    """log p̃ with one coordinate at another state, (rows, coordinates, states), by evaluation."""

    @jax.jit
    def at(i, value):
        return energy.fn(params, x.at[:, i].set(value))

    here = energy.fn(params, x)
    columns = [[at(i, jnp.asarray(v)) - here for v in energy.values] for i in range(energy.size)]
    return np.moveaxis(np.asarray(columns), -1, 0)


@pytest.mark.parametrize("num_rows", [1, 6])
@pytest.mark.parametrize("name", TAKEN)
def test_one_gradient_is_every_change(x64, name, num_rows):
    energy, x = TAKEN[name], rows_of(TAKEN[name], 6)
    params = jax.tree.map(jnp.asarray, energy.params)
    form = form_of(energy, num_rows)
    assert form is not None and form.is_affine and form.degree <= max(energy.degree, 2)
    indicators = form.indicators(x)

    @jax.jit
    def own(p):
        slopes = jax.grad(lambda X: jnp.sum(form(p, X)))(indicators)
        return form(p, indicators), form.logits(slopes)

    value, logits = own(params)
    np.testing.assert_allclose(value, energy.fn(params, x), atol=1e-10)
    here = np.argmax(np.asarray(x)[..., None] == np.asarray(energy.values), -1)
    found = logits - np.take_along_axis(np.asarray(logits), here[..., None], -1)
    np.testing.assert_allclose(found, changes(energy, params, x), atol=1e-10)


@pytest.mark.parametrize("name", MEETS_ITSELF)
def test_a_site_that_meets_itself_is_found(name):
    form = form_of(MEETS_ITSELF[name], 1)
    assert form is not None and not form.is_affine and form.degree == 2


def test_changes_of_a_site_that_meets_itself():
    """(Σ x)² from 3 to 3, 4 and 5, and a field of ½ beside it."""
    x = jnp.array([[0, 2, 1]])
    for field in (0.0, 0.5):

        def fn(p, rows, field=field):
            x = rows["x"]
            return p * jnp.sum((x @ jnp.ones((3, 3))) * x + field * x, -1)

        form = multi_affine(fn, jnp.array(1.0), {"x": x}, {"x": (0, 1, 2)}, in_pairs=True)
        assert form is not None
        slopes = form.secants(jnp.array(1.0), form.indicators(x))
        assert slopes is not None
        expected = np.array([0.0, 7.0, 16.0]) + field * np.arange(3)
        np.testing.assert_allclose(slopes[0, 0] - slopes[0, 0, 0], expected, atol=1e-4)


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_what_is_not_shown_is_not_taken(name):
    assert form_of(NOT_TAKEN[name], 1) is None


def test_sites_of_two_and_three_values_have_states_of_their_own():
    """A state that a site does not have has no indicator and no probability."""
    rows = {"a": jnp.array([[1, 0]]), "b": jnp.array([[2]])}

    def fn(p, rows):
        return p * (rows["a"][:, 0] + 3 * rows["a"][:, 1]) * (1 + rows["b"][:, 0] ** 2)

    p, values = jnp.array(1.0), {"a": (0, 1), "b": (0, 1, 2)}
    form = multi_affine(fn, p, rows, values)
    assert form is not None and form.is_affine and not form.is_binary
    X = form.indicators(jnp.array([[1, 0, 2]]))
    np.testing.assert_array_equal(X[0], [[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    np.testing.assert_allclose(form(p, X, {}), fn(p, rows), rtol=1e-6)
    logits = form.logits(jax.grad(lambda X: jnp.sum(form(p, X, {})))(X))[0]
    expected = [[0, 5, -jnp.inf], [0, 15, -jnp.inf], [-4, -3, 0]]
    here = logits[jnp.arange(3), jnp.array([0, 0, 2])]
    np.testing.assert_allclose(logits - here[:, None], expected, atol=1e-5)


def test_small_integers_wrap_around_as_they_do():
    """2 · 2 · 100 is 144 in eight bits."""
    x = jnp.asarray([[2, 2], [1, 2]], jnp.uint8)
    fn = lambda p, rows: p * (rows["x"][:, 0] * rows["x"][:, 1] * np.uint8(100))  # noqa: E731
    form = multi_affine(fn, jnp.array(1.0), {"x": x}, {"x": (0, 1, 2)})
    assert form is not None
    found = form(jnp.array(1.0), form.indicators(x))
    np.testing.assert_allclose(found, [144.0, 200.0])


def test_two_slots_of_an_operand_stay_two():
    """Also where no element reads by both, so that they would go into one."""
    free = -1
    pairs, own = np.array([[0, free], [free, 1]]), np.array([[0, 1]])
    for labels in ([pairs, own], [own, pairs]):
        merged, places = merged_slots(labels, (2,))
        for slots, place in zip(labels, places, strict=True):
            assert len(set(place)) == len(slots)
            for slot, i in zip(slots, place, strict=True):
                np.testing.assert_array_equal(np.where(slot < 0, merged[i], slot), merged[i])


GROUPS, MASK = np.array([2, 0, 1]), np.array([[1, 0, 1], [0, 1, 1], [1, 1, 0]], bool)


def by_groups(p, x, g, mask):
    """Fields looked up, pairs that count, and a code of the groups, in a program of all rows."""
    pairs = jnp.where(mask, (x[:, 1:] == x[:, :-1]) * 1.0, 0.3 * x[:, 1:])
    own = jnp.sum(jax.nn.one_hot(x, 3) * p["T"][g], (-1, -2))
    return (
        own + jax.nn.one_hot(g, 3) @ p["c"] * jnp.sum(pairs, -1) + jnp.sum(1.0 * mask, -1) * x[:, 0]
    )


BY_GROUPS = {
    "a cube of some": lambda p, x, g, mask: (g == 2) * jnp.sum(1.0 * x, -1) ** 3,
    "a cube where a mask says so": lambda p, x, g, mask: jnp.where(
        mask[:, 0], jnp.sum(1.0 * x, -1) ** 3, 0.0
    ),
    "a code compared": lambda p, x, g, mask: jnp.where(
        p["c"] == 2.0, jnp.sum(1.0 * x, -1) ** 3, 0.0
    ),
    "a unit by its number": lambda p, x, g, mask: jnp.take_along_axis(x, g[:, None], 1)[:, 0] * 1.0,
}


def in_jit(fn, x):
    """The value and the changes by the form where groups and masks are arguments of a program."""
    p = {"T": RNG.normal(size=(3, 4, 3)), "c": RNG.normal(size=3)}
    p = jax.tree.map(jnp.asarray, p)

    def own(g, mask):
        rows_fn = lambda p, rows: fn(p, rows["x"], g, mask)  # noqa: E731
        form = multi_affine(rows_fn, p, {"x": x}, {"x": (0, 1, 2)})
        if form is None:
            return None
        X = form.indicators(x)
        return form(p, X), form.logits(jax.grad(lambda X: jnp.sum(form(p, X)))(X))

    return p, jax.jit(own)(GROUPS, MASK)


RNG = np.random.default_rng(7)
X_OF_GROUPS = jnp.asarray(RNG.integers(0, 3, (3, 4)))


def test_integers_without_values_are_any(x64):
    p, (value, logits) = in_jit(by_groups, X_OF_GROUPS)
    energy = Energy(lambda p, x: by_groups(p, x, GROUPS, MASK), p)
    np.testing.assert_allclose(value, energy.fn(p, X_OF_GROUPS), atol=1e-10)
    found = logits - np.take_along_axis(np.asarray(logits), np.asarray(X_OF_GROUPS)[..., None], -1)
    np.testing.assert_allclose(found, changes(energy, p, X_OF_GROUPS), atol=1e-10)


@pytest.mark.parametrize("name", BY_GROUPS)
def test_integers_without_values_hide_nothing(name):
    assert in_jit(BY_GROUPS[name], X_OF_GROUPS)[1] is None
