# SPDX-License-Identifier: Apache-2.0
"""The marginal that is chosen, and input that is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from numpyro.infer import Gibbs
from oracles import arrays
from registry.objectives import formulas

import numpyro_ebm as ebm

pytestmark = pytest.mark.usefixtures("x64")

FORMULAS = formulas("real")


def with_site(fn, site):
    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", fn, obs=data)
            h = numpyro.sample("h", site) if site is not None else 0.0
            ebm.energy("E", 0.5 * v**2 + v * h)

    return model


REALS = np.array([0.5, -0.3])


@pytest.mark.parametrize(
    ("latent", "marginal"),
    [
        (None, ebm.Exact),
        (ebm.Counting(), ebm.Enumerated),
        (dist.Categorical(np.array([0.2, 0.8])), ebm.Enumerated),
    ],
)
def test_the_marginal_is_chosen_by_the_latents(latent, marginal):
    model = with_site(ebm.Lebesgue(), latent)
    problem = ebm.ScoreMatching().prepare(
        jax.random.key(0), {}, model, None, (jnp.asarray(REALS),), {}
    )
    assert type(problem.marginal) is marginal


@pytest.mark.parametrize("latent", [ebm.Lebesgue(), dist.Poisson(2.0)])
def test_other_latents_want_a_choice(latent):
    model = with_site(ebm.Lebesgue(), latent)
    message = r"latent site\(s\) 'h'.*VaGES\("
    with pytest.raises(ebm.ModelError, match=message):
        ebm.DenoisingScoreMatching(0.1).loss(jax.random.key(0), {}, model, None, jnp.asarray(REALS))


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("fn", [ebm.Counting(3), dist.Bernoulli(0.5)])
def test_discrete_visibles_are_told_where_to_go(name, fn):
    message = (
        "'v' is discrete. Use PseudoLikelihood, RatioMatching, NCE, EnergyDiscrepancy or "
        "ContrastiveDivergence"
    )
    with pytest.raises(ebm.ModelError, match=message):
        FORMULAS[name].make().loss(
            jax.random.key(0), {}, with_site(fn, None), None, jnp.array([0, 1])
        )


@pytest.mark.parametrize("name", FORMULAS)
def test_latents_without_a_guide_raise(name):
    system = oracles.grbm_system()
    objective = FORMULAS[name].make(ebm.VaGES(3))
    with pytest.raises(ebm.ModelError, match=r"needs a guide q\(h \| v\).*'h'"):
        objective.loss(
            jax.random.key(0), arrays(system.params), system.model, None, jnp.asarray(system.data)
        )


@pytest.mark.parametrize("name", [name for name in FORMULAS if "SM" in name and "D" not in name])
def test_two_particles_are_too_few_for_third_derivatives(name):
    system = oracles.grbm_system()
    with pytest.raises(ebm.ModelError, match=r"order 3.*VaGES\(num_particles=3\)"):
        FORMULAS[name].make(ebm.VaGES(2)).loss(
            jax.random.key(0),
            arrays(system.params),
            system.model,
            system.guide,
            jnp.asarray(system.data),
        )


def with_prior(data):
    theta = numpyro.sample("theta", dist.Gamma(2.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * v**2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ebm.DenoisingScoreMatching(0.0), "`noise_scale` must be positive, got 0.0"),
        (lambda: ebm.DenoisingScoreMatching(-1.0), "must be positive"),
        (lambda: ebm.SlicedScoreMatching(0), "`num_slices` must be a positive integer, got 0"),
        (lambda: ebm.SlicedScoreMatching(1.5), "positive integer"),
        (lambda: ebm.ScoreMatching("exact"), "`marginal` must be a marginal.*'exact'"),
        (lambda: ebm.MultiscaleDenoisingScoreMatching(0.0), "must be positive"),
        (
            lambda: ebm.MultiscaleDenoisingScoreMatching(min_noise_scale=2.0),
            "0 < min_noise_scale <= max_noise_scale, got 2.0 and 1.2",
        ),
        (
            lambda: ebm.MultiscaleDenoisingScoreMatching(spacing="log"),
            "'linear' or 'geometric', got 'log'",
        ),
        (
            lambda: ebm.ScoreMatching().loss(
                jax.random.key(0), {}, oracles.precision, None, jnp.asarray(REALS)
            ),
            r"No value for the parameter\(s\) 'precision'",
        ),
        (
            lambda: ebm.ScoreMatching().loss(
                jax.random.key(0), {}, with_prior, None, jnp.asarray(REALS)
            ),
            "'theta' have a prior and no value",
        ),
        (
            lambda: ebm.ScoreMatching().loss(
                jax.random.key(0), {}, with_site(ebm.Lebesgue(), None), None, None
            ),
            None,
        ),
    ],
)
def test_bad_input(make, message):
    if message is None:
        with pytest.raises((ebm.ModelError, TypeError)):
            make()
        return
    with pytest.raises(ebm.ModelError, match=message):
        make()


def labelled(data, label):
    slope = numpyro.param("slope", jnp.zeros(3))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        numpyro.sample("label", dist.Categorical(logits=v[:, None] * slope), obs=label)
        ebm.energy("E", 0.5 * v**2)


@pytest.mark.slow
def test_visible_labels_are_summed_out_or_have_a_block_of_their_own():
    data, label = jnp.asarray(REALS), jnp.arange(len(REALS)) % 3
    params = {"slope": jnp.ones(3)}

    def loss(kernel):
        objective = ebm.ContrastiveDivergence(kernel)
        return objective.loss(jax.random.key(0), params, labelled, None, data, label)

    blocks = lambda m: Gibbs([(ebm.MALA(m, 0.1), ["v"]), (ebm.BlockGibbs(m), ["label"])])  # noqa: E731
    for kernel in (blocks, lambda model: ebm.MALA(model, step_size=0.1)):
        assert np.isfinite(jax.jit(lambda kernel=kernel: loss(kernel))())
