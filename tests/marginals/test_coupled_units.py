# SPDX-License-Identifier: Apache-2.0
"""Units of a plate that read one another are summed jointly, or refused; others factorise.

The oracle is a sum over all states, written out.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from oracles.values import Values
from scipy.special import logsumexp

import numpyro_ebm as ebm
from numpyro_ebm.model.reading import read_model

pytestmark = pytest.mark.usefixtures("x64")

N = 3
W = np.array([0.5, -1.0, 2.0])
TABLE = np.array([[0.3, 1.0, -0.4], [2.0, -1.0, 0.6], [0.1, 0.7, 0.2]])
MIX = np.array([[0.2, 0.5, -0.3], [1.0, 0.1, 0.4], [-0.6, 0.3, 0.0]])
DATA = np.array([0.3, -1.2])
KEY = jax.random.key(0)

# Terms of h, of shape (units, rows), inside of the plate; in NumPy as well.
COUPLED = {
    "roll": lambda h: h * jnp.roll(h, 1, axis=-2),
    "cumsum": lambda h: h * jnp.cumsum(h, axis=-2),
    "mean": lambda h: h * jnp.mean(h, axis=-2, keepdims=True),
    "flipped": lambda h: h * h[..., ::-1, :],
    "gathered": lambda h: h * h[..., jnp.array([2, 0, 0]), :],
    "matrix product": lambda h: h * (MIX @ h),
    "einsum": lambda h: jnp.einsum("ij,...jn->...in", jnp.asarray(MIX), h) * h,
    "sorted": lambda h: jnp.sort(h, axis=-2) * W[:, None],
    "neighbours by a pad": lambda h: h * jnp.pad(h[..., 1:, :], [(0, 1), (0, 0)]),
    "a maximum": lambda h: h * jnp.max(h, axis=-2, keepdims=True),
    "a loop": lambda h: jax.lax.scan(lambda c, x: (c + x, c * x), jnp.zeros_like(h[0]), h)[1],
    "one of them": lambda h: h * h[..., :1, :],
    "transposed": lambda h: h * jnp.flip(jnp.swapaxes(h, -1, -2), -1).swapaxes(-1, -2),
    "reshaped": lambda h: h * jnp.roll(h.reshape(-1), h.shape[-1]).reshape(h.shape),
}
APART = {
    "weights": lambda h: W[:, None] * h,
    "square": lambda h: (h - 0.3) ** 2,
    "table": lambda h: jnp.asarray(TABLE)[jnp.arange(N)[:, None], h.astype(int)],
    "where": lambda h: jnp.where(h == 1, W[:, None], 0.2 * h),
    "one-hot": lambda h: jnp.sum(jax.nn.one_hot(h.astype(int), 3) * TABLE[:, None], -1),
    "transposed and back": lambda h: jnp.sin(h.T).T,
    "concatenated along the rows": lambda h: jnp.concatenate([h[:, :1], h[:, 1:]], 1) * 0.7,
    "reshaped and back": lambda h: jnp.reshape(h, (N, 1, -1))[:, 0] ** 2,
    "weights on the last axis": lambda h: (h.T * W).T,
    "vmap": lambda h: jax.vmap(lambda x, w: w * x**2)(h, jnp.asarray(W)),
    "moved axes": lambda h: jnp.moveaxis(jnp.moveaxis(h, 0, -1) * W - 0.2, -1, 0),
    "reversed weights": lambda h: W[::-1][:, None] * h,
}


def model(data, term, values=(0, 1), num_units=N):
    strength = numpyro.param("strength", 1.3)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E0", 0.5 * v**2)
        with numpyro.plate("units", num_units, dim=-2):
            h = numpyro.sample("h", Values(*values))
            ebm.energy("E", -(0.4 * v * h + strength * term(1.0 * h)))


def brute_force(term, values, strength=1.3):
    """log p̃(v) of every row, and the mean of h_0 given v."""
    states = np.array(list(itertools.product(values, repeat=N)))  # (states, units)
    terms = np.array([np.sum(term(jnp.asarray(h, float)[:, None])) for h in states])
    log_p = [0.4 * v * states.sum(1) + strength * terms - N * np.log(len(values)) for v in DATA]
    means = [np.exp(x - logsumexp(x)) @ states[:, 0] for x in log_p]
    return np.array([logsumexp(x) for x in log_p]) - 0.5 * np.asarray(DATA) ** 2, np.array(means)


def read(*args):
    row_model = read_model(model, args)
    marginal = ebm.Enumerated()
    marginal.check(row_model, None, 1)
    return row_model, marginal


CASES = [
    *((name, values) for name in [*COUPLED, *APART] for values in [(0, 1), (-1, 2)]),
    *((name, (0, 1, 2)) for name in APART),  # as many values as units
]


@pytest.mark.parametrize("name, values", CASES)
def test_units_are_summed_as_their_terms_couple_them(name, values):
    term = {**COUPLED, **APART}[name]
    if name in ("table", "one-hot") and min(values) < 0:
        return
    row_model, marginal = read(DATA, term, values)
    found = marginal.log_density(row_model, row_model.parameters, row_model.visible_values)
    np.testing.assert_allclose(found, brute_force(term, values)[0], rtol=1e-10)
    assert marginal.num_states(row_model) == (len(values) ** N if name in COUPLED else 1)


@pytest.mark.parametrize("name", ["roll", "table"])
def test_draws_of_units_follow_the_joint_law(name):
    term = {**COUPLED, **APART}[name]
    row_model, marginal = read(DATA, term)
    values = {"v": jnp.broadcast_to(DATA, (4_000, 2))}
    draws = marginal.draw(KEY, row_model, row_model.parameters, values, 4_000)["h"]
    assert draws.shape == (4_000, N, 2)
    np.testing.assert_allclose(draws[:, 0].mean(0), brute_force(term, (0, 1))[1], atol=0.035)


def test_the_gradient_of_a_joint_sum():
    row_model, marginal = read(DATA, COUPLED["cumsum"])

    def of(strength):
        return jnp.sum(marginal.log_density(row_model, {"strength": strength}, {"v": DATA}))

    low, high = (brute_force(COUPLED["cumsum"], (0, 1), 1.3 + x)[0].sum() for x in (-1e-4, 1e-4))
    np.testing.assert_allclose(jax.grad(of)(1.3), (high - low) / 2e-4, rtol=1e-6)


def test_many_coupled_units_are_refused_and_many_others_served():
    served = read(DATA, lambda h: h**2, (0, 1), 100)
    assert np.all(np.isfinite(served[1].log_density(served[0], {"strength": 1.0}, {"v": DATA})))
    with pytest.raises(ebm.ModelError, match=r"'E' may couple the units of the plate 'units'"):
        read(DATA, COUPLED["roll"], (0, 1), 100)


def two_sites(data):
    """Spins on a ring beside units of their own, in nested plates, and one site above all."""
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        z = numpyro.sample("z", ebm.Counting())
        ebm.energy("E0", 0.5 * v**2 - 0.3 * z * v)
        with numpyro.plate("units", N, dim=-2):
            s = numpyro.sample("s", Values(-1, 1))
            g = numpyro.sample("g", ebm.Counting(3))
            ebm.energy("ring", -0.4 * s * jnp.roll(s, 1, axis=-2) - 0.2 * s * z)
            ebm.energy("own", -0.7 * s * g + 0.1 * g * v)
            with numpyro.plate("inner", 2, dim=-3):
                t = numpyro.sample("t", ebm.Counting())
                ebm.energy("deep", -0.5 * t * g - 0.2 * t * jnp.flip(t, -3) * s)


@pytest.mark.slow
def test_coupled_and_independent_sites_side_by_side():
    row_model = read_model(two_sites, (DATA,))
    marginal = ebm.Enumerated()
    marginal.check(row_model, None, 1)
    assert marginal.num_states(row_model) == 2**N * 4**N  # of s and t; g and z factorise
    found = marginal.log_density(row_model, {}, row_model.visible_values)
    for v, value in zip(np.asarray(DATA), found, strict=True):
        over_z = []
        for z in (0, 1):
            over_s = []
            for s in map(np.array, itertools.product((-1, 1), repeat=N)):
                total = 0.4 * np.sum(s * np.roll(s, 1)) + 0.2 * z * s.sum() - N * np.log(2)
                for unit in s:
                    terms = [
                        0.7 * unit * g - 0.1 * g * v + 0.5 * (t + u) * g + 0.2 * 2 * t * u * unit
                        for g in range(3)
                        for t in (0, 1)
                        for u in (0, 1)
                    ]
                    total += logsumexp(terms)
                over_s.append(total)
            over_z.append(logsumexp(over_s) + 0.3 * z * v)
        np.testing.assert_allclose(value, logsumexp(over_z) - 0.5 * v**2, rtol=1e-10)
