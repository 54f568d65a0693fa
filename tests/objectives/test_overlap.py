# SPDX-License-Identifier: Apache-2.0
"""Losses that stand at their bound say so, and scales that go by the data do not get there."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.nn import sigmoid
from numpyro.handlers import scale
from oracles import assert_unbiased, draws

import numpyro_ebm as ebm
from numpyro_ebm.errors import FarNoiseWarning
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.objectives.overlap import overlap_of_many
from numpyro_ebm.objectives.symmetric_kernel import SymmetricKernel

KEY = jax.random.key(0)
MOVED, DRAWN = 0.8, 1.7  # how far the pairs below are apart
PAIRS = {
    "ConditionalNCE": ebm.ConditionalNCE(MOVED),
    "KernelRatioMatching": ebm.KernelRatioMatching(MOVED),
    "EnergyDiscrepancy": ebm.EnergyDiscrepancy(MOVED, 1),
    "RankingNCE": ebm.RankingNCE(dist.Normal(0.0, DRAWN), 1),
}


def gaussian(data):
    precision = numpyro.param("precision", 1.0)
    with numpyro.plate("data", len(data)):
        event = jnp.shape(data)[1:]
        v = numpyro.sample("v", ebm.Lebesgue(event), obs=data)
        ebm.energy("E", 0.5 * precision * jnp.reshape(v**2, (len(data), -1)).sum(-1))


def expected_overlap(name):
    """By Gauss-Hermite quadrature over a row of N(0, 1) and its one other point."""
    x, w = np.polynomial.hermite_e.hermegauss(60)
    w = w / w.sum()
    v, ξ = x[:, None, None], x[None, :, None]
    if name == "RankingNCE":
        log_ratio = lambda v: -0.5 * v**2 + 0.5 * (v / DRAWN) ** 2  # noqa: E731
        r = log_ratio(DRAWN * ξ) - log_ratio(v)
    elif name == "EnergyDiscrepancy":
        r = 0.5 * v**2 - 0.5 * (v + MOVED * np.sqrt(2.0) * ξ) ** 2
    else:
        r = 0.5 * v**2 - 0.5 * (v + MOVED * ξ) ** 2
    s = np.asarray(sigmoid(r))
    rows = 8 * s**2 * (1 - s) if name == "KernelRatioMatching" else 2 * s
    return float(np.einsum("i,j,ijk->", w, w, rows))


@pytest.mark.parametrize("name", PAIRS)
def test_the_overlap_is_what_the_loss_has_left_of_its_slope(name):
    num = 40_000
    data = jax.random.normal(jax.random.key(5), (num,))
    objective, params = PAIRS[name], {"precision": jnp.array(1.0)}

    @jax.jit
    def overlap(key):
        return objective.statistics(
            key, params, objective.prepare(key, params, gaussian, None, (data,), {})
        )

    error = 4 * 0.7 / np.sqrt(num)  # of numbers between 0 and 2 at most
    assert abs(float(overlap(KEY)) - expected_overlap(name)) < error


def test_the_overlap_with_many_points():
    log_weights = np.log([[1.0, 1.0, 1e30], [1.0, 2.0, 1.0], [1.0, 5.0, 3.0]])
    found = overlap_of_many(jnp.asarray(log_weights))
    np.testing.assert_allclose(found, [1.0, (1 - 1 / 8) * 3 / 2, 0.0], atol=1e-6)


WIDE = dist.Normal(0.0, 3.0).expand([64]).to_event(1)
FLAT = {
    "EnergyDiscrepancy": (ebm.EnergyDiscrepancy(1.0), "stands at its bound.*noise_scale"),
    "RankingNCE": (ebm.RankingNCE(WIDE, 16), "found among its draws.*Choose a noise"),
    "ConditionalNCE": (ebm.ConditionalNCE(1.0, 16), "told apart without doubt.*noise_scale"),
    "KernelRatioMatching": (ebm.KernelRatioMatching(1.0, 16), "told apart without doubt"),
    "NCE": (ebm.NCE(WIDE, 4), "noise is far from the data"),
}
BY_DATA = {
    "EnergyDiscrepancy": ebm.EnergyDiscrepancy(),
    "ConditionalNCE": ebm.ConditionalNCE(noise_ratio=16),
    "KernelRatioMatching": ebm.KernelRatioMatching(noise_ratio=16),
}


def run(objective, num_steps=3):
    """64 pixels of a scale of 0.3 that has to be learned."""
    data = 0.3 * jax.random.normal(KEY, (200, 64))
    svi = ebm.EnergySVI(gaussian, None, optax.sgd(0.0), objective)
    init = {"precision": 8.0}
    return svi.run(KEY, num_steps, data, batch_size=100, init_params=init, progress_bar=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAT)
def test_a_run_that_stands_at_its_bound_warns(name):
    objective, message = FLAT[name]
    with pytest.warns(FarNoiseWarning, match=f"{name}: .*{message}"):
        run(objective)


@pytest.mark.parametrize("name", FLAT)
def test_an_overlap_is_judged(name):
    objective, message = FLAT[name]
    with pytest.warns(FarNoiseWarning, match=f"{name}: .*{message}"):
        objective.review(jnp.array(0.01))
    objective.review(jnp.array(0.03))


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_DATA)
def test_scales_that_go_by_the_data_leave_a_gradient(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(BY_DATA[name])


@pytest.mark.slow
def test_without_a_weight_of_the_row_there_is_no_bound():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(ebm.EnergyDiscrepancy(0.05, w=0.0))


def columns(data, weights):
    with numpyro.plate("data", len(data)), scale(scale=weights):
        v = numpyro.sample("v", ebm.Lebesgue((4,)), obs=data)
        p = numpyro.sample(
            "p", ebm.Lebesgue(support=dist.constraints.positive), obs=jnp.exp(data[:, 0])
        )
        ebm.energy("E", jnp.sum(v**2, -1) + p)


@pytest.mark.usefixtures("x64")
def test_coordinates_move_by_their_own_spread():
    """Over the root of their number, rows counted by weight; constant ones with the others."""
    rng = np.random.default_rng(0)
    data = np.stack([rng.normal(0, s, 12) for s in (2.0, 0.5, 0.1, 0.0)], 1) + 3.0
    weights = rng.integers(0, 4, 12)
    row_model = read_model(columns, (jnp.asarray(data), jnp.asarray(weights, float)))
    point = row_model.unconstrain_visible()
    others = [np.repeat(np.delete(data, i, 0), np.delete(weights, i), 0) for i in range(len(data))]
    spread = np.array([x.std(0) for x in others])
    spread[:, 3] = np.sqrt(np.mean(spread**2, 1))
    own, one = (  # with the same numbers
        SymmetricKernel("", scale, None, "uniform").draw(KEY, row_model, point)
        for scale in (None, 1.0)
    )
    for name, expected in {"v": spread, "p": spread[:, 0]}.items():
        found = (own[name] - point[name]) / (one[name] - point[name])
        np.testing.assert_allclose(found, expected / np.sqrt(5), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EnergyDiscrepancy", "ConditionalNCE"])
def test_a_scale_by_the_other_rows_takes_no_side(name):
    """The gradient is zero in the mean at the truth, in batches of three as well."""
    objective = {
        "EnergyDiscrepancy": ebm.EnergyDiscrepancy(num_samples=4),
        "ConditionalNCE": ebm.ConditionalNCE(noise_ratio=4),
    }[name]

    def one(key):
        key_data, key_loss = jax.random.split(key)
        data = 0.5 * jax.random.normal(key_data, (3, 2))

        def loss(p):
            return objective.loss(key_loss, {"precision": p}, gaussian, None, data)

        return jax.grad(loss)(jnp.array(4.0))

    samples = draws(one, KEY, 40_000)
    assert_unbiased(samples, np.zeros(1), name)


@pytest.mark.parametrize("objective", [ebm.EnergyDiscrepancy(), ebm.ConditionalNCE()])
def test_two_rows_have_no_spread(objective):
    with pytest.raises(ebm.ModelError, match="'v' is continuous.*takes three rows"):
        objective.loss(KEY, {"precision": jnp.array(1.0)}, gaussian, None, jnp.ones((2, 2)))
