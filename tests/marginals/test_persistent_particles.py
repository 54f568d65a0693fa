# SPDX-License-Identifier: Apache-2.0
"""Persistent particles: their law, the gradients they give, and that they belong to rows.

Oracles are conjugate: x | z ~ N(z w, s²) under a Gaussian prior of z that an energy tilts, and
v | h ~ Exp(h) under a Gamma prior of h, whose posteriors and marginal likelihoods are known.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from latent_prior_cases import (
    NOISE,
    draw_data,
    latent_prior,
    log_normalizer,
    marginal_likelihood,
    truth,
)
from numpyro.distributions import constraints
from numpyro.handlers import block
from numpyro.infer import SVI
from oracles import assert_unbiased

import numpyro_ebm as ebm
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.objectives.plan import BatchRows

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)


def mala(model):
    return ebm.MALA(model, step_size=0.15)


def prior_chains(model):
    """z by a chain on its prior alone, which x is hidden from; x is drawn given z."""
    return ebm.MALA(block(model, hide=["x"]), step_size=0.3)


def in_rounds(objective, model, params, data, num_rounds, read):
    """What ``read(problem)`` gives in rounds at fixed parameters, rounds leading."""

    def run(key):
        problem = objective.prepare(key, params, model, None, (data,), {})
        row_model, rows = problem.row_model, BatchRows(jnp.arange(len(data)), len(data))
        state = problem.marginal.init_state(key, row_model, params, rows)

        def one(state, key):
            held, state = problem.marginal.advance(key, row_model, params, state, rows)
            return state, read(problem._replace(marginal=held))

        return jax.lax.scan(one, state, jax.random.split(key, num_rounds))[1]

    return jax.jit(run)(KEY)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_marginal_likelihood():
    """∂_θ log p̃(x) = ∂_θ (log p(x) + log Z): averages of rounds, which hardly depend."""
    data, params = draw_data(50), truth()
    marginal = ebm.PersistentParticles(mala, 4, num_steps=5)
    objective = ebm.ContrastiveDivergence(mala, 1, marginal)

    def read(problem):
        def positive(params):
            estimate = objective.estimate(KEY, params, problem)
            return problem.row_model.mean(estimate.log_density(params, problem.unconstrained))

        return jax.grad(positive)(params)

    found = in_rounds(objective, latent_prior, params, data, 1_000, read)
    expected = jax.grad(lambda p: marginal_likelihood(p, data) + log_normalizer(p))(params)
    for name, x in found.items():
        x = np.asarray(x[200:], float).reshape(40, 20, -1).mean(1)  # batches of 20 rounds
        assert_unbiased(x, np.ravel(expected[name]), name)


def rates(v):
    """h ~ Gamma(2, b) by a tilted Lebesgue measure, v | h ~ Exp(h z) with a covariate z."""
    rate = numpyro.param("rate", 1.0, constraint=constraints.positive)
    scale = jnp.linspace(0.5, 2.0, 200)[: len(v)]
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", ebm.Lebesgue(support=constraints.positive))
        v = numpyro.sample("v", ebm.Lebesgue(support=constraints.positive), obs=v)
        ebm.energy("E", rate * h - jnp.log(h) - jnp.log(h * scale) + h * scale * v)


@pytest.mark.slow
def test_particles_of_a_positive_latent_follow_their_rows():
    """200 rows, a covariate in a closure: h | v ~ Gamma(3, rate + z v)."""
    v = jnp.asarray(np.random.default_rng(0).exponential(1.0, 200))
    kernel = partial(ebm.MALA, step_size=0.08)
    marginal = ebm.PersistentParticles(kernel, 8, num_steps=5)
    objective = ebm.ContrastiveDivergence(kernel, 1, marginal)
    params = {"rate": jnp.array(1.5)}
    draws = in_rounds(
        objective, rates, params, v, 400, lambda p: jnp.exp(p.marginal._held["h"]).mean(0)
    )
    mean = np.asarray(draws[100:]).mean(0)  # rows
    beta = 1.5 + np.linspace(0.5, 2.0, 200) * np.asarray(v)
    z = (mean - 3.0 / beta) / (np.sqrt(3.0) / beta / np.sqrt(8 * 300 / 10))
    assert np.abs(z).max() < 5.0 and abs(z.mean()) < 0.3


def test_the_score_is_of_other_particles_than_the_surrogate():
    """Of four, two each, where second derivatives are taken; of all where they are not.

    They are kept in the coordinates of a positive site.
    """

    def model(data):
        scale = numpyro.param("scale", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = jnp.log(numpyro.sample("h", ebm.Lebesgue(support=constraints.positive)))
            ebm.energy("E", 0.5 * scale * (v - h) ** 2 + 0.5 * h**2)

    v, h = jnp.array([0.3, -0.5, 1.0]), jax.random.normal(jax.random.key(2), (4, 3))
    row_model = read_model(model, (v,))
    marginal = ebm.PersistentParticles(partial(ebm.MALA, step_size=0.1), 4)
    marginal._held = {"h": h}
    params = {"scale": jnp.array(1.5)}
    for order, of_score in ((1, h), (2, h[:2])):
        point = {"v": v}
        bound = marginal.bind(jax.random.key(0), row_model, None, params, point, order=order)
        expected = -1.5 * (v - of_score.mean(0))
        np.testing.assert_allclose(bound.score(point)["v"], expected, rtol=1e-5)
    # The second derivative of the surrogate has the variance of the other two.
    second = jax.grad(
        lambda u: jnp.sum(jax.grad(lambda u: jnp.sum(bound.log_density(params, {"v": u})))(u))
    )(v)
    np.testing.assert_allclose(second, -1.5 + 1.5**2 * h[2:].var(0, ddof=1), rtol=1e-4)


def runs_of(objective, data):
    optim = numpyro.optim.Adam(lambda i: 0.1 / (1 + 0.005 * i))
    svi = ebm.EnergySVI(latent_prior, None, optim, objective)
    return lambda num, **options: svi.run(
        jax.random.key(1), num, data, progress_bar=False, **options
    )


@pytest.mark.slow
def test_a_latent_prior_is_learned_with_chains_of_its_prior():
    """Mean, variance and W by CD, no guide: the maximum likelihood estimate in closed form."""
    data = draw_data(1_000)
    marginal = ebm.PersistentParticles(mala, 2, num_steps=3)
    objective = ebm.ContrastiveDivergence(prior_chains, 3, marginal, persistent=True)
    fit = runs_of(objective, data)(1_500, batch_size=100, ema=0.995)

    def step(params, _):
        gradient = jax.grad(marginal_likelihood)(params, data)
        return jax.tree.map(lambda x, g: x + 0.3 * g, params, gradient), None

    best = jax.jit(lambda p: jax.lax.scan(step, p, length=5_000)[0])(truth())
    found = fit.ema_params
    np.testing.assert_allclose(
        found["b"] / (1 + found["a"]), best["b"] / (1 + best["a"]), atol=0.03
    )
    np.testing.assert_allclose(1 / (1 + found["a"]), 1 / (1 + best["a"]), rtol=0.15)
    np.testing.assert_allclose(found["w"], best["w"], atol=0.03)


def ula_variance(precision, step_size):
    """That of Langevin steps without a test on N(m, 1/λ): 1 / (λ (1 - ε λ / 2)); m is right."""
    return 1 / (precision * (1 - step_size * precision / 2))


def particle_gradient(params, x, step_size):
    """∂_θ log p̃(x) as particles of unadjusted steps have it, in closed form."""
    w = jnp.concatenate([jnp.ones(1), params["w"]])
    precision = 1 + params["a"] + w @ w / NOISE**2
    mean, variance = (
        (params["b"] + x @ w / NOISE**2) / precision,
        ula_variance(precision, step_size),
    )
    square = mean**2 + variance
    in_w = (mean[:, None] * x - square[:, None] * w)[:, 1:] / NOISE**2
    return {"a": -jnp.mean(square) / 2, "b": jnp.mean(mean), "w": jnp.mean(in_w, 0)}


ULA_STEP = 0.1  # of a posterior of precision 11.6: its variance is 2.4 times what it should be


@pytest.mark.slow
def test_particle_gradient_descent_has_the_gradient_of_its_biased_posterior():
    data, params = draw_data(50), truth()
    particles = ebm.PersistentParticles(partial(ebm.ULA, step_size=ULA_STEP), 4, num_steps=5)
    objective = ebm.ContrastiveDivergence(mala, 1, particles)

    def read(problem):
        def positive(params):
            estimate = objective.estimate(KEY, params, problem)
            return problem.row_model.mean(estimate.log_density(params, problem.unconstrained))

        return jax.grad(positive)(params)

    found = in_rounds(objective, latent_prior, params, data, 1_000, read)
    expected = particle_gradient(params, data, ULA_STEP)
    exact = jax.grad(lambda p: marginal_likelihood(p, data) + log_normalizer(p))(params)
    for name, limit in particle_gradient(params, data, 1e-6).items():
        np.testing.assert_allclose(limit, exact[name], atol=1e-4)
    assert abs(expected["a"] - exact["a"]) > 0.04
    for name, x in found.items():
        x = np.asarray(x[200:], float).reshape(40, 20, -1).mean(1)
        assert_unbiased(x, np.ravel(expected[name]), name)


@pytest.mark.slow
def test_particle_gradient_descent_ends_where_its_bias_says():
    """Mean, variance and W at the root of the biased gradient, in closed form; no test anywhere."""
    data, step = draw_data(1_000), 0.02
    particles = ebm.PersistentParticles(partial(ebm.ULA, step_size=step), 2, num_steps=3)
    objective = ebm.ContrastiveDivergence(prior_chains, 3, particles, persistent=True)
    fit = runs_of(objective, data)(1_500, batch_size=100, ema=0.995)

    def move(params, _):
        gradient = particle_gradient(params, data, step)
        negative = jax.grad(log_normalizer)(params)
        return {k: x + 0.3 * (gradient[k] - negative[k]) for k, x in params.items()}, None

    best, found = jax.jit(lambda p: jax.lax.scan(move, p, length=5_000)[0])(truth()), fit.ema_params
    mean, variance = (lambda p: p["b"] / (1 + p["a"])), (lambda p: 1 / (1 + p["a"]))
    np.testing.assert_allclose(mean(found), mean(best), atol=0.03)
    np.testing.assert_allclose(variance(found), variance(best), rtol=0.15)
    np.testing.assert_allclose(found["w"], best["w"], atol=0.03)


@pytest.mark.slow
def test_scores_take_one_half_of_the_particles():
    """Score matching of a model that GaussianLatents covers: the same gradient in the mean."""
    data, params = draw_data(20), truth()
    objective = ebm.ScoreMatching(ebm.PersistentParticles(mala, 8, num_steps=10))

    def read(problem):
        return jax.grad(lambda p: objective.energy_loss(KEY, p, problem))(params)

    found = in_rounds(objective, latent_prior, params, data, 800, read)
    exact = ebm.ScoreMatching(ebm.GaussianLatents())
    expected = jax.grad(lambda p: exact.loss(KEY, p, latent_prior, None, data))(params)
    for name, x in found.items():
        x = np.asarray(x[100:], float).reshape(35, 20, -1).mean(1)
        assert_unbiased(x, np.ravel(expected[name]), name)


# What belongs to a row


def test_a_batch_moves_the_particles_of_its_rows():
    """A little, from where they are; and the chains of the rows begin at the first ones."""
    data, batch = draw_data(6), jnp.array([4, 1])
    little = partial(ebm.MALA, step_size=1e-8)
    objective = ebm.ContrastiveDivergence(little, 1, ebm.PersistentParticles(little, 3))

    @jax.jit
    def both(key):
        problem = objective.prepare(key, truth(), latent_prior, None, (data[batch],), {})
        rows, row_model = BatchRows(batch, 6), problem.row_model
        state = problem.marginal.init_state(key, row_model, truth(), rows)
        state = {"z": state["z"] + jnp.arange(6.0)[:, None]}
        held, after = problem.marginal.advance(key, row_model, truth(), state, rows)
        problem, _ = objective.advance(key, truth(), problem._replace(marginal=held), None)
        return state["z"], after["z"], held._held["z"], problem.noise.position["z"]

    before, after, held, chains = both(KEY)
    assert before.shape == (6, 3)
    np.testing.assert_array_equal(
        np.any(before != after, -1), [False, True, False, False, True, False]
    )
    np.testing.assert_array_equal(after[batch].T, held)
    np.testing.assert_allclose(after, before, atol=2e-3)
    assert len(np.unique(before - jnp.arange(6.0)[:, None])) == 6  # of two rows, at the start
    assert len(np.unique(np.round((after - before)[batch], 6))) == 6  # each with its own noise
    np.testing.assert_allclose(chains, held[0], atol=2e-3)


@pytest.mark.slow
def test_particles_resume_bit_for_bit(tmp_path):
    data = draw_data(30)
    objective = 0.5 * ebm.ContrastiveDivergence(mala, 1, PARTICLES, persistent=True)
    run = partial(runs_of(objective, data), batch_size=10)
    whole, first = run(20), run(7)
    ebm.save(tmp_path / "fit", first)
    saved = ebm.load(tmp_path / "fit").state
    second = run(13, init_state=saved)
    np.testing.assert_array_equal(np.concatenate([first.losses, second.losses]), whole.losses)
    for part in ("params", "state"):
        one, other = (getattr(fit, part) for fit in (whole, second))
        one, other = (jax.tree.leaves(x) for x in (one, other))
        for x, y in zip(one, other, strict=True):
            if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                np.testing.assert_array_equal(x, y)
    other = ebm.ContrastiveDivergence(mala, 1, ebm.GaussianLatents(), persistent=True)
    with pytest.raises(ebm.ModelError, match="marginal_state.*does not belong"):
        runs_of(0.5 * other, data)(2, init_state=first.state)


def no_latents(x):
    b = numpyro.param("b", 0.0)
    with numpyro.plate("data", len(x)):
        x = numpyro.sample("x", ebm.Lebesgue(), obs=x)
        ebm.energy("E", 0.5 * x**2 - b * x)


PARTICLES = ebm.PersistentParticles(mala, 2)


@pytest.mark.parametrize(
    ("make", "model", "message"),
    [
        (lambda: ebm.PersistentParticles(mala, 0), None, "num_particles"),
        (
            lambda: ebm.PersistentParticles(ebm.MALA(latent_prior), 1),
            None,
            "`kernel` must be a function",
        ),
        (
            lambda: ebm.ScoreMatching(ebm.PersistentParticles(mala, 5)),
            latent_prior,
            "order 3.*sets of 3 particles",
        ),
        (
            lambda: ebm.EnergyDiscrepancy(1.0, 4, marginal=PARTICLES),
            latent_prior,
            "PersistentParticles has none",
        ),
        (lambda: ebm.NCE(dist.Normal(0, 1), 1, PARTICLES), latent_prior, "derivatives only"),
        (
            lambda: ebm.DenoisingScoreMatching(0.1, ebm.PersistentParticles(mala, 4)),
            latent_prior,
            "adds\\s+noise to the data",
        ),
        (lambda: ebm.ContrastiveDivergence(mala, 1, PARTICLES), no_latents, "latent sites"),
    ],
)
def test_what_particles_cannot_serve_is_refused(make, model, message):
    with pytest.raises(ebm.ModelError, match=f"(?s){message}"):
        objective = make()
        data = draw_data(4) if model is latent_prior else draw_data(4)[:, 0]
        ebm.EnergySVI(model, None, numpyro.optim.Adam(0.1), objective).init(KEY, data)


def test_batches_whose_rows_are_not_known_are_refused():
    objective = ebm.ContrastiveDivergence(mala, 1, PARTICLES)
    svi = ebm.EnergySVI(latent_prior, None, numpyro.optim.Adam(0.1), objective)
    data = draw_data(6)
    with pytest.raises(ebm.ModelError, match="only `EnergySVI.run`.*which rows"):
        svi.init(KEY, data)
    with pytest.raises(ebm.ModelError, match="only `EnergySVI.run`.*which rows"):
        svi.run(KEY, 1, iter([data, data]), progress_bar=False)
    with pytest.raises(ebm.ModelError, match="keeps a state.*EnergySVI"):
        SVI(latent_prior, None, numpyro.optim.Adam(0.1), objective).run(
            KEY, 1, data, progress_bar=False
        )


def test_what_is_hidden_from_chains_integrates_to_one():
    """An energy that reads x, or a flat x, is no part of p(x | z): a chain on z needs them."""

    def reads(x):
        b = numpyro.param("b", 0.0)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            x = numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
            ebm.energy("E", 0.5 * (x - b * z) ** 2)

    def flat(x):
        b = numpyro.param("b", 0.0)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            x = numpyro.sample("x", ebm.Lebesgue(), obs=x)
            ebm.energy("E", 0.5 * (x - b * z) ** 2)

    data = draw_data(4)[:, 0]
    for model, message in ((reads, r"\['E'\] read it"), (flat, r"\['E'\] read it")):
        objective = ebm.ContrastiveDivergence(prior_chains, 1, PARTICLES)
        with pytest.raises(ebm.ModelError, match=f"hides 'x'.*{message}"):
            problem = objective.prepare(KEY, {"b": 0.3}, model, None, (data,), {})
            objective.advance(KEY, {"b": 0.3}, problem, None)
