# SPDX-License-Identifier: Apache-2.0
"""Questions on the sites of a trace, whatever wraps their distributions."""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import mask, scale, seed, trace

import numpyro_ebm as ebm
from numpyro_ebm.language.sites import is_energy, layers, plates_of, unwrap


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
