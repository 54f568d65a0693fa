# SPDX-License-Identifier: Apache-2.0
"""Layers of binary units: some are summed state by state, the others in closed form given them.

The oracle sums the joint density over all states of all layers, in NumPy's broadcasting.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints
from oracles import jit

import numpyro_ebm as ebm
from numpyro_ebm.model.reading import read_model

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(8)
PARAMS = {"A": RNG.normal(size=(2, 3)), "B": RNG.normal(size=(3, 2)), "c": RNG.normal(size=2)}
D, GROUP, SCALE = (
    jnp.asarray(RNG.normal(size=(3, 3))),
    jnp.arange(4) % 2,
    jnp.array([0.5, 1.0, 1.5, 2.0]),
)
DATA = jnp.asarray(RNG.uniform(0.2, 1.5, size=(4, 2)))


def bits(num):
    return ebm.Counting(event_shape=(num,))


def two_layers(p, v, g, h):
    return jnp.sum(v @ p["A"] * g, -1) + jnp.sum(g @ p["B"] * h, -1)


CASES = {  # sites, minus the energy, the states that are summed one by one
    "two layers": ({"g": bits(3), "h": bits(2)}, two_layers, 4),
    "the wide layer interacts": (
        {"g": bits(3), "h": bits(2)},
        lambda p, v, g, h: two_layers(p, v, g, h) + g[:, 0] * g[:, 1],
        8,
    ),
    "three layers, the middle one alone": (
        {"f": bits(3), "g": bits(2), "h": bits(3)},
        lambda p, v, f, g, h: two_layers(p, v, f, g) + jnp.sum(h @ p["B"] * g, -1),
        4,
    ),
    "a label above": (
        {"g": bits(3), "h": ebm.Counting(3)},
        lambda p, v, g, h: jnp.sum((v @ p["A"] + D[h]) * g, -1),
        3,
    ),
    "a prior above": (
        {"g": bits(3), "h": dist.Bernoulli(0.3).expand([2]).to_event(1)},
        two_layers,
        4,
    ),
    "groups and a covariate": (
        {"g": bits(3), "h": bits(2)},
        lambda p, v, g, h: SCALE * two_layers(p, v, g, h) + (h @ p["c"]) * GROUP,
        4,
    ),
    "squares, of which nobody knows": (
        {"g": bits(3), "h": bits(2)},
        lambda p, v, g, h: two_layers(p, v, g**2, h**2),
        32,
    ),
}


def model_of(name, data):
    sites, minus_energy, _ = CASES[name]
    params = {key: numpyro.param(key, jnp.asarray(x)) for key, x in PARAMS.items()}
    positive = ebm.Lebesgue(
        event_shape=(2,), support=constraints.independent(constraints.positive, 1)
    )
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", positive, obs=data)
        latent = {key: numpyro.sample(key, fn) for key, fn in sites.items()}
        ebm.energy("E", jnp.sum(v, -1) - minus_energy(params, v, **latent))


def joint_table(name, params, v):
    """The states of every site, and log p̃ of every row at each of them, states leading."""
    sites, minus_energy, _ = CASES[name]
    shapes = [fn.event_shape for fn in sites.values()]
    values = [range(3 if fn.event_shape == () else 2) for fn in sites.values()]
    columns = [
        list(itertools.product(x, repeat=int(np.prod(shape))))
        for x, shape in zip(values, shapes, strict=True)
    ]
    states = {
        key: np.reshape([state[i] for state in itertools.product(*columns)], (-1, *shapes[i]))
        for i, key in enumerate(sites)
    }

    def at(state):
        in_rows = {k: jnp.broadcast_to(x, (len(v), *jnp.shape(x))) for k, x in state.items()}
        prior = sum(
            jnp.sum(fn.log_prob(state[k])) for k, fn in sites.items() if "Counting" not in str(fn)
        )
        return minus_energy(params, v, **in_rows) - jnp.sum(v, -1) + prior

    return states, jax.vmap(at)({k: jnp.asarray(x) for k, x in states.items()})


@pytest.mark.parametrize("name", CASES)
def test_the_sum_over_layers_is_that_over_all_states(name):
    row_model = read_model(partial(model_of, name), (DATA,))
    marginal = ebm.Enumerated()
    assert marginal.num_states(row_model) == CASES[name][2]

    def both(log_density):
        def total(params, v):
            return jnp.sum(jnp.arange(1.0, 5.0) * log_density(params, v))

        return jax.value_and_grad(total, (0, 1))

    found = jit(both(lambda p, v: marginal.log_density(row_model, p, {"v": v})))
    expected = jit(both(lambda p, v: logsumexp(joint_table(name, p, v)[1], 0)))
    params = jax.tree.map(jnp.asarray, PARAMS)
    for x, y in zip(*(jax.tree.leaves(f(params, DATA)) for f in (found, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two layers", "a label above"])
def test_draws_of_layers_follow_their_joint_law(name):
    row_model, num = read_model(partial(model_of, name), (DATA,)), 20_000
    values = {"v": jnp.broadcast_to(DATA, (num, 4, 2))}
    draws = ebm.Enumerated().draw(jax.random.key(0), row_model, PARAMS, values, num)
    states, table = joint_table(name, PARAMS, DATA)
    law = np.exp(table - logsumexp(table, 0))  # (states, rows)
    flat = lambda x, lead: np.concatenate([np.reshape(x[k], (*lead, -1)) for k in states], -1)  # noqa: E731
    drawn, listed = flat(draws, (num, 4)), flat(states, (len(law),))
    share = np.stack([np.all(drawn == state, -1).mean(0) for state in listed])
    z = (share - law) / np.sqrt(law * (1 - law) / num)
    assert np.abs(z).max() < 4.5
    assert np.abs(np.mean(z**2) - 1) < 4 * np.sqrt(2 / z.size)


def test_a_deep_boltzmann_machine_of_many_units():
    """2^103 states of the latents: eight of them are summed, and thrice a hundred are not."""
    A, B = RNG.normal(size=(2, 100)), RNG.normal(size=(100, 3))

    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
            g, h = numpyro.sample("g", bits(100)), numpyro.sample("h", bits(3))
            W = numpyro.param("W", jnp.asarray(A))
            ebm.energy("E", 0.5 * jnp.sum(v**2, -1) - jnp.sum(v @ W * g + h @ B.T * g, -1))

    v = np.asarray(DATA)
    fields = v @ A + (np.array(list(itertools.product([0, 1], repeat=3))) @ B.T)[:, None]
    expected = logsumexp(np.logaddexp(0, fields).sum(-1), 0) - 0.5 * np.sum(v**2, -1)
    row_model = read_model(model, (DATA,))
    found = ebm.Enumerated().log_density(row_model, {"W": A}, {"v": DATA})
    np.testing.assert_allclose(found, expected, rtol=1e-10)
