# SPDX-License-Identifier: Apache-2.0
"""The order of what a round does, its random numbers, and when it stops."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.handlers import scale
from numpyro.infer import Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm.objectives.base import AuxiliaryNetwork, Objective

DATA = jnp.arange(4.0)


def model(data):
    b = numpyro.param("b", jnp.zeros(()))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", ebm.Lebesgue())
        ebm.energy("E", 0.5 * (v - h) ** 2 + 0.5 * h**2 + b * v)


def guide(data):
    loc = numpyro.param("loc", jnp.zeros(()))
    with numpyro.plate("data", len(data)):
        numpyro.sample("h", dist.Normal(loc + 0.5 * ebm.visible("v", data), 1.0))


class OfGuide:
    """A loss of the guide, of its parameter and a key."""

    can_infer_discrete = True

    def __init__(self, loss):
        self.loss_of = loss

    def rows(self, rng_key, params, guide_params, problem):
        return self.loss_of(rng_key, guide_params["loc"]) + jnp.zeros(problem.row_model.num_rows)


class OfParams(Objective):
    """An objective that is a function of the parameters alone."""

    def __init__(self, loss, networks=()):
        super().__init__(ebm.VaGES())
        self.loss_of, self.networks = loss, networks

    def energy_loss(self, rng_key, params, problem):
        return self.loss_of(params)


def noise(rng_key, x):
    """Its gradient is a random number."""
    return x * jax.random.normal(rng_key)


def rounds(objective, num=1, **options):
    """The parameters after one round, for some keys."""
    svi = ebm.EnergySVI(model, guide, optax.sgd(1.0), objective, **options)
    state = svi.init(jax.random.key(3), DATA)
    keys = jax.random.split(jax.random.key(4), num)

    def one(key):
        return svi.get_params(svi.update(state._replace(rng_key=key), DATA)[0])

    return jax.jit(jax.vmap(one))(keys)


def test_the_energy_sees_the_guide_after_its_step():
    objective = OfParams(lambda params: params["b"] * jax.lax.stop_gradient(params["loc"]))
    slope = OfGuide(lambda _, loc: 2.0 * loc)
    found = rounds(objective, guide_loss=slope, guide_optim=optax.sgd(1.0))
    np.testing.assert_allclose([found["loc"][0], found["b"][0]], [-2.0, 2.0])


def test_steps_of_a_round_have_keys_of_their_own():
    """A sum of three standard normal numbers, and not three times the same; of players as well.

    Each by its own optimiser; a player that brings none has the energy's.
    """
    players = [
        AuxiliaryNetwork(
            name,
            lambda rng_key, problem, name=name: {name: (jnp.zeros(()), dist.constraints.real)},
            lambda rng_key, params, own, problem, name=name: noise(rng_key, own[name]),
            optim,
            3,
        )
        for name, optim in (("first", None), ("second", optax.sgd(2.0)))
    ]
    objective = OfParams(lambda params: params["b"], players)
    found = rounds(
        objective, 1_000, guide_loss=OfGuide(noise), guide_optim=optax.sgd(0.5), num_guide_steps=3
    )
    sums = np.stack([2 * found["loc"], found["first"], found["second"] / 2])
    error = 3 * np.sqrt(2 / 1_000)
    np.testing.assert_allclose(np.cov(sums), 3 * np.eye(3), atol=4.5 * error)


class Keeps(OfParams):
    """Keeps what it saw: parameters where its chains moved, before its step and after."""

    has_state = True

    def init_state(self, rng_key, params, problem):
        return jnp.zeros((3, 2))

    def advance(self, rng_key, params, problem, state):
        return problem, state.at[0].set(jnp.stack([params["b"], params["loc"]]))

    def settle(self, rng_key, before, after, problem, state):
        both = [jnp.stack([x["b"], x["loc"]]) for x in (before, after)]
        return jnp.stack([state[0], *both])


def test_what_is_kept_sees_the_parameters_before_the_step_and_after():
    """The guide has taken its own step before."""
    objective = Keeps(lambda params: 5.0 * params["b"])
    options = {"guide_loss": OfGuide(lambda _, loc: 2.0 * loc), "guide_optim": optax.sgd(1.0)}
    svi = ebm.EnergySVI(model, guide, optax.sgd(1.0), objective, **options)
    state, _ = svi.update(svi.init(jax.random.key(3), DATA), DATA)
    np.testing.assert_allclose(state.objective_state, [[0.0, -2.0], [0.0, -2.0], [-5.0, -2.0]])


class Random(OfParams):
    """A loss of the parameters, and of random numbers of its own, of its chains and its batch."""

    has_state = True

    def perturb(self, rng_key, row_model):
        return row_model.unconstrain_visible(), jax.random.normal(rng_key), None

    def init_state(self, rng_key, params, problem):
        return jnp.zeros(())

    def advance(self, rng_key, params, problem, state):
        number = state + jax.random.normal(rng_key)
        return problem._replace(noise=problem.noise + number), number

    def energy_loss(self, rng_key, params, problem):
        assert "scale" not in params and "shift" not in params
        return params["b"] + problem.noise + jax.random.normal(rng_key)


def test_an_evaluation_is_the_loss_of_the_next_round():
    """Whose state it leaves where it is; a draw of parameters is all that a loss knows of q(θ)."""

    def with_prior(data):
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", b * v**2)

    def posterior(data):
        shift, scale = numpyro.param("shift", 0.3), numpyro.param("scale", 2.0)
        numpyro.sample("b", dist.Normal(shift, scale))

    objective = Random(None)
    objective.marginal = None
    svi = ebm.EnergySVI(with_prior, posterior, optax.sgd(0.1), objective)
    state = svi.init(jax.random.key(3), DATA)
    state = svi.update(state, DATA)[0]
    found, (_, expected) = svi.evaluate(state, DATA), svi.update(state, DATA)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found != svi.evaluate(state._replace(step=state.step + 1), DATA)


def test_a_run_starts_where_it_is_told():
    """Parameters of the model, of the guide and of players; the others where they start anyway."""
    players = [
        AuxiliaryNetwork(
            name,
            lambda rng_key, problem, name=name: {name: (jnp.ones(()), dist.constraints.positive)},
            lambda rng_key, params, own, problem: 0.0,
        )
        for name in ("first", "second")
    ]
    svi = ebm.EnergySVI(model, guide, optax.sgd(1.0), OfParams(None, players))
    told = {"b": 2.0, "loc": 3.0, "first": 4.0}
    found = svi.get_params(svi.init(jax.random.key(3), DATA, init_params=told))
    assert {k: round(float(x), 5) for k, x in found.items()} == {**told, "second": 1.0}


OPTIM = optax.sgd(0.2)


@pytest.mark.parametrize(
    "objective",
    [
        ebm.NCE(lambda: None, noise_optim=OPTIM, num_noise_steps=3),
        ebm.SelfNormalized(lambda: None, noise_optim=OPTIM, num_noise_steps=3),
        ebm.FlowContrastive(lambda: None, flow_optim=OPTIM, num_flow_steps=3),
        ebm.FisherDivergence(critic_optim=OPTIM, num_critic_steps=3),
    ],
)
def test_players_have_the_optimiser_and_the_steps_that_are_asked_for(objective):
    (player,) = objective.networks
    assert (player.optim, player.num_steps) == (OPTIM, 3)


def test_a_loss_of_inf_with_a_finite_gradient_stops_the_run():
    objective = OfParams(lambda params: params["b"] + jnp.where(params["b"] < -2.5, jnp.inf, 0.0))
    svi = ebm.EnergySVI(model, guide, optax.sgd(1.0), objective)
    with pytest.warns(ebm.NonFiniteLossWarning, match="step 4 of 10"):
        fit = svi.run(jax.random.key(3), 10, DATA, progress_bar=False)
    assert fit.params["b"] == -3.0 and fit.losses[-1] == np.inf


def test_a_run_weighs_a_prior_as_an_update_does():
    """Against all rows of the plate, of which it takes half at a time by itself."""

    def with_prior(data):
        m = numpyro.sample("m", dist.Normal(0.0, 0.1))
        with numpyro.plate("data", len(data), subsample_size=2) as index:
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data[index])
            ebm.energy("E", 0.5 * (v - m) ** 2)

    svi = ebm.EnergySVI(with_prior, None, optax.sgd(0.1), ebm.ScoreMatching())
    _, expected = jax.jit(svi.update)(svi.init(jax.random.key(3), DATA), DATA)
    fit = svi.run(jax.random.key(3), 1, DATA, progress_bar=False)
    np.testing.assert_allclose(fit.losses[0], expected, rtol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_scale_around_the_guide_of_a_parameter_counts(factor):
    """E_q log q of a normal guide is -log sd + const.: its gradient in log sd is the factor."""

    def with_prior(data):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * (v - m) ** 2)

    def q(data):
        sd = jnp.exp(numpyro.param("log_sd", jnp.array(-1.0)))
        with scale(scale=factor):
            numpyro.sample("m", dist.Normal(0.2, sd))

    svi = ebm.EnergySVI(with_prior, q, optax.sgd(1.0), ebm.ScoreMatching())
    state = svi.init(jax.random.key(3), DATA)

    @jax.jit
    @jax.vmap
    def moved(key):
        return svi.get_params(svi.update(state._replace(rng_key=key), DATA)[0])["log_sd"]

    # The loss is a mean over 4 rows; its terms in sd: 4 rows of sd²/2, of the prior sd²/2.
    expected = -1.0 + (factor - 5.0 * np.exp(-2.0)) / 4
    found = np.asarray(moved(jax.random.split(jax.random.key(5), 4_000)))
    assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(len(found))


def test_the_loss_of_a_guide_is_a_mean_over_rows():
    """Of `Trace_ELBO` in closed form, at the mean of the guide."""
    objective = OfParams(lambda params: params["b"])
    found = rounds(objective, 2_000, guide_loss=Trace_ELBO(), guide_optim=optax.sgd(1.0))["loc"]
    # -E log p + log q has the gradient 2 (loc + v / 2) - v = 0 at loc = 0.
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(2_000)
    np.testing.assert_allclose(np.var(found), 4 / len(DATA), rtol=0.2)


class Counts(ebm.ScoreMatching):
    """Keeps how many rows it was shown at the end of a run."""

    def statistics(self, rng_key, params, problem, state=None):
        return jnp.asarray(problem.row_model.num_rows)

    def review(self, statistics):
        self.seen = int(statistics)


@pytest.mark.parametrize("num_rows, batch_size, expected", [(60, 10, 60), (2_100, 7, 2_048)])
def test_a_run_is_looked_at_with_more_rows_than_a_batch(num_rows, batch_size, expected):
    def model(data):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * (v - mean) ** 2)

    objective, data = Counts(), jnp.linspace(-1.0, 1.0, num_rows)
    svi = ebm.EnergySVI(model, None, optax.sgd(0.1), objective)
    svi.run(jax.random.key(5), 2, data, batch_size=batch_size, progress_bar=False)
    assert objective.seen == expected
