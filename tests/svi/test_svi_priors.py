# SPDX-License-Identifier: Apache-2.0
"""Priors with objectives that have parameters and states of their own; what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Predictive
from numpyro.infer.autoguide import (
    AutoLaplaceApproximation,
    AutoNormal,
)
from prior_cases import (
    DATA,
    KEY,
    M1,
    ROWS,
    N,
    adam,
    by_hand,
    dsm_vages,
    gaussian,
    grbm,
    line,
    train,
)
from scipy import stats

import numpyro_ebm as ebm


def test_noise_contrast_keeps_its_log_normalizer():
    """Half of a round's loss is the prior's, with N = 40; c is trained beside θ."""
    init = {"precision": 3.0, "log_normalizer": 0.5}
    objective = ebm.NCE(dist.Normal(0.0, 1.0), 200)
    svi = ebm.EnergySVI(gaussian, None, optax.sgd(0.1), objective)
    state, loss = jax.jit(svi.update)(svi.init(KEY, DATA, init_params=init), DATA)
    params = svi.get_params(state)
    assert set(params) == set(init)
    assert np.all([abs(params[name] - init[name]) > 1e-4 for name in init])
    # The logistic loss, its expectation over the noise by quadrature.
    ratio = lambda v: -1.5 * v**2 - 0.5 - stats.norm.logpdf(v) - np.log(200)  # noqa: E731
    nodes = np.linspace(-9, 9, 4_001)
    of_noise = np.sum(stats.norm.pdf(nodes) * np.logaddexp(0, ratio(nodes))) * (nodes[1] - nodes[0])
    expected = np.mean(np.logaddexp(0, -ratio(np.asarray(DATA)))) + 200 * of_noise
    expected -= stats.lognorm.logpdf(3.0, 0.4, scale=np.exp(0.5)) / N
    np.testing.assert_allclose(loss, expected, rtol=0.02)


@pytest.mark.parametrize(
    "objective",
    [
        ebm.DenoisingScoreMatching(0.3),
        ebm.KernelSteinDiscrepancy(),
        ebm.ConditionalNCE(0.3),
        ebm.EnergyDiscrepancy(1.0),
        ebm.FisherDivergence(),
    ],
)
def test_objectives_see_a_draw_where_they_see_parameters(objective):
    svi = ebm.EnergySVI(line, by_hand, optax.adam(0.05), objective)
    state = svi.init(KEY, DATA)
    jax.eval_shape(svi.update, state, DATA)
    jax.eval_shape(svi.evaluate, state, DATA)


def location(data):
    theta = numpyro.sample("theta", dist.Normal(-0.5, 0.2))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (v - theta) ** 2)


@pytest.mark.slow
def test_objectives_do_not_see_what_a_draw_was_made_of():
    """Maximum likelihood closes over what is no parameter of the model."""
    train(location, AutoNormal(ebm.prior(location)), ebm.MaximumLikelihood(), num_steps=1)


@pytest.mark.slow
def test_the_posterior_of_bayes_rule():
    """Maximum likelihood, and the mean of a Gaussian: normal prior, normal posterior."""

    loss, guide = ebm.MaximumLikelihood(), AutoNormal(ebm.prior(location))
    _, fit = train(location, guide, loss, num_steps=4_000, optim=adam(0.05, 1_000), batch_size=10)
    precision = 1 / 0.2**2 + N
    mean = (-0.5 / 0.2**2 + N * M1) / precision
    np.testing.assert_allclose(fit.params["theta_auto_loc"], mean, atol=0.1 * precision**-0.5)
    np.testing.assert_allclose(fit.params["theta_auto_scale"], precision**-0.5, rtol=0.1)


@pytest.mark.parametrize(
    "guide", [pytest.param(None, marks=pytest.mark.slow), AutoNormal(ebm.prior(gaussian))]
)
def test_persistent_chains_go_on(guide):
    objective = ebm.ContrastiveDivergence(partial(ebm.MALA, step_size=0.2), persistent=True)
    svi = ebm.EnergySVI(gaussian, guide, optax.adam(0.05), objective)
    update, states = jax.jit(svi.update), [svi.init(KEY, DATA)]
    for _ in range(2):
        states.append(update(states[-1], DATA)[0])
    chains = [jax.tree.leaves(state.objective_state)[0] for state in states]
    assert np.mean(chains[0] != chains[1]) > 0.5 and np.mean(chains[1] != chains[2]) > 0.5


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.warns(ebm.NonFiniteLossWarning, match="step 1 of 3"):
        train(gaussian, num_steps=3, init_params={"precision": -1.0})


def priors(**sites):
    def model(data):
        theta = sum(jnp.sum(numpyro.sample(name, fn)) for name, fn in sites.items())
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * theta * v**2)

    return model


def masked(data):
    with numpyro.handlers.mask(mask=False):
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * v**2)


def moving(data):
    upper = numpyro.sample("upper", dist.LogNormal(0.0, 1.0))
    theta = numpyro.sample("theta", dist.Uniform(0.0, upper))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * v**2)


def subsampled_parameters(data):
    with numpyro.plate("units", 4, subsample_size=2):
        theta = numpyro.sample("theta", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * jnp.sum(theta) * v**2)


REAL = dist.constraints.real


@pytest.mark.parametrize(
    "model, message",
    [
        (priors(theta=dist.ImproperUniform(REAL, (), ())), "prior of 'theta' is improper"),
        (priors(theta=ebm.Lebesgue()), "prior of 'theta' is improper"),
        (masked, "prior of 'theta' is improper"),
        (priors(theta=dist.Poisson(3.0)), "'theta' is discrete"),
        (priors(theta=dist.Delta(3.0)), "'theta' is a point mass.*deterministic"),
        (moving, r"support of 'theta' depends on \['upper'\]"),
        (subsampled_parameters, "'theta' is in the subsampled plate 'units'"),
    ],
)
def test_priors_that_do_not_serve(model, message):
    with pytest.raises(ebm.ModelError, match=message):
        train(model, num_steps=1)


def draws_of(**sites):
    def guide(data):
        for name, fn in sites.items():
            numpyro.sample(name, fn)

    return guide


def inside(data):
    with numpyro.plate("data", len(data)):
        numpyro.sample("a", dist.Normal(0.0, 1.0))


def shared(data):
    loc = numpyro.param("loc", 0.0)
    numpyro.sample("W", dist.Normal(loc, jnp.ones((2, 3))).to_event(2))
    numpyro.sample("c", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        numpyro.sample("h", dist.Bernoulli(logits=v[:, :1] * loc * jnp.ones(3)).to_event(1))


def backwards(data):
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        h = numpyro.sample("h", dist.Bernoulli(logits=v[:, :1] * jnp.ones(3)).to_event(1))
    numpyro.sample("W", dist.Normal(jnp.mean(h), jnp.ones((2, 3))).to_event(2))
    numpyro.sample("c", dist.Normal(jnp.zeros(3), 1.0).to_event(1))


TWO = priors(a=dist.LogNormal(0.0, 1.0), b=dist.LogNormal(0.0, 1.0))
NORMAL = dist.Normal(0.0, 1.0)


@pytest.mark.parametrize(
    "model, guide, message",
    [
        (TWO, draws_of(a=NORMAL), r"draws \['a'\] and not \['b'\]"),
        (TWO, draws_of(a=NORMAL, b=NORMAL, z=NORMAL), r"draws \['z'\] outside"),
        (TWO, draws_of(A=NORMAL), r"draws \['A'\] outside"),
        (TWO, inside, r"\['a'\] inside the data plate"),
        (TWO, draws_of(a=NORMAL, b=dist.Poisson(3.0)), "draws of 'b' are not differentiable"),
        (gaussian, AutoNormal(gaussian), r"AutoNormal\(numpyro_ebm.prior\(model\)\)"),
        (gaussian, AutoLaplaceApproximation(ebm.prior(gaussian)), "would see the prior alone"),
        (grbm, shared, r"depend on the `param` site\(s\) \['loc'\]"),
        (grbm, backwards, r"depends on its draw of \['h'\]"),
    ],
)
def test_guides_that_do_not_serve(model, guide, message):
    data, loss = (ROWS, dsm_vages()) if model is grbm else (DATA, None)
    with pytest.raises(ebm.ModelError, match=message):
        train(model, guide, loss, num_steps=1, data=data)


def test_numpyros_own_svi_points_here():
    svi = SVI(gaussian, lambda data: None, optax.sgd(0.1), ebm.ScoreMatching())
    with pytest.raises(ebm.ModelError, match="'precision' have a prior and no value.*EnergySVI"):
        svi.run(KEY, 1, DATA, progress_bar=False)


def test_num_rows_is_a_number_of_rows():
    for wrong in (0, 1.5):
        with pytest.raises(ebm.ModelError, match="num_rows"):
            ebm.EnergySVI(gaussian, None, optax.sgd(0.1), ebm.ScoreMatching(), num_rows=wrong)


def test_the_prior_is_a_model():
    """Its draws, and its density without a normalizer."""
    draws = Predictive(ebm.prior(gaussian), num_samples=4_000)(KEY, DATA)
    assert set(draws) == {"precision"}
    assert stats.kstest(np.log(draws["precision"]), stats.norm(0.5, 0.4).cdf).pvalue > 1e-3
    density, _ = numpyro.infer.util.log_density(
        ebm.prior(gaussian), (DATA,), {}, {"precision": 1.5}
    )
    expected = stats.lognorm.logpdf(1.5, 0.4, scale=np.exp(0.5))
    np.testing.assert_allclose(density, expected, rtol=1e-5)
