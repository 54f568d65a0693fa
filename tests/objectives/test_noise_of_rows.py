# SPDX-License-Identifier: Apache-2.0
"""A noise that reads covariates is one of each row; one that reads the row is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from contrast_cases import arrays, normal_grid
from jax.nn import softplus
from oracles import assert_unbiased, draws, flat

import numpyro_ebm as ebm

KEY = jax.random.key(0)
X, V = np.array([-1.0, 0.3, 0.8, 2.0]), np.array([-0.4, 0.1, 1.2, 1.0])
PARAMS = {"w": 0.6, "t": 1.3}
SPREAD = 1.7  # of the noise


def regression(x, v):
    w, t = numpyro.param("w", 0.0), numpyro.param("t", 1.0)
    with numpyro.plate("data", len(x)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
        ebm.energy("E", 0.5 * t * (v - w * x) ** 2)


def returned(x, v):
    return dist.Normal(0.5 * x, SPREAD)


def by_site(x, v):
    return {"v": dist.Normal(0.5 * x, SPREAD)}


def sampled(x, v):
    with numpyro.plate("data", len(x)):
        numpyro.sample("v", dist.Normal(0.5 * x, SPREAD))


def tilted(x, v):
    return dist.TransformedDistribution(
        dist.Normal(jnp.zeros(len(x)), 1.0), dist.transforms.AffineTransform(0.5 * x, SPREAD)
    )


def of_all_rows(x, v):
    """A statistic of all rows is no value of the row."""
    return dist.Normal(0.5 * x + 0.0 * v.mean(), SPREAD)


NOISES = {f.__name__: f for f in (returned, by_site, sampled, tilted, of_all_rows)}


def ranking(p):
    """The row against one draw of its own noise, by quadrature."""
    grid, weights = normal_grid(1, 40)
    draw = 0.5 * X[:, None] + SPREAD * grid[:, 0]

    def log_ratio(v):
        x = X if v.ndim == 1 else X[:, None]
        log_noise = -0.5 * ((v - 0.5 * x) / SPREAD) ** 2
        return -0.5 * p["t"] * (v - p["w"] * x) ** 2 - log_noise

    here = log_ratio(jnp.asarray(V))
    return jnp.mean(softplus(log_ratio(jnp.asarray(draw)) - here[:, None]) @ weights)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x != "returned")) for x in NOISES]
)
def test_every_row_is_ranked_among_draws_of_its_own_noise(name):
    objective, params = ebm.RankingNCE(NOISES[name], 1), arrays(PARAMS)
    data = jnp.asarray(X), jnp.asarray(V)

    def one(key):
        loss = lambda p: objective.loss(key, p, regression, None, *data)  # noqa: E731
        return jax.value_and_grad(loss)(params)

    samples = draws(one, jax.random.key(1), 4_000)
    assert_unbiased(samples, flat(jax.value_and_grad(ranking)(params)), name)


def plane(x, v):
    w = numpyro.param("w", jnp.zeros((2, 2)))
    with numpyro.plate("data", len(x)):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=v)
        ebm.energy("E", 0.5 * jnp.sum((v - x @ w) ** 2, -1))


@pytest.mark.slow
def test_coordinates_and_batches():
    x = jax.random.normal(KEY, (40, 2))
    noise = lambda x, v: dist.Normal(x, 1.0).to_event(1)  # noqa: E731
    svi = ebm.EnergySVI(plane, None, optax.adam(0.01), ebm.RankingNCE(noise, 4))
    fit = svi.run(KEY, 2, x, x + 1.0, batch_size=10, progress_bar=False)
    assert np.all(np.isfinite(fit.losses))


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (lambda x, v: dist.Normal(v, 1.0), "noise of a row reads the values of 'v' in that very"),
        (lambda x, v: dist.Normal(0.5 * v + x, 1.0), "reads the values of 'v'"),
        (lambda x, v: {"v": dist.Normal(x, jnp.abs(v))}, "reads the values of 'v'"),
        (lambda x, v: dist.Normal(x[:, None], 1.0), r"batch shape \(4, 1\), and the rows.*\(4,\)"),
        (lambda x, v: dist.Normal(jnp.zeros(3), 1.0), r"batch shape \(3,\), and the rows"),
    ],
)
@pytest.mark.parametrize("kind", [ebm.RankingNCE, pytest.param(ebm.NCE, marks=pytest.mark.slow)])
def test_what_is_no_noise_of_a_row_is_refused(kind, noise, message):
    params = {**arrays(PARAMS), "log_normalizer": jnp.array(0.0)}
    model = regression
    if kind is ebm.NCE:  # which learns one log Z for all rows

        def model(x, v):
            t = numpyro.param("t", 1.0)
            with numpyro.plate("data", len(x)):
                ebm.energy("E", 0.5 * t * numpyro.sample("v", ebm.Lebesgue(), obs=v) ** 2)

    with pytest.raises(ebm.ModelError, match=message):
        kind(noise).loss(KEY, params, model, None, jnp.asarray(X), jnp.asarray(V))
