# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with log Z, and is said."""

import warnings
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from normalizer_cases import KEY, ising, model_of
from numpyro.distributions import constraints
from numpyro.infer.util import log_density

import numpyro_ebm as ebm
from numpyro_ebm.errors import ModelError
from numpyro_ebm.log_normalizers import LogNormalizer
from numpyro_ebm.log_normalizers.comparison import best_of
from numpyro_ebm.log_normalizers.exploration import _check_exploration

DIVERGENT = {
    "rises": (lambda v: -(v**2), ebm.Lebesgue()),
    "flat in one direction": (lambda v: 0.5 * v[..., 0] ** 2, ebm.Lebesgue((2,))),
    "tails of 1/v": (lambda v: jnp.log1p(jnp.abs(v)), ebm.Lebesgue()),
    "flat in three dimensions": (
        lambda v: 0.5 * v[..., 0] ** 2 + v[..., 2] ** 4,
        ebm.Lebesgue((3,)),
    ),
    "flat on the positive line": (lambda v: 0.0 * v, ebm.Lebesgue(support=constraints.positive)),
    "out of a proper base measure": (
        lambda v: -jnp.sum(v**2 + 0.0 * v**4, -1),
        dist.Normal(0.0, 1.0).expand([3]).to_event(1),
    ),
    "a falling quadratic": (lambda v: -0.5 * jnp.sum(v**2, -1), ebm.Lebesgue((3,))),
}


@pytest.mark.parametrize(
    "name",
    [
        "rises",
        "a falling quadratic",
        *(pytest.param(x, marks=pytest.mark.slow) for x in list(DIVERGENT)[1:-1]),
    ],
)
def test_divergent_integrals_are_found(name):
    with pytest.raises(ModelError, match=r"site\(s\) 'v' diverges.*proper base measure"):
        ebm.log_normalizer(KEY, model_of(*DIVERGENT[name]))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ais", "smc"])
def test_annealing_finds_divergence(method):
    for name in ("rises", "flat in one direction"):
        with pytest.raises(ModelError, match=r"site\(s\) 'v' diverges"):
            ebm.log_normalizer(KEY, model_of(*DIVERGENT[name]), method=method)


def test_the_site_that_diverges_is_named():
    def two():
        with numpyro.plate("data", 1):
            v = numpyro.sample("v", ebm.Lebesgue((2,)))
            w = numpyro.sample("w", ebm.Lebesgue())
            ebm.energy("E", 0.5 * jnp.sum(v**2, -1) + 0.0 * w)

    with pytest.raises(ModelError, match=r"site\(s\) 'w' diverges"):
        ebm.log_normalizer(KEY, ebm.fixed(two, {}), method="smc")


def test_one_coordinate_that_runs_away_is_enough():
    """At values that are still moderate, as they are where every chain is looked at in time."""
    integrand = SimpleNamespace(coordinate_names=lambda: ["v", "w"])
    for growth in (1e7, np.inf):
        found = SimpleNamespace(growth=np.array([[1.0, growth]]), is_there=np.array([[True]]))
        with pytest.raises(ModelError, match=r"site\(s\) 'w' diverges"):
            _check_exploration(integrand, found, np.array([True]))
    _check_exploration(integrand, SimpleNamespace(growth=1.0, is_there=True), np.array([True]))


def test_free_parameters_and_bad_options():
    with pytest.raises(ModelError, match="fixed"):
        ebm.log_normalizer(KEY, ising)
    with pytest.raises(ModelError, match="fixed"):
        ebm.log_likelihood(KEY, ising, np.zeros((2, 4, 4), int))
    model = ebm.fixed(ising, {"beta": 0.1})
    for kwargs, message in (
        ({"method": "exact"}, "must be one of"),
        ({"method": ["ais", "exact"]}, "must be one of"),
        ({"method": []}, "empty"),
        ({"num_particles": 1}, "num_particles"),
        ({"num_temperatures": 0}, "num_temperatures"),
        ({"num_replicates": 1.5}, "num_replicates"),
        ({"method": "quadrature"}, "no real coordinates"),
        ({"method": "enumerate", "size": 10}, "states to sum over"),
        ({"method": "enumerate", "max_states": 100}, "max_states=100"),
    ):
        with pytest.raises(ModelError, match=message):
            ebm.log_normalizer(KEY, model, **kwargs)
    with pytest.raises(ModelError, match="no observed site"):
        ebm.log_likelihood(KEY, model)
    cube = model_of(lambda v: jnp.sum(jnp.abs(v), -1), ebm.Lebesgue((3,)))
    for method, message in (("quadrature", "3 coordinates"), ("enumerate", "not jointly Gaussian")):
        with pytest.raises(ModelError, match=message):
            ebm.log_normalizer(KEY, cube, method=method)


def test_disagreement_is_reported():
    def result(value, mcse, method):
        return LogNormalizer(jnp.asarray(value), jnp.asarray(mcse), 100.0, method, "below")

    a, b = result(1.0, 0.1, "ais"), result(1.1, 0.01, "smc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        best = best_of([a, b])
    assert best.method == "smc" and best.diagnostics["results"] == {"ais": a, "smc": b}
    with pytest.warns(ebm.NormalizerDisagreementWarning, match="ais gives 1 .* smc gives 2"):
        best_of([a, result(2.0, 0.1, "smc")])


@pytest.mark.slow
def test_several_methods_agree():
    model = ebm.fixed(ising, {"beta": 0.25})
    found = ebm.log_normalizer(KEY, model, method=["enumerate", "ais", "smc"])
    assert found.method == "enumerate" and set(found.diagnostics["results"]) == {
        "enumerate",
        "ais",
        "smc",
    }


def bits(num_rows=1):
    with numpyro.plate("data", num_rows):
        s = numpyro.sample("s", ebm.Counting(2, (3,)))
        ebm.energy("E", 0.3 * s[:, 0] * s[:, 1] * s[:, 2])


def observed_bits(data):
    weight = numpyro.sample("weight", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        s = numpyro.sample("s", ebm.Counting(2, (3,)), obs=data)
        ebm.energy("E", weight * s[:, 0] * s[:, 1] * s[:, 2])


THREE = jnp.array([[0, 1, 1], [1, 1, 1]])
WEIGHT = {"weight": jnp.array(0.3)}
LIMITS = {
    "log_normalizer": lambda most: ebm.log_normalizer(
        KEY, ebm.fixed(bits, {}), method="enumerate", max_states=most
    ),
    "normalized": lambda most: log_density(
        ebm.normalized(observed_bits, max_states=most), (THREE,), {}, WEIGHT
    ),
    "Exchange": lambda most: ebm.Exchange(
        observed_bits, "enumerate", max_states=most, step_size=0.1
    ).init(KEY, 0, None, (THREE,), {}),
}


@pytest.mark.parametrize("name", LIMITS)
def test_as_many_states_as_are_allowed_are_summed_and_no_more(name):
    LIMITS[name](8)
    with pytest.raises(ModelError, match="8 (joint )?states"):
        LIMITS[name](7)
