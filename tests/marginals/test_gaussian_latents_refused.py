# SPDX-License-Identifier: Apache-2.0
"""Latents that are not proved to be Gaussian are refused, and integrals that diverge are NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from marginal_cases import gaussian_latents
from numpyro.distributions import constraints

import numpyro_ebm as ebm
from numpyro_ebm.marginals import choose, exact_marginal
from numpyro_ebm.model.reading import read_model

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
DATA = np.random.default_rng(0).normal(size=(4, 2))
ROWS = np.random.default_rng(2).normal(size=12)


def refused(energy, latent=ebm.Lebesgue):
    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
            h = numpyro.sample("h", latent())
            ebm.energy("E", 0.5 * jnp.sum(v**2, -1) + energy(v[:, 0], h))

    return read_model(model, (jnp.asarray(DATA),))


@jax.custom_jvp
def square(x):
    return x**2


square.defjvp(lambda x, t: (x[0] ** 2, 2.0 * x[0] * t[0]))


@pytest.mark.parametrize(
    ("energy", "latent", "message"),
    [
        (lambda v, h: h**2 + 0.0 * h**4, ebm.Lebesgue, "degree 4"),
        (lambda v, h: jnp.cosh(h), ebm.Lebesgue, "no polynomial"),
        (lambda v, h: jnp.where(h > 0, 1.0, 2.0) * h**2, ebm.Lebesgue, "no polynomial"),
        (lambda v, h: jnp.abs(h - v), ebm.Lebesgue, "no polynomial"),
        (lambda v, h: h**2 * h**v, ebm.Lebesgue, "no polynomial"),
        (lambda v, h: h * v, ebm.Lebesgue, "nothing holds them"),
        (lambda v, h: square(h), ebm.Lebesgue, "custom_jvp"),
        (lambda v, h: h**2, lambda: dist.StudentT(3.0), "no polynomial"),
        (lambda v, h: h**2, lambda: ebm.Lebesgue(support=constraints.positive), "'h'.*Positive"),
        (lambda v, h: h**2, dist.HalfNormal, "'h'"),
    ],
)
def test_what_is_not_proved_to_be_gaussian_is_refused(energy, latent, message):
    row_model = refused(energy, latent)
    with pytest.raises(ebm.ModelError, match=f"{message}.*VaGES"):
        ebm.GaussianLatents().check(row_model, None, 2)
    with pytest.raises(ebm.ModelError, match=f"No exact marginal.*'h'.*{message}"):
        exact_marginal(row_model)
    with pytest.raises(ebm.ModelError, match=r"marginal=VaGES.*guide"):
        choose(row_model)


def test_other_latents_are_refused_too():
    with pytest.raises(ebm.ModelError, match=r"real latent sites.*'h'"):
        grbm = read_model(oracles.grbm, (jnp.asarray(DATA),), {"num_hidden": 3})
        ebm.GaussianLatents().check(grbm, None, 2)
    with pytest.raises(ebm.ModelError, match="real latent sites"):
        ebm.GaussianLatents().check(read_model(oracles.gaussian, (jnp.asarray(DATA),)), None, 2)

    def many(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            s = numpyro.sample("s", ebm.Counting(2, (13,)))
            h = numpyro.sample("h", ebm.Lebesgue())
            ebm.energy("E", 0.5 * (v - h) ** 2 + h * jnp.sum(s, -1) * v)

    with pytest.raises(ebm.ModelError, match="8192 joint states.*max_states=4096"):
        exact_marginal(read_model(many, (ROWS,)))


def test_nothing_is_read_off_the_values_at_hand():
    """A power that happens to be two, and a coefficient that happens to be zero."""

    def model(data, by_power):
        power = numpyro.param("power", 2.0)
        quartic = numpyro.param("quartic", 0.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Lebesgue())
            energy = h**power if by_power else h**2 + quartic * h**4
            ebm.energy("E", 0.5 * v**2 + energy)

    for by_power in (True, False):
        with pytest.raises(ebm.ModelError, match="No exact marginal"):
            exact_marginal(read_model(model, (ROWS, by_power)))


@pytest.mark.parametrize("correlated", [False, True])
def test_a_divergent_integral_is_nan(correlated):
    def model(data):
        curvature = numpyro.param("curvature", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            h = numpyro.sample("h", ebm.Lebesgue((2,)))
            cross = 0.5 * h[:, 0] * h[:, 1] if correlated else 0.0
            bends = h[:, 0] ** 2 + curvature * h[:, 1] ** 2 + cross
            ebm.energy("E", 0.5 * v**2 + bends - h[:, 0] * v + h[:, 1])

    for curvature in (-1.0, 0.0):
        params = {"curvature": jnp.asarray(curvature)}
        assert np.all(np.isnan(gaussian_latents(model, params, ROWS)(params, ROWS)))
        with pytest.raises(ebm.ModelError, match="diverges"):
            ebm.log_likelihood(KEY, ebm.fixed(model, params), ROWS, log_normalizer=0.0)
