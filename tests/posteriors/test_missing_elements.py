# SPDX-License-Identifier: Apache-2.0
"""Posteriors where elements of rows are missing: kept in the model, or integrated out."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density

import numpyro_ebm as ebm

MASK = jnp.array([[True, False], [False, True]])
DATA = jnp.array([[0.5, jnp.nan], [jnp.nan, -1.0]])
SCALE = 1.3


def pairs(data, mask):
    scale = numpyro.sample("scale", dist.Gamma(2.0, 1.0))
    rows = numpyro.plate("data", len(data), dim=-1)
    with rows, numpyro.plate("units", 2, dim=-2):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data.T, obs_mask=mask.T)
    with rows:
        ebm.energy("E", 0.5 * scale * (v[0] ** 2 + v[1] ** 2 + (v[0] - v[1]) ** 2))


def log_normalizer(params):
    """One for each row, as the mask tells rows apart; it is the same for all."""
    return jnp.full(2, jnp.log(2 * jnp.pi) - 0.5 * jnp.log(3 * params["scale"] ** 2))


def expected():
    covariance = np.linalg.inv(SCALE * np.array([[2.0, -1.0], [-1.0, 2.0]]))
    prior = dist.Gamma(2.0, 1.0).log_prob(SCALE)
    return prior + sum(
        dist.Normal(0.0, covariance[i, i] ** 0.5).log_prob(x) for i, x in enumerate([0.5, -1.0])
    )


@pytest.mark.usefixtures("x64")
def test_elements_that_stay_in_the_model_integrate_to_what_was_observed():
    model = ebm.normalized(pairs, log_normalizer)

    def density(latent):  # (units, rows)
        values = {"scale": jnp.array(SCALE), "v_unobserved": latent}
        return log_density(model, (DATA, MASK), {}, values)[0]

    grid = np.linspace(-9.0, 9.0, 181)
    points = np.zeros((4, 181, 2, 2))  # two are missing, and nothing reads the others
    for i, at in enumerate(np.ndindex(2, 2)):
        points[i, :, *at] = grid
    found = np.asarray(jax.vmap(density)(points.reshape(-1, 2, 2))).reshape(4, 181)
    here = found[0, 90]
    total = here + np.log(np.trapezoid(np.exp(found - here), grid, axis=1)).sum()
    np.testing.assert_allclose(total, expected(), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_elements_that_are_integrated_out_leave_what_was_observed():
    model = ebm.normalized(pairs, "enumerate", marginal=ebm.GaussianLatents())
    found, _ = log_density(model, (DATA, MASK), {}, {"scale": jnp.array(SCALE)})
    np.testing.assert_allclose(found, expected(), rtol=1e-6)
