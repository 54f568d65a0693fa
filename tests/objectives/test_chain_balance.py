# SPDX-License-Identifier: Apache-2.0
"""Chains of rows: whether they are where the model is, and resets that take them there."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from divergence_cases import KEY, Stay
from oracles import assert_unbiased, jit

import numpyro_ebm as ebm
from numpyro_ebm.objectives.chain_balance import (
    LONG_STEPS,
    LONGEST,
    SHORTEST,
    energy_drop,
    warn_if_not_there,
)
from numpyro_ebm.objectives.persistent_chains import Chains
from numpyro_ebm.objectives.plan import BatchRows

X, WIDTH = jnp.linspace(-1.0, 1.0, 2_000), 0.3
TILT = {"tilt": 3.0}
UPPER = 1 / (1 + np.exp(-3.0))  # the probability of the upper well
MALA = partial(ebm.MALA, step_size=0.02)


def wells(x, data):
    """One well at x + 2 and one at x - 2, the upper one ``tilt`` lower."""
    tilt = numpyro.param("tilt", jnp.array(0.0))
    with numpyro.plate("data", len(data)):
        y = numpyro.sample("y", ebm.Lebesgue(), obs=data)
        away = jnp.minimum((y - x - 2) ** 2, (y - x + 2) ** 2)
        ebm.energy("E", 0.5 * away / WIDTH**2 - jnp.where(y > x, tilt, 0.0))


def positions(upper):
    """A chain of each row, in the upper well with this probability, exact within the wells."""
    key_well, key_noise = jax.random.split(jax.random.key(5))
    well = jnp.where(jax.random.bernoulli(key_well, upper, X.shape), 2.0, -2.0)
    return X + well + WIDTH * jax.random.normal(key_noise, X.shape)


def at_rows(objective, y):
    problem = objective.prepare(KEY, TILT, wells, None, (X, y), {})
    return problem._replace(rows=BatchRows(jnp.arange(len(X)), len(X)))


def found(upper):
    objective = ebm.ContrastiveDivergence(MALA, 5, persistent=True)
    y = positions(upper)
    state = Chains({"y": y}, jnp.array(9), begun=jnp.ones(len(X), bool))
    problem = at_rows(objective, y)
    return objective, jit(lambda: objective.statistics(KEY, TILT, problem, state))()


def test_energies_of_draws_of_the_model_stay():
    objective, (drop, begun) = found(UPPER)
    assert_unbiased(np.asarray(drop, float), 0.0, "drop of energies")
    assert np.std(drop) > 0.5  # they do move
    objective.review((drop, begun))  # a warning would be an error


def test_chains_that_do_not_come_from_well_to_well_are_found():
    """Half of them are in each, where the energies differ by 3: they fall by (p - 1/2) 3 nats."""
    objective, statistics = found(0.5)
    mean, error = np.mean(statistics[0]), np.std(statistics[0]) / len(X) ** 0.5
    expected = 3 * (UPPER - 0.5)
    assert 0.4 * expected < mean < expected + 4 * error
    with pytest.warns(ebm.ConvergenceWarning, match=r"2000 of them fall by .* ± .* nats"):
        objective.review(statistics)


@pytest.mark.parametrize("shift, begun", [(0.0, True), (9.0, False)])
def test_nothing_is_said_without_evidence(shift, begun):
    drop = 0.2 + shift + np.random.default_rng(0).normal(size=400)
    warn_if_not_there(drop, np.full(400, begun))
    warn_if_not_there(0.2 + shift + 0.01 * drop, np.full(400, begun))  # certain, and little
    warn_if_not_there(100 + drop[:15], np.ones(15, bool))


class Up(Stay):
    """One up in every step."""

    def sample(self, state, model_args, model_kwargs):
        return state._replace(z={name: x + 1 for name, x in state.z.items()})


def test_energies_are_compared_after_a_round_and_after_another():
    """Of the rows of the batch; sites of discrete values take no long steps."""

    def model(x, data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Counting(99), obs=data)
            ebm.energy("E", x * v**2)

    x, v, rows = jnp.array([0.1, 0.5, 0.2]), jnp.array([4, 0, 7, 1, 9]), jnp.array([3, 0, 4])
    objective = ebm.ContrastiveDivergence(Up, 2, persistent=True)
    problem = objective.prepare(KEY, {}, model, None, (x, v[rows]), {})
    problem = problem._replace(rows=BatchRows(rows, 5))
    state = Chains({"v": v}, jnp.array(9), begun=jnp.arange(5) > 0)
    drop, begun = objective.statistics(KEY, {}, problem, state)
    np.testing.assert_allclose(drop, x * ((v[rows] + 2.0) ** 2 - (v[rows] + 4.0) ** 2), rtol=1e-5)
    np.testing.assert_array_equal(begun, [True, False, True])


@pytest.mark.parametrize("mean, spread, word", [(0.3, 2.0, None), (-0.3, 0.2, "rise")])
def test_a_change_counts_by_its_own_error(mean, spread, word):
    drop = mean + spread * np.tile([-1.0, 1.0], 200)
    if word is None:  # 0.3 ± 0.1 is none
        return warn_if_not_there(drop, np.ones(400, bool))
    with pytest.warns(ebm.ConvergenceWarning, match=rf"400 of them {word} by 0.3 ± 0.01 nats"):
        warn_if_not_there(drop, np.ones(400, bool))


def test_long_steps_are_of_every_length_and_of_each_site_by_itself():
    """Where the density is flat all are taken: Σ l z s, with log l uniform."""
    num, ends = 4_000, {}
    start = {"x": jnp.full((num, 2), 5.0), "y": jnp.full((num, 2), -3.0), "h": jnp.ones(num)}
    spread = {"x": jnp.full((num, 2), 0.5), "y": jnp.full((num, 2), 3.0)}

    def move(key, position):
        ends.update(position)
        return position

    energy_drop(jax.random.key(7), lambda x: jnp.zeros(num), move, start, spread)
    moved = np.concatenate([(ends["x"] - 5) / 0.5, (ends["y"] + 3) / 3], -1).astype(float)
    square = LONG_STEPS * (LONGEST**2 - SHORTEST**2) / (2 * np.log(LONGEST / SHORTEST))
    products = moved[:, :, None] * moved[:, None]
    assert_unbiased(products.reshape(num, 16), square * np.eye(4).ravel(), "long steps")
    assert np.all(ends["h"] == 1)  # a site without a spread stays


def test_a_run_says_that_the_energy_outran_its_chains():
    def model(x, data):
        place = numpyro.param("place", jnp.array(0.0))
        with numpyro.plate("data", len(data)):
            y = numpyro.sample("y", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * (y - x - place) ** 2)

    x = jnp.linspace(-1.0, 1.0, 60)
    y = x + jax.random.normal(jax.random.key(3), (60,))
    objective = ebm.ContrastiveDivergence(Stay, persistent=True)
    svi = ebm.EnergySVI(model, None, optax.sgd(1e-6), objective)
    run = partial(svi.run, KEY, 4, x, y, batch_size=30, progress_bar=False)
    run()  # a warning would be an error
    with pytest.warns(ebm.ConvergenceWarning, match="one of each row, are not where.*outruns them"):
        run(init_params={"place": jnp.array(8.0)})


def test_adjusted_resets_bring_chains_to_the_model():
    """A kernel that does not move, and all chains in the lower well: shares and places, exact."""
    objective = ebm.ContrastiveDivergence(
        *(Stay, 1),
        **{"persistent": True, "initial": dist.Normal(-1.5, 3.0)},
        **{"reset_probability": 0.9, "adjusted_resets": True},
    )
    y = positions(0.0)
    problem = at_rows(objective, y)

    def run(key):
        def one(state, key):
            return objective.advance(key, TILT, problem, state)[1], None

        state = Chains({"y": y}, jnp.array(0), begun=jnp.ones(len(X), bool))
        return jax.lax.scan(one, state, jax.random.split(key, 150))[0].position["y"]

    away = np.asarray(jit(run)(KEY) - X, float)
    upper = away > 0
    moments = np.stack([upper, away - np.where(upper, 2, -2), (np.abs(away) - 2) ** 2], -1)
    assert_unbiased(moments, np.array([UPPER, 0.0, WIDTH**2]), "adjusted resets")
