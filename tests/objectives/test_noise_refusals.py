# SPDX-License-Identifier: Apache-2.0
"""What does not go together in noise contrast."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from contrast_cases import (
    KEY,
    X,
    Y,
    arrays,
    fitted_noise,
    noise_of,
    one_dimensional,
    two_sites,
)
from numpyro.distributions import constraints

import numpyro_ebm as ebm
from numpyro_ebm.errors import ModelError
from numpyro_ebm.model.noise import Noise
from numpyro_ebm.model.reading import read_model


def void(_):
    return None


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (dist.Normal(0, 1), r"event shape \(\), and the site \(2,\)"),
        (dist.Gamma(2.0, 1.0).expand([2]).to_event(1), "noise has to live where the data do"),
        (dist.Bernoulli(0.5).expand([2]).to_event(1), "noise has to live where the data do"),
        ({"w": dist.Normal(0, 1).expand([2]).to_event(1)}, "no distribution for .* 'v'"),
        ({"v": 3.0}, "noise of the visible site 'v' must be a NumPyro distribution"),
        (3.0, "must be a NumPyro distribution"),
        ("normal", "must be a NumPyro distribution"),
        ([3.0], "a list has to hold NumPyro transforms"),
        (lambda: None, "neither returns a distribution nor samples the visible site 'v'"),
        (lambda: 3.0, "noise of the visible site 'v' must be a NumPyro distribution"),
        (lambda a, b, c: dist.Normal(0, 1), "can be called neither with the model's arguments nor"),
        (
            lambda: void(numpyro.sample("v", dist.Normal(0, 1).expand([2]).to_event(1))),
            "outside the data plate 'data'",
        ),
    ],
)
def test_noise_that_does_not_fit(noise, message):
    system = oracles.gaussian_system()
    params = arrays({**system.params, "log_normalizer": 1.0})
    with pytest.raises(ModelError, match=message):
        ebm.NCE(noise).loss(KEY, params, system.model, None, jnp.asarray(system.data))
    del params["log_normalizer"]
    with pytest.raises(ModelError, match=message):
        ebm.RankingNCE(noise).loss(KEY, params, system.model, None, jnp.asarray(system.data))


def of_site(fn, values):
    def model(data):
        a = numpyro.param("a", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", fn, obs=data)
            ebm.energy("E", a * v)

    return model, jnp.asarray(values), {"a": jnp.array(1.0), "log_normalizer": jnp.array(0.0)}


UNIT = ebm.Lebesgue(support=constraints.unit_interval)
POSITIVE = ebm.Lebesgue(support=constraints.positive)


@pytest.mark.parametrize(
    ("site", "values", "noise"),
    [
        (UNIT, [0.2, 0.9], dist.Gamma(2.0, 1.0)),
        (POSITIVE, [0.2, 0.9], dist.Beta(2.0, 1.0)),
        (POSITIVE, [0.2, 0.9], dist.Normal(0.0, 1.0)),
        (ebm.Counting(3), [0, 2], dist.Bernoulli(0.5)),
        (ebm.Counting(3), [0, 2], dist.Poisson(1.0)),
        (ebm.Counting(), [0, 1], dist.Categorical(jnp.ones(3) / 3)),
    ],
)
def test_noise_on_another_support(site, values, noise):
    model, data, params = of_site(site, values)
    with pytest.raises(ModelError, match="noise has to live where the data do, and everywhere"):
        ebm.NCE(noise).loss(KEY, params, model, None, data)


@pytest.mark.parametrize(
    ("site", "values", "noise"),
    [
        (UNIT, [0.2, 0.9], dist.Beta(2.0, 1.0)),
        (UNIT, [0.2, 0.9], dist.Uniform(0.0, 1.0)),
        (POSITIVE, [0.2, 0.9], dist.LogNormal(0.0, 1.0)),
        (POSITIVE, [0.2, 0.9], dist.HalfNormal(1.0)),
        (ebm.Counting(3), [0, 2], dist.Categorical(jnp.ones(3) / 3)),
        (ebm.Counting(3), [0, 2], dist.Binomial(2, 0.4)),
        (ebm.Counting(), [0, 1], dist.Bernoulli(0.5)),
    ],
)
def test_noise_on_the_same_support_under_another_name(site, values, noise):
    model, data, params = of_site(site, values)
    row_model = read_model(model, (data,), {}, params)
    noise = Noise(noise, row_model)
    assert np.all(np.isfinite(noise.log_density({}, row_model.unconstrain_visible())))
    assert np.all(np.isfinite(noise.draw(KEY, {}, 20)["v"]))


def test_two_sites_want_a_dict():
    params = arrays({"w": 0.7, "b": np.array([0.3, -0.4]), "log_normalizer": 1.1})
    with pytest.raises(ModelError, match=r"visible sites \['x', 'y'\]: give the noise as a dict"):
        ebm.NCE(dist.Normal(0, 1)).loss(KEY, params, two_sites, None, X, Y)


def test_one_row_not_many():
    data = jnp.arange(4.0)
    params = {"t": jnp.array(1.0), "m": jnp.array(0.0), "log_normalizer": jnp.array(0.0)}
    with pytest.raises(ModelError, match=r"draws 'v' with shape \(4, 4\)"):
        ebm.NCE(dist.Normal(jnp.zeros(4), 1)).loss(KEY, params, one_dimensional, None, data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ebm.NCE(dist.Normal(0, 1), 0), "NCE: `noise_ratio` must be a positive integer"),
        (lambda: ebm.NCE(dist.Normal(0, 1), 1.5), "`noise_ratio`.*got 1.5"),
        (lambda: ebm.RankingNCE(dist.Normal(0, 1), 0), "RankingNCE: `noise_ratio`"),
        (lambda: ebm.ConditionalNCE(0.5, 0), "ConditionalNCE: `noise_ratio`"),
        (lambda: ebm.ConditionalNCE(0.0), "`noise_scale` must be positive, got 0.0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ModelError, match=message):
        make()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            ebm.NCE(noise_of(2), marginal=ebm.VaGES(2)),
            r"VaGES estimates derivatives only. Use `Exact\(\)`, `Enumerated\(\)` or .*`Importance",
        ),
        (
            ebm.RankingNCE(noise_of(2), marginal=ebm.VaGES(2)),
            r"VaGES has none that are exact. Use `Exact\(\)`.*`Enumerated\(\)`",
        ),
        (
            ebm.RankingNCE(noise_of(2), marginal=ebm.ImportanceBound(2)),
            "ImportanceBound has none that are exact",
        ),
        (ebm.ConditionalNCE(0.5, marginal=ebm.VaGES(2)), "VaGES has none that are exact"),
    ],
)
def test_the_marginal_has_to_have_values(objective, message):
    system = oracles.with_learned_guide(oracles.grbm_system())
    params = arrays({**system.params, "log_normalizer": 1.0})
    with pytest.raises(ModelError, match=message):
        objective.loss(KEY, params, system.model, system.guide, jnp.asarray(system.data))


def test_what_the_others_do_not_do():
    params = {"t": jnp.array(1.0), "m": jnp.array(0.0)}
    with pytest.raises(ModelError, match="'loc', 'noise_scale'.*trains no noise.*use NCE"):
        ebm.RankingNCE(fitted_noise).loss(KEY, params, one_dimensional, None, jnp.arange(3.0))


def unobserved(data=None):
    with numpyro.plate("data", 1):
        v = numpyro.sample("v", ebm.Lebesgue())
        ebm.energy("E", 0.5 * v**2)


@pytest.mark.parametrize(
    "objective", [ebm.NCE(dist.Normal(0, 1)), ebm.RankingNCE(dist.Normal(0, 1))]
)
def test_something_has_to_be_observed(objective):
    with pytest.raises(ModelError, match="no observed site"):
        objective.loss(KEY, {"log_normalizer": jnp.array(0.0)}, unobserved)
