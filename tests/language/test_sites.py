# SPDX-License-Identifier: Apache-2.0
"""Questions on the sites of a trace, whatever wraps their distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.handlers import mask, scale, seed, trace

import numpyro_ebm as ebm
from numpyro_ebm.language.sites import (
    is_energy,
    layers,
    log_prob_of,
    masks_of,
    plates_of,
    unwrap,
    without_masks,
)
from numpyro_ebm.model.reading import read_model


def test_sites_of_a_wrapped_model():
    def model():
        numpyro.param("theta", 1.0)
        with numpyro.plate("data", 3, dim=-2), numpyro.plate("units", 2):
            h = numpyro.sample("h", ebm.Counting())
            with mask(mask=jnp.ones((3, 2), bool)), scale(scale=0.5):
                ebm.energy("E", 1.0 * h)
        numpyro.sample("mu", dist.Normal(0.0, 1.0))

    sites = trace(seed(ebm.fixed(model, {"mu": 0.0, "theta": 1.0}), 0)).get_trace()
    assert [name for name, site in sites.items() if is_energy(site)] == ["E"]
    assert plates_of(sites["E"]) == plates_of(sites["h"]) == {"data", "units"}
    assert plates_of(sites["data"]) == frozenset()


def test_layers_of_a_distribution():
    normal = dist.Normal(jnp.zeros(3), 1.0)
    wrapped = normal.to_event(1).mask(False).expand((4,))
    kinds = ["ExpandedDistribution", "MaskedDistribution", "Independent", "Normal"]
    assert [type(x).__name__ for x in layers(wrapped)] == kinds
    assert unwrap(wrapped) is normal
    assert unwrap(normal) is normal


@pytest.mark.parametrize("shape", [(1,), (1, 4), (5, 4), (4, 1)])
def test_an_energy_that_would_be_broadcast_is_refused(shape):
    def model():
        with numpyro.plate("data", 4):
            ebm.energy("E", jnp.zeros(shape))

    with pytest.raises(ebm.ModelError, match="'E'"):
        trace(seed(ebm.fixed(model, {}), jax.random.key(3))).get_trace()


def test_a_site_of_units_alone_is_no_latent_of_the_rows():
    """Rows are the plate that all energies share, and not any of their plates."""

    def model():
        data, units = numpyro.plate("data", 4, dim=-1), numpyro.plate("units", 3, dim=-2)
        with units:
            w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with data:
            v = numpyro.sample("v", ebm.Lebesgue(), obs=jnp.zeros(4))
            ebm.energy("E", 0.5 * v**2)
            with units:
                ebm.energy("of units", w * v)

    with pytest.raises(ebm.ModelError, match="'w'"):
        trace(seed(ebm.fixed(model, {}), jax.random.key(3))).get_trace()


def test_a_row_that_does_not_count_may_be_no_number():
    def model(data):
        with numpyro.plate("data", len(data)), mask(mask=jnp.array([False, True])):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * v**2)

    row_model = read_model(model, (jnp.array([jnp.nan, 2.0]),), {})
    assert row_model.visible["v"].value.tolist() == [2.0, 2.0]  # one that counts stands in for it
    assert row_model.weigh(jnp.array([jnp.nan, 3.0])).tolist() == [0.0, 3.0]


def test_a_row_counts_where_all_masks_around_it_say_so():
    outer, inner = jnp.array([True, True, False]), jnp.array([True, False, True])

    def model(data):
        with numpyro.plate("data", 3), mask(mask=outer), mask(mask=inner):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * v**2)

    assert read_model(model, (jnp.ones(3),), {}).row_weights.tolist() == [1.0, 0.0, 0.0]


def test_masks_of_rows_are_taken_off_layer_by_layer():
    """Constant ones stay, as they take a site out of the model, unless they are asked for too."""
    rows, other = jnp.array([True, False, True]), jnp.array([[True], [False]])
    plain = dist.Normal(jnp.arange(3.0), 2.0)
    fn = plain.mask(rows).expand([2, 3]).mask(other)
    assert [x.shape for x in masks_of(fn)] == [(2, 3), (3,)]
    value = jnp.ones((2, 3))
    expected = jnp.broadcast_to(plain.log_prob(1.0), (2, 3))
    np.testing.assert_allclose(without_masks(fn).log_prob(value), expected)
    assert np.sum(fn.log_prob(value) != 0) == 2
    assert without_masks(fn).batch_shape == without_masks(fn, constant=True).batch_shape == (2, 3)
    off = plain.mask(False).expand([2, 3]).mask(other)
    assert np.all(without_masks(off).log_prob(value) == 0) and masks_of(off)[-1] is False
    np.testing.assert_allclose(without_masks(off, constant=True).log_prob(value), expected)
    assert unwrap(fn) is plain and without_masks(plain) is plain


def test_a_site_counts_by_its_scale_and_its_own_intermediates():
    fn = dist.TransformedDistribution(dist.Normal(0.0, 1.0), dist.transforms.ExpTransform())
    value, intermediates = fn.sample_with_intermediates(jax.random.key(3), (4,))
    site = {"fn": fn, "value": value, "intermediates": [], "scale": None}
    total = jnp.sum(fn.log_prob(value))
    np.testing.assert_allclose(log_prob_of(site), total, rtol=1e-6)
    scale = jnp.arange(4.0)
    weighed = {**site, "scale": scale, "intermediates": intermediates}
    np.testing.assert_allclose(log_prob_of(weighed), scale @ fn.log_prob(value), rtol=1e-6)
