# SPDX-License-Identifier: Apache-2.0
"""Drawing in one call, refinement of particles, ArviZ."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import assert_mean
from numpyro import handlers
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS, DiscreteGibbs, Gibbs
from sampling_cases import bits, run, units

import numpyro_ebm as ebm
from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.model.reading import read_model


@pytest.mark.slow
def test_sample_draws_the_joint_of_visible_and_hidden_units(grbm):
    for model in (grbm.model, grbm.plate_model):
        fixed = ebm.fixed(model, grbm.params)
        draws = ebm.sample(jax.random.key(1), fixed, 4_000, num_chains=100)
        v, h = np.asarray(draws["v"])[:, 0], np.asarray(draws["h"])
        h = h[:, 0] if model is grbm.model else h[:, :, 0]
        assert v.shape == (4_000, 2) and h.shape == (4_000, 3)
        mean, _, hidden = grbm.oracle.moments()
        chains = lambda x: np.reshape(x, (100, 40, *x.shape[1:]))  # noqa: E731
        assert_mean(chains(v), mean)
        assert_mean(chains(h), hidden)
        # E[v h] = E[v E[h | v]]: h belongs to its v.
        expected = np.mean(v[:, :, None] * grbm.oracle.posterior_mean(v)[:, None, :], 0)
        product = v[:, :, None] * h[:, None, :]
        error = product.std(0) / np.sqrt(4_000)
        assert np.all(np.abs(product.mean(0) - expected) < 4.5 * error)


@pytest.mark.slow
@pytest.mark.parametrize("values", [(0, 1, 2), (3, 4, 5)])
def test_sample_draws_event_and_scalar_discrete_sites_together(values):
    low = values[0]

    def mixed(num_rows):
        with numpyro.plate("data", num_rows):
            h = numpyro.sample("h", ebm.Counting(event_shape=(2,)))
            c = numpyro.sample("c", dist.DiscreteUniform(low, low + 2))
            ebm.energy("E", -0.4 * h[:, 0] + 0.2 * c * h[:, 1] - 0.3 * h[:, 0] * h[:, 1] * c)

    states = np.array(np.meshgrid([0, 1], [0, 1], values, indexing="ij")).reshape(3, -1)
    a, b, c = states
    weights = np.exp(0.4 * a - 0.2 * c * b + 0.3 * a * b * c)
    weights = weights / weights.sum()
    draws = ebm.sample(jax.random.key(1), ebm.fixed(mixed, {}), 4_000, num_rows=2)
    assert set(np.unique(draws["c"])) == set(values)
    found = np.concatenate([draws["h"], draws["c"][..., None]], -1).reshape(-1, 3)
    for of in (lambda x: x[0], lambda x: x[1], lambda x: x[2], lambda x: x[0] * x[1] * x[2]):
        x = of(found.T)
        assert abs(x.mean() - weights @ of(states)) < 4.5 * x.std() / np.sqrt(len(x))


@pytest.mark.slow
def test_sample_draws_discrete_models_exactly():
    states = (np.arange(8)[:, None] >> np.arange(3)) & 1
    energy = -states @ [1.0, -1.0, 0.5] - 0.5 * states[:, 0] * states[:, 1]
    probabilities = np.exp(-energy) / np.exp(-energy).sum()
    draws = np.asarray(ebm.sample(jax.random.key(0), ebm.fixed(bits, {}), 8_000)["h"])[:, 0]
    counts = np.bincount(draws @ [1, 2, 4], minlength=8)
    statistic = np.sum((counts - 8_000 * probabilities) ** 2 / (8_000 * probabilities))
    assert statistic < 7 + 4.5 * 14**0.5

    def scalar():
        with numpyro.plate("data", 1):
            a = numpyro.sample("a", ebm.Counting(3))
            b = numpyro.sample("b", ebm.Counting(2))
            ebm.energy("E", -0.7 * a * b)

    draws = ebm.sample(jax.random.key(0), ebm.fixed(scalar, {}), 2_000, num_warmup=50)
    a = np.asarray(draws["a"])[:, 0]
    weights = 1 + np.exp(0.7 * np.arange(3))
    error = a.std() / 2_000**0.5
    assert abs(a.mean() - np.arange(3) @ weights / weights.sum()) < 4.5 * error


@pytest.mark.slow
def test_sample_draws_units_of_both_kinds_beside_each_other():
    """Event dimensions and a hidden plate, which are drawn one after the other."""

    def model():
        with numpyro.plate("data", 2, dim=-1):
            v = numpyro.sample("v", ebm.Lebesgue())
            g = numpyro.sample("g", ebm.Counting(3, (2,)))
            ebm.energy("E", 0.5 * v**2 - jnp.sin(v) * jnp.prod(g, -1))
            with numpyro.plate("units", 2, dim=-2):
                h = numpyro.sample("h", ebm.Counting())
                ebm.energy("E_h", -h * (jnp.cos(v) + 0.5 * jnp.sum(g, -1)))

    draws = ebm.sample(jax.random.key(0), ebm.fixed(model, {}), 4_000, num_chains=100)
    g = np.indices((3, 3)).reshape(2, -1).T
    v = np.asarray(draws["v"])[..., None]
    on = jax.nn.sigmoid(np.cos(v) + 0.5 * g.sum(-1))
    log_weights = np.sin(v) * g.prod(-1) - 2 * np.log1p(-on)
    weights = jax.nn.softmax(log_weights, -1)
    chains = lambda x: np.reshape(x, (100, 40, *x.shape[1:]))  # noqa: E731
    assert_mean(chains(draws["g"].prod(-1) - np.sum(weights * g.prod(-1), -1)), 0.0)
    h = draws["h"][:, 0] * draws["h"][:, 1]
    assert_mean(chains(h - np.sum(weights * on**2, -1)), 0.0)


@pytest.mark.slow
def test_sample_composes_gibbs_where_units_cannot_be_enumerated():
    draws = ebm.sample(
        jax.random.key(0), ebm.fixed(units, {}), 400, num_chains=40, num_warmup=200, num_units=20
    )
    assert draws["h"].shape == (400, 1, 20) and draws["v"].shape == (400, 1)
    v, mean_h = np.asarray(draws["v"])[:, 0], np.asarray(draws["h"]).mean(-1)[:, 0]
    # v | h ~ N((mean h)², 1)
    chains = (v - mean_h**2).reshape(40, 10)
    assert_mean(chains, 0.0, min_ess=50)


@pytest.mark.slow
def test_sample_given_observed_sites_and_a_kernel(grbm):
    fixed = ebm.fixed(grbm.model, grbm.params)
    clamped = handlers.condition(fixed, {"v": jnp.array([[0.5, -1.0]])})
    h = np.asarray(ebm.sample(jax.random.key(0), clamped, 4_000)["h"])[:, 0]
    expected = grbm.oracle.posterior_mean(np.array([[0.5, -1.0]]))[0]
    assert np.all(np.abs(h.mean(0) - expected) < 4.5 * np.sqrt(expected * (1 - expected) / 4_000))
    draws = ebm.sample(jax.random.key(0), fixed, 50, kernel=ebm.ULA(fixed, 0.01), num_warmup=10)
    assert draws["v"].shape == (50, 1, 2) and draws["h"].shape == (50, 1, 3)
    for options in ({"thinning": 0}, {"num_samples": 0}):
        with pytest.raises(ebm.ModelError, match=next(iter(options))):
            ebm.sample(jax.random.key(0), fixed, **{"num_samples": 5, **options})
    with pytest.raises(ebm.ModelError, match="fixed"):
        ebm.sample(jax.random.key(0), grbm.model, 5)


def linear(data):
    w = numpyro.param("w", 1.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", dist.Normal(0.0, 1.0))
        ebm.energy("E", 0.5 * (v - w * h) ** 2)


def shifted(data):
    """A guide one unit off the posterior N(v / 2, 1 / 2) of w = 1."""
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        numpyro.sample("h", dist.Normal(v / 2 + 1.0, 0.5**0.5))


@pytest.mark.parametrize("adjusted", [False, True])
def test_refinement_moves_particles_to_the_posterior(adjusted):
    v = jnp.array([0.5, -1.0])
    row_model = read_model(linear, (v,), {}, {"w": 1.0})
    guide = Guide(shifted, row_model, (v,), {})
    means = []
    for refine in (None, ebm.LangevinRefinement(60, 0.05, adjusted=adjusted)):
        marginal = ebm.VaGES(2_000, refine=refine)
        estimate = marginal.bind(jax.random.key(0), row_model, guide, {"w": 1.0}, {"v": v}, order=1)
        means.append(estimate.score({"v": v})["v"] + v / 2)  # exact score: -v / 2
    assert jnp.all(jnp.abs(means[0]) > 0.9)
    assert jnp.all(jnp.abs(means[1]) < 0.07)


def test_refinement_refuses_what_it_cannot_do(grbm):
    marginal = ebm.VaGES(2, refine=ebm.LangevinRefinement())
    params = {**grbm.params, **grbm.exact_guide_params}
    with pytest.raises(ebm.ModelError, match="'h' is discrete"):
        ebm.DenoisingScoreMatching(0.1, marginal).loss(
            jax.random.key(0), params, grbm.model, grbm.guide, jnp.asarray(grbm.data)
        )
    for options in ({"num_steps": 0}, {"step_size": 0.0}):
        with pytest.raises(ebm.ModelError, match=next(iter(options))):
            ebm.LangevinRefinement(**options)
    with pytest.raises(ebm.ModelError, match="exclude each other"):
        ebm.VaGES(2, importance_weighted=True, refine=ebm.LangevinRefinement())


@pytest.mark.slow
def test_arviz_gets_energies_and_no_likelihood(grbm):
    import arviz as az

    fixed = ebm.fixed(grbm.model, grbm.params)
    mcmc, draws = run(ebm.MALA(fixed), num_chains=3, num_samples=40, num_warmup=40)
    idata = ebm.to_arviz(mcmc)
    groups = {
        str(g).strip("/") for g in (idata.groups() if callable(idata.groups) else idata.groups)
    }
    assert {"posterior", "sample_stats"} <= groups
    assert not {"log_likelihood", "observed_data"} & groups
    assert idata["posterior"]["v"].dims == ("chain", "draw", "data", "v_dim_0")
    energy = -grbm.oracle.log_marginal(draws["v"].reshape(-1, 2)).reshape(3, 40)
    stats = idata["sample_stats"]
    np.testing.assert_allclose(stats["energy"].values, energy, rtol=1e-4)
    assert stats["row_energy"].shape == (3, 40, 1) and stats["diverging"].shape == (3, 40)
    np.testing.assert_allclose(stats["lp"].values, -energy, rtol=1e-4)
    assert "v[0, 0]" in az.summary(idata).index

    row_model = ebm.sample(jax.random.key(0), fixed, 30)
    idata = ebm.to_arviz(row_model, fixed)
    v, h = np.asarray(row_model["v"])[:, 0], np.asarray(row_model["h"])[:, 0]
    expected = -grbm.oracle.log_joint(v, h)
    np.testing.assert_allclose(idata["sample_stats"]["energy"].values[0], expected, rtol=1e-4)
    assert idata["posterior"]["h"].dims == ("chain", "draw", "data", "h_dim_0")


@pytest.mark.slow
def test_arviz_shows_what_was_observed(grbm):
    fixed = ebm.fixed(grbm.model, grbm.params)
    clamped = handlers.condition(fixed, {"h": jnp.ones((1, 3), int)})
    mcmc, _ = run(ebm.MALA(clamped), num_samples=20, num_warmup=20)
    np.testing.assert_array_equal(ebm.to_arviz(mcmc)["observed_data"]["h"].values, np.ones((1, 3)))
    kernel = Gibbs([(NUTS(fixed), ["v"]), (DiscreteGibbs(fixed), ["h"])])
    mcmc, _ = run(kernel, num_samples=20, num_warmup=20)
    assert ebm.to_arviz(mcmc)["sample_stats"]["energy"].shape == (1, 20)
    with pytest.raises(ebm.ModelError, match="arguments of its run.*unknown"):
        ebm.to_arviz(mcmc, unknown=1)
    with pytest.raises(ebm.ModelError, match="has not been run"):
        ebm.to_arviz(MCMC(ebm.MALA(fixed), num_warmup=1, num_samples=1))
    with pytest.raises(ebm.ModelError, match="model of the draws"):
        ebm.to_arviz({"v": jnp.ones((5, 1, 2))})
    with pytest.raises(ebm.ModelError, match="lack the site"):
        ebm.to_arviz({"h": jnp.ones((5, 1, 3), int)}, fixed)


def test_effective_sizes_are_not_an_excuse():
    """The tolerance of `assert_mean` is a standard error: a shifted mean fails it."""
    draws = np.random.default_rng(0).normal(size=(4, 1_000))
    assert effective_sample_size(draws) > 3_000
    assert_mean(draws, 0.0)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_mean(draws, 0.1)
