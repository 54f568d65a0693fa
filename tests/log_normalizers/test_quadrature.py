# SPDX-License-Identifier: Apache-2.0
"""log Z by quadrature, which finds the mass itself."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from normalizer_cases import KEY, assert_covers, model_of
from numpyro.distributions import constraints
from scipy.stats import norm

import numpyro_ebm as ebm
from numpyro_ebm.log_normalizers import quadrature
from numpyro_ebm.log_normalizers.visible_grid import sum_over_visible
from numpyro_ebm.marginals import exact_marginal
from numpyro_ebm.model.reading import read_model

LINE = [
    # energy, base measure, log Z
    (
        lambda v: 0.5 * ((v - 57) / 0.01) ** 2,
        ebm.Lebesgue(),
        math.log(0.01 * math.sqrt(2 * math.pi)),
    ),
    (lambda v: 2 * v, ebm.Lebesgue(support=constraints.positive), -math.log(2)),
    (lambda v: jnp.log1p(v**2), ebm.Lebesgue(), math.log(math.pi)),
    (lambda v: jnp.abs(v) ** 0.5, ebm.Lebesgue(), math.log(4)),
    (lambda v: 0.0 * v, ebm.Lebesgue(support=constraints.unit_interval), 0.0),
    (lambda v: 0.5 * v**2, dist.Normal(0.0, 1.0), -0.5 * math.log(2)),
    (
        lambda v: jnp.sum(v**4, -1) + 0.5 * (v[..., 0] - v[..., 1]) ** 2 * 0,
        ebm.Lebesgue((2,)),
        2 * math.log(2 * math.gamma(1.25)),
    ),
]


@pytest.mark.parametrize("energy, base, log_z", LINE[:2])
def test_quadrature_finds_the_mass_itself(energy, base, log_z):
    found = ebm.log_normalizer(KEY, model_of(energy, base))
    assert found.method == "quadrature" and found.bias == "none"
    assert_covers(found, log_z)
    assert 0 < found.mcse < 1e-4


def test_tails_beyond_the_nodes_count_in_the_error():
    """∫ (1 + v²)^(-3/4) dv = B(1/2, 1/4), and 0.8 % of it lies beyond a distance of 10⁴."""
    model = model_of(lambda v: 0.75 * jnp.log1p(v**2), ebm.Lebesgue())
    with pytest.warns(ebm.QuadratureWarning):
        found = ebm.log_normalizer(KEY, model, method="quadrature")
    log_z = math.lgamma(0.5) + math.lgamma(0.25) - math.lgamma(0.75)
    assert abs(found.value - log_z) < found.mcse < 0.03


def test_the_grid_is_refined_until_every_second_node_says_the_same(monkeypatch):
    """∫∫ exp(-½ v²) dv is 2π, which the first grid and every second of its nodes both find."""

    def evaluate(integrand, cloud, num_nodes, reach):
        nodes, log_weights = quadrature._grid(integrand, num_nodes, reach)
        return jnp.asarray(log_weights - 0.5 * (nodes**2).sum(-1))[:, None], None

    monkeypatch.setattr(quadrature, "_evaluate", evaluate)
    plane = SimpleNamespace(num_real=2), SimpleNamespace(center=jnp.zeros((1, 2)))
    value, change, num_nodes = quadrature._refine(*plane, 100.0)
    assert value == pytest.approx(math.log(2 * math.pi), abs=1e-5)
    assert change < 1e-5 and num_nodes == 129


@pytest.mark.slow
@pytest.mark.parametrize("energy, base, log_z", LINE[2:])
def test_quadrature_on_other_supports_and_in_the_plane(energy, base, log_z):
    found = ebm.log_normalizer(KEY, model_of(energy, base))
    assert found.method == "quadrature"
    assert_covers(found, log_z)
    assert found.mcse < 1e-4


@pytest.mark.slow
def test_quadrature_in_double_precision_and_under_jit(x64):
    found = ebm.log_normalizer(KEY, model_of(*LINE[0][:2]))
    assert found.value.dtype == jnp.float64 and found.mcse < 1e-8
    assert found.value == pytest.approx(LINE[0][2], abs=1e-9)
    under = jax.jit(lambda key: ebm.log_normalizer(key, model_of(*LINE[1][:2]))[:2])(KEY)
    assert_covers(under, LINE[1][2])


def test_a_sum_over_nodes_around_the_data_may_skip_nodes_and_end_early():
    """Every other node counts twice; nodes beyond a reach, in deviations of the data, not at all.

    An energy that is no number far out has no mass there; among the data it is an error.
    """

    def model(data, low=jnp.inf, high=-jnp.inf):
        t = numpyro.param("t", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", jnp.where((v > low) & (v < high), jnp.nan, 0.5 * t * v**2))

    data = np.array([-1.0, 0.2, 1.4])

    def log_z(*at, **options):
        row_model = read_model(model, (jnp.asarray(data), *at))
        return sum_over_visible(
            {"t": jnp.array(0.7)}, row_model, exact_marginal(row_model), 2_049, **options
        )

    found = jax.jit(
        lambda: (
            log_z(),
            log_z(every=2),
            log_z(reach=1.5),
            log_z(30.0, jnp.inf),
            log_z(0.0, 0.1),
        )
    )()
    full = 0.5 * math.log(2 * math.pi / 0.7)
    ends = (data.mean() + np.array([-1.5, 1.5]) * data.std()) * 0.7**0.5
    part = full + math.log(np.diff(norm.cdf(ends))[0])
    np.testing.assert_allclose(found[:2], full, rtol=1e-5)
    assert found[2] == pytest.approx(part, abs=0.01) and abs(part - full) > 0.05
    assert found[3] == pytest.approx(full, rel=1e-5) and np.isnan(found[4])
