# SPDX-License-Identifier: Apache-2.0
"""A law over every method of the registry: log Z of a system, or the reason why not."""

import math
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro.distributions import constraints

import numpyro_ebm as ebm
from numpyro_ebm.log_normalizers.methods import METHODS, MethodName

BONDS = np.array([[0.0, 0.8, -0.5], [0.0, 0.0, 1.1], [0.0, 0.0, 0.0]])
BITS = np.indices((2, 2, 2)).reshape(3, -1).T


def gumbel():
    with numpyro.plate("data", 1):
        v = numpyro.sample("v", ebm.Lebesgue())
        ebm.energy("E", 0.7 + v + jnp.exp(-v))


def gamma():
    with numpyro.plate("data", 1):
        r = numpyro.sample("r", ebm.Lebesgue(support=constraints.positive))
        ebm.energy("E", 2.0 * r - 2.0 * jnp.log(r))


def bits():
    with numpyro.plate("data", 1):
        x = numpyro.sample("x", ebm.Counting(event_shape=(3,)))
        ebm.energy("E", -jnp.sum((x @ BONDS) * x, -1))


SYSTEMS = {
    "gumbel": (gumbel, -0.7),
    "gamma": (gamma, math.lgamma(3.0) - 3.0 * math.log(2.0)),
    "bits": (bits, np.logaddexp.reduce(np.sum((BITS @ BONDS) * BITS, -1))),
}


def test_the_type_of_methods_names_them_all():
    assert set(get_args(MethodName)) == set(METHODS)


@pytest.mark.parametrize(
    "system", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("gumbel", "gamma")), "bits"]
)
@pytest.mark.parametrize("method", METHODS)
def test_log_z_is_right_within_its_error_or_refused(method, system):
    model, truth = SYSTEMS[system]
    options = {"num_particles": 256, "num_temperatures": 100}
    try:
        model = ebm.fixed(model, {})
        found = ebm.log_normalizer(jax.random.key(1), model, method=method, **options)
    except ebm.ModelError as error:
        assert f"method={method!r} does not apply: " in str(error)
        return
    assert abs(found.value - truth) < 4.0 * found.mcse + 1e-4
    assert found.mcse < 0.3


def test_methods_are_taken_in_their_order():
    """Exact ones first; SMC where rows share their log Z, AIS where each has its own."""

    def order(**integrand):
        ranks = {k: x.rank(SimpleNamespace(**integrand)) for k, x in METHODS.items()}
        return sorted(ranks, key=ranks.__getitem__)

    few, many = {"discrete": (), "num_real": 2}, {"discrete": (), "num_real": 3}
    assert order(is_shared=True, **few) == ["quadrature", "enumerate", "smc", "ais"]
    assert order(is_shared=False, **few) == ["quadrature", "enumerate", "ais", "smc"]
    assert order(is_shared=True, **many) == ["enumerate", "quadrature", "smc", "ais"]
    with_discrete = {"discrete": ("h",), "num_real": 1}
    assert order(is_shared=True, **with_discrete) == ["enumerate", "quadrature", "smc", "ais"]
