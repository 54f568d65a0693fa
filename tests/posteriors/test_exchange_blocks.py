# SPDX-License-Identifier: Apache-2.0
"""The exchange kernel as a block of Gibbs, and rows with parameters of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from exchange_cases import (
    BITS,
    GROUPS,
    NUM_GROUPS,
    NUM_UNITS,
    assert_posterior,
    chains,
    pairs,
    pairs_posterior,
    run,
)
from numpyro.infer import NUTS, Gibbs
from scipy import stats
from scipy.special import logsumexp

import numpyro_ebm as ebm


def hierarchy(data):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.Gamma(10.0, 20.0))
    with numpyro.plate("groups", len(data)):
        level = numpyro.sample("level", dist.Normal(mu, tau))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((NUM_UNITS,)), obs=data)
        ebm.energy("E", 0.5 * jnp.exp(level) * jnp.sum(v**2, -1))


def group_rows(rng_key, params):
    noise = jax.random.normal(rng_key, (NUM_GROUPS, NUM_UNITS))
    return {"v": noise * jnp.exp(-0.5 * params["level"])[:, None]}


def hierarchy_moments():
    """Posterior means and sds, on a grid of τ, everything else in closed form or on grids."""
    mu, tau = np.linspace(-2, 2.5, 91), np.linspace(0.02, 2.0, 100)
    z = np.linspace(-2.5, 3.5, 401)
    squares = np.sum(GROUPS**2, -1)
    rows = 0.5 * NUM_UNITS * z - 0.5 * np.exp(z) * squares[:, None]  # (groups, z)
    prior = stats.norm(mu[:, None, None], tau[:, None]).logpdf(z)  # (mu, tau, z)
    log_z = logsumexp(prior[None] + rows[:, None, None], axis=-1)  # (groups, mu, tau)
    row_model = (
        log_z.sum(0) + stats.norm.logpdf(mu)[:, None] + stats.gamma(10, scale=1 / 20).logpdf(tau)
    )
    weights = np.exp(row_model - row_model.max())
    weights /= weights.sum()
    inside = np.exp(prior[None] + rows[:, None, None] - log_z[..., None])
    first, second = (np.einsum("mt,gmtz,z->g", weights, inside, z**power) for power in (1, 2))
    moments = {"level": (first, np.sqrt(second - first**2))}
    for name, values in (("mu", mu[:, None]), ("tau", tau)):
        mean = np.sum(weights * values)
        moments[name] = mean, np.sqrt(np.sum(weights * (values - mean) ** 2))
    return moments


@pytest.mark.slow
def test_a_hierarchy_with_nuts_above_has_the_exact_posterior():
    model = ebm.given(hierarchy, ["level"])
    exchange_block = ebm.Exchange(model, group_rows, by_row=True)
    kernel = Gibbs([(exchange_block, ["level"]), (NUTS(model), ["mu", "tau"])])
    mcmc = run(
        kernel,
        jnp.asarray(GROUPS),
        num_warmup=400,
        num_samples=3_000,
        fields=("block_states.0.auxiliary", "block_states.0.accept_prob"),
    )
    draws = mcmc.get_samples(group_by_chain=True)
    for name, (mean, sd) in hierarchy_moments().items():
        assert_posterior(np.asarray(draws[name], float), mean, sd)
    accept = mcmc.get_extra_fields()["block_states.0.accept_prob"]
    assert accept.shape[1:] == (NUM_GROUPS,)
    assert ebm.auxiliary_adequacy(mcmc).is_adequate


def test_rows_with_parameters_of_their_own_accept_on_their_own():
    def independent(data):
        with numpyro.plate("groups", len(data)):
            rate = numpyro.sample("rate", dist.Gamma(3.0, 2.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((NUM_UNITS,)), obs=data)
            ebm.energy("E", 0.5 * rate * jnp.sum(v**2, -1))

    kernel = ebm.Exchange(independent, ebm.BlockGibbs, 1, by_row=True, proposal="langevin")
    draws, state, _ = chains(kernel, (jnp.asarray(GROUPS),), 500, num_warmup=300)
    assert state.accept_prob.shape == (20, NUM_GROUPS)
    shape, rate = 3 + NUM_UNITS / 2, 2 + 0.5 * np.sum(GROUPS**2, -1)
    assert_posterior(draws["rate"], shape / rate, np.sqrt(shape) / rate)


@pytest.mark.slow
def test_latents_drawn_by_another_block():
    """The hidden bit drawn beside Exchange, which then sees it: the same posterior."""
    model = ebm.given(pairs, ["w"])
    kernel = Gibbs(
        [(ebm.Exchange(model, ebm.BlockGibbs, 10), ["w"]), (ebm.BlockGibbs(model), None)]
    )
    mcmc = run(kernel, jnp.asarray(BITS), num_samples=8_000, num_warmup=300)
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["w"], float)
    assert_posterior(draws, *pairs_posterior(BITS))


def test_given_answers_only_where_it_may():
    data = jnp.asarray(GROUPS)
    model = ebm.given(hierarchy, ["level"])
    values = {"mu": 0.1, "tau": 0.4, "level": jnp.zeros(NUM_GROUPS)}
    with pytest.raises(ebm.UnhandledEnergyError):
        numpyro.infer.util.log_density(model, (data,), {}, values)
    held = numpyro.handlers.condition(model, {"level": values["level"]})
    log_density, _ = numpyro.infer.util.log_density(held, (data,), {}, values)
    expected = stats.norm.logpdf(0.1) + stats.gamma(10, scale=1 / 20).logpdf(0.4)
    expected += NUM_GROUPS * stats.norm(0.1, 0.4).logpdf(0.0) - 0.5 * np.sum(GROUPS**2)
    assert log_density == pytest.approx(expected, rel=1e-5)

    def past(data):  # μ reaches the energy past the level as well
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        level = numpyro.sample("level", dist.Normal(mu, 1.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((NUM_UNITS,)), obs=data)
            ebm.energy("E", 0.5 * jnp.exp(level) * jnp.sum((v - mu) ** 2, -1))

    held = numpyro.handlers.condition(ebm.given(past, ["level"]), {"level": 0.0})
    with pytest.raises(ebm.ModelError, match="'E' depends on 'mu' as well"):
        numpyro.infer.util.log_density(held, (data,), {}, {"mu": 0.0})
    with pytest.raises(ebm.ModelError, match="sequence of names"):
        ebm.given(past, "level")
