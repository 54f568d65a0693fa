# SPDX-License-Identifier: Apache-2.0
"""Bounds of a base distribution that the model itself computes, in compiled programs as well."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

import numpyro_ebm as ebm

KEY = jax.random.key(0)
BOUNDS = {
    "a number": lambda scale: dist.Uniform(-1.0, 1.0).expand([2]),
    "NumPy": lambda scale: dist.Uniform(np.full(2, -1.0), 1.0),
    "made by jnp": lambda scale: dist.Uniform(-jnp.ones(2), 1.0),
    "an index": lambda scale: dist.Uniform(-1.0 - jnp.arange(2), 1.0),
    "of an argument": lambda scale: dist.Uniform(-jnp.abs(scale), scale),
    "truncated": lambda scale: dist.TruncatedNormal(0.0, 1.0, low=-jnp.ones(2), high=jnp.ones(2)),
    "of Lebesgue": lambda scale: ebm.Lebesgue(
        support=dist.constraints.interval(-jnp.ones(2), jnp.ones(2))
    ).expand([2]),
}


def model(data, scale, bounds):
    slope = numpyro.param("slope", jnp.zeros(2))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", bounds(scale).to_event(1), obs=data)
        ebm.energy("E", -v @ slope)


def fit(bounds, data, objective):
    svi = ebm.EnergySVI(model, None, optax.adam(0.01), objective)
    return svi.run(KEY, 3, data, jnp.ones(2), bounds, progress_bar=False)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_fit_reads_bounds_however_they_are_made(name):
    data = jax.random.uniform(KEY, (50, 2), minval=-0.9, maxval=0.9)
    losses = fit(BOUNDS[name], data, ebm.ScoreMatching()).losses
    assert np.all(np.isfinite(losses))
    if name in ("NumPy", "made by jnp"):
        expected = fit(BOUNDS["a number"], data, ebm.ScoreMatching()).losses
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["made by jnp", "of an argument"])
def test_data_outside_of_them_are_refused(name):
    with pytest.raises(ebm.ModelError, match="'v' leave its support.*50 of 50 places"):
        fit(BOUNDS[name], jnp.full((50, 2), 3.0), ebm.ScoreMatching())


@pytest.mark.slow
def test_kernels_move_inside_of_them():
    data = jax.random.uniform(KEY, (50, 2), minval=-0.9, maxval=0.9)
    objective = ebm.ContrastiveDivergence(lambda m: ebm.MALA(m, step_size=0.1))
    assert np.all(np.isfinite(fit(BOUNDS["made by jnp"], data, objective).losses))
