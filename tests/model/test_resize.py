# SPDX-License-Identifier: Apache-2.0
"""A model read with another number of rows: the same rows, or none at all."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.special import logsumexp

import numpyro_ebm as ebm
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.model.resize import with_rows
from numpyro_ebm.models import grbm

KEY = jax.random.key(0)
DATA = jax.random.normal(KEY, (4, 2))
MIXING = jnp.array([[1.0, 0.3, -0.2, 0.1], [0.0, 0.8, 0.4, -0.5]])


def declared(energy, data=None):
    """A model of rows of two numbers with this energy; its data are an argument unless given."""

    def model(rows):
        rows = rows if data is None else data
        scale = numpyro.param("scale", jnp.array(1.5), constraint=dist.constraints.positive)
        with numpyro.plate("data", len(rows)):
            v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=rows)
            ebm.energy("E", scale * energy(v))

    return model


def network(v):
    """As many features as there are rows, and a function with a derivative rule of its own."""
    return jnp.sum(jax.nn.softplus(v @ MIXING), -1) + jnp.sum(v**2, -1)


def looped(v):
    def step(x, _):
        return jnp.tanh(x @ MIXING[:, :2]) + x, None

    return logsumexp(jax.jit(lambda v: jax.lax.scan(step, v, length=3)[0])(v), -1) ** 2


def averaged(v):
    weights = np.array([1.0, 0.5], "float32") / len(v)
    return jax.jit(lambda v: jnp.sum(v**2 * weights, -1))(v)


SAME = {
    "quadratic": lambda v: jnp.sum(v**2, -1),
    "network": network,
    "loop": looped,
    "reshaped": lambda v: jnp.sum((2.0 * v.reshape(-1)).reshape(v.shape) ** 4, -1),
}
OTHER = {
    "closes over its rows in a jit": averaged,
    "counts its rows": lambda v: jnp.sum(v**2, -1) / len(v),
    "numbers its rows": lambda v: jnp.sum(v**2, -1) * (1 + jnp.arange(len(v))),
    "has a constant for every row": lambda v: jnp.sum((v - DATA) ** 2, -1),
    "unrolls its rows": lambda v: jnp.stack([jnp.sum(x**2) for x in v]),
    "raises to the number of its rows": lambda v: jnp.sum(v ** len(v), -1),
    "repeats by its rows": lambda v: jnp.sum(
        jax.lax.fori_loop(0, len(v), lambda i, x: 1.1 * x, v) ** 2, -1
    ),
    "counts to twice its rows": lambda v: jnp.sum(v**2, -1) * jnp.arange(2.0 * len(v))[: len(v)],
    "draws for every row": lambda v: jnp.sum((v - jax.random.normal(KEY, v.shape)) ** 2, -1),
    "sums ones over its rows": lambda v: jnp.sum(v**2, -1) * jnp.sum(jnp.ones(len(v))),
    "multiplies ones over its rows": lambda v: (
        jnp.sum(v**2, -1) * (jnp.ones(len(v)) @ jnp.ones(len(v)))
    ),
    "is made for four rows": lambda v: jnp.sum(v**2, -1).reshape(4),
}


@pytest.mark.parametrize("name", SAME)
def test_rows_have_the_density_they_had(name):
    row_model = read_model(declared(SAME[name]), (DATA,))
    other = with_rows(row_model, 7)
    assert (other.num_rows, other.total_rows) == (7, 7)
    rows = jax.random.normal(jax.random.key(1), (7, 2))
    params = {"scale": jnp.array(0.7)}
    expected = [row_model.log_density(params, {"v": rows[i : i + 4]}) for i in (0, 3)]
    expected = np.concatenate([expected[0], expected[1][1:]])
    np.testing.assert_allclose(other.log_density(params, {"v": rows}), expected, rtol=1e-5)


@pytest.mark.parametrize("name", OTHER)
def test_energies_that_depend_on_the_number_of_rows_keep_theirs(name):
    assert with_rows(read_model(declared(OTHER[name]), (DATA,)), 7) is None


def test_rows_that_are_no_argument_stay():
    row_model = read_model(declared(network, data=DATA), (None,))
    assert with_rows(row_model, 7) is None
    assert with_rows(row_model, 4) is row_model


def test_an_argument_that_is_as_long_as_the_data_is_not_taken_for_rows():
    def model(rows, weights):
        with numpyro.plate("data", len(rows)):
            v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=rows)
            ebm.energy("E", jnp.sum((v @ weights.T) ** 2, -1))

    weights = jax.random.normal(jax.random.key(2), (4, 2))
    row_model = read_model(model, (DATA, weights))
    assert not row_model.covariates
    assert with_rows(row_model, 7) is None  # repeating its first row would be another model


def spins(num_rows=4, num_sites=3):
    with numpyro.plate("data", num_rows):
        s = numpyro.sample("s", ebm.Counting(2, (num_sites,)))
        ebm.energy("E", jnp.sum(s, -1) * 0.5)


@pytest.mark.parametrize("num_sites", [3, 4])
def test_a_number_of_rows_may_be_an_argument(num_sites):
    """Another number that is the same is another model."""
    other = with_rows(read_model(spins, (), dict(num_rows=4, num_sites=num_sites)), 1)
    assert (other is None) == (num_sites == 4)
    assert other is None or other.sites["s"].value.shape == (1, 3)


def test_latent_sites_are_resized_along():
    other = with_rows(read_model(grbm, (DATA,)), 9)
    assert {name: site.value.shape for name, site in other.sites.items()} == {
        "v": (9, 2),
        "h": (9, 4),
    }


@pytest.mark.parametrize("data", [None, DATA], ids=["an argument", "closed over"])
def test_maximum_likelihood_with_and_without(data):
    """log Z of the Gaussian: 2 · ½ log(π/scale)."""
    model = declared(SAME["quadratic"], data)

    def loss(scale):
        objective = ebm.MaximumLikelihood(num_nodes=48)
        return objective.loss(jax.random.key(0), {"scale": scale}, model, None, DATA)

    for scale in (0.6, 2.0):
        value, slope = jax.value_and_grad(loss)(jnp.array(scale))
        square = jnp.mean(jnp.sum(DATA**2, -1))
        np.testing.assert_allclose(value, np.log(np.pi / scale) + scale * square, rtol=1e-5)
        np.testing.assert_allclose(slope, square - 1 / scale, rtol=1e-4)
