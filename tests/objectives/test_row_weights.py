# SPDX-License-Identifier: Apache-2.0
"""Weights of rows in every objective: a loss is (1/N) Σ w_n L_n, and masked rows count zero.

The loss of one row is what the objective gives where all others are masked. With random numbers
held, the loss with weights has to be the weighted sum of these, and no number in a masked row may
matter.
"""

from contextlib import ExitStack
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from registry.objectives import OBJECTIVES
from weight_cases import ROWS, WEIGHTS, all_parameters, guide, latent, plain

import numpyro_ebm as ebm
from numpyro_ebm.model.reading import read_model

pytestmark = pytest.mark.usefixtures("x64")

PAIRS = ("KernelSteinDiscrepancy",)  # averages over pairs of rows
WITH_LATENTS = ("DenoisingScoreMatching", "ContrastiveDivergence", "NCE", "PseudoLikelihood")
CASES = [*((name, plain) for name in OBJECTIVES), *((name, latent) for name in WITH_LATENTS)]


def data_of(member, num=ROWS):
    rng = np.random.default_rng(3)
    if member.sites != "real":
        return jnp.asarray(rng.integers(0, 2, size=(num, 2)))
    return jnp.asarray(rng.normal(size=num))


def loss_of(name, model):
    """``(params, data, weights, mask) -> loss`` of an objective with its random numbers held."""
    member = OBJECTIVES[name]
    marginal, reader = None, None
    if model is latent:
        reader = guide
        marginal = ebm.VaGES(3) if "VaGES" in member.marginals else ebm.Enumerated()
    objective = member.make(marginal)
    params = all_parameters(objective, model, reader, data_of(member))

    def loss(params, data, weights=None, mask=None):
        return objective.loss(
            jax.random.key(7), params, model, reader, data, weights=weights, mask=mask
        )

    return loss, params, data_of(member)


def assert_close(actual, expected, rtol=1e-9):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-10)


@pytest.mark.parametrize("name, model", CASES, ids=lambda x: getattr(x, "__name__", x))
def test_a_loss_is_the_weighted_sum_of_those_of_the_rows(name, model):
    loss, params, data = loss_of(name, model)
    evaluate = jax.jit(jax.value_and_grad(loss))
    ones, everyone, weights = jnp.ones(ROWS), jnp.ones(ROWS, bool), jnp.asarray(WEIGHTS)
    if name not in PAIRS:
        losses = [evaluate(params, data, ones, i == jnp.arange(ROWS)) for i in range(ROWS)]
        losses = jax.tree.map(lambda *x: jnp.stack(x), *losses)
        for w in (ones, weights):
            total = jax.tree.map(partial(jnp.tensordot, w, axes=1), losses)
            assert_close(evaluate(params, data, w, everyone), total)
    plainly = jax.jit(jax.value_and_grad(loss))(params, data)
    assert_close(evaluate(params, data, ones, everyone), plainly)
    # No number in a masked row matters.
    mask = jnp.arange(ROWS) % 3 != 1
    bad = 7 if jnp.issubdtype(data.dtype, jnp.integer) else jnp.nan
    spoilt = jnp.where(jnp.reshape(mask, (-1,) + (1,) * (data.ndim - 1)), data, bad)
    assert_close(
        evaluate(params, spoilt, weights, mask), evaluate(params, data, weights, mask), rtol=0
    )


def test_data_that_are_known_are_looked_at_where_they_count():
    mask, data = jnp.array([True, False, True]), jnp.array([1.0, jnp.nan, 2.0])
    loss = lambda *args: ebm.ScoreMatching().loss(  # noqa: E731
        jax.random.key(0), {"precision": 1.3}, plain, None, *args
    )
    assert loss(data, None, mask) == loss(jnp.nan_to_num(data), None, mask)
    with pytest.raises(ebm.ModelError, match="contain NaN"):
        loss(data, None, ~mask)


EXACT = ("ScoreMatching", "MaximumLikelihood", "PseudoLikelihood", "RatioMatching")
STEIN = {
    "median": ebm.KernelSteinDiscrepancy(),
    "all": ebm.KernelSteinDiscrepancy(bandwidth=0.7),
    "square": ebm.KernelSteinDiscrepancy(kernel="imq", bandwidth=1.1, pairs="square"),
    "weight": ebm.KernelSteinDiscrepancy(
        bandwidth=0.8, weight=lambda x: 1 / (1 + jnp.sum(x**2, -1))
    ),
}


@pytest.mark.parametrize("name", [*EXACT, *STEIN])
def test_a_masked_row_is_as_left_out(name):
    if name in STEIN:
        objective, data = STEIN[name], data_of(OBJECTIVES["ScoreMatching"])
    else:
        objective, data = OBJECTIVES[name].make(), data_of(OBJECTIVES[name])
    mask = np.arange(ROWS) % 3 != 1

    def loss(params, data, weights=None, mask=None):
        key = jax.random.key(0)
        return objective.loss(key, params, plain, None, data, weights=weights, mask=mask)

    params = {"precision": jnp.array(1.3)}
    evaluate = jax.value_and_grad(loss)
    less = jax.tree.map(lambda x: x * mask.mean(), evaluate(params, data[mask]))
    rtol = 1e-9 if name != "MaximumLikelihood" else 1e-6  # nodes are placed by the data
    assert_close(evaluate(params, data, None, jnp.asarray(mask)), less, rtol)


@pytest.mark.parametrize("name", [*EXACT, "square"])
def test_a_row_of_weight_two_is_the_row_twice(name):
    if name in STEIN:
        objective, data = STEIN[name], data_of(OBJECTIVES["ScoreMatching"])
    else:
        objective, data = OBJECTIVES[name].make(), data_of(OBJECTIVES[name])
    times = np.arange(ROWS) % 3 + 1
    repeated = jnp.repeat(data, times, axis=0)

    def loss(params, data, weights=None):
        return objective.loss(jax.random.key(0), params, plain, None, data, weights=weights)

    params = {"precision": jnp.array(1.3)}
    evaluate = jax.value_and_grad(loss)
    twice = jax.tree.map(lambda x: x * times.mean(), evaluate(params, repeated))
    rtol = 1e-9 if name != "MaximumLikelihood" else 1e-6
    assert_close(evaluate(params, data, jnp.asarray(times, float)), twice, rtol)


def test_pairs_of_halves_count_as_their_rows():
    objective, data = ebm.KernelSteinDiscrepancy(bandwidth=0.8, pairs="halves"), jnp.arange(4.0)
    loss = lambda d, w: objective.loss(  # noqa: E731
        jax.random.key(0), {"precision": 1.3}, plain, None, d, weights=w
    )
    of_pairs = [float(loss(data[i::2], None)) for i in (0, 1)]
    w = jnp.array([1.0, 3.0, 2.0, 0.5])  # pairs (0, 2) and (1, 3)
    expected = w.mean() * np.average(of_pairs, weights=[2.0, 1.5])
    np.testing.assert_allclose(loss(data, w), expected, rtol=1e-10)


# Training


def test_a_run_in_batches_arrives_at_the_weighted_fit():
    rng = np.random.default_rng(0)
    data, weights = jnp.asarray(rng.normal(size=200)), jnp.asarray(rng.uniform(0.1, 3.0, 200))
    mask = jnp.asarray(rng.random(200) < 0.8)
    data = jnp.where(mask, data, jnp.nan)
    optim = numpyro.optim.Adam(lambda i: 0.05 / (1 + 0.01 * i))
    svi = ebm.EnergySVI(plain, None, optim, ebm.ScoreMatching())
    fit = svi.run(jax.random.key(0), 1_500, data, weights, mask, batch_size=50, progress_bar=False)
    w = np.where(mask, weights, 0.0)
    expected = w.sum() / np.sum(w * np.where(mask, data, 0.0) ** 2)
    np.testing.assert_allclose(fit.params["precision"], expected, rtol=0.02)


@pytest.mark.parametrize("beside", [False, True])
def test_rows_without_observation_have_no_weight(beside):
    """Whatever stands in their place; where a site beside it is observed they have one."""
    mask = np.arange(5) % 3 != 1
    data = jnp.where(mask, jnp.arange(5.0), jnp.nan)

    def model(data, mask):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data, obs_mask=mask)
            w = numpyro.sample("w", ebm.Lebesgue(), obs=jnp.ones(5)) if beside else 0.0
            ebm.energy("E", 0.5 * (v - w) ** 2)

    row_model = read_model(model, (data, jnp.asarray(mask)))
    if beside:
        assert row_model.row_weights is None and "v_unobserved" in row_model.latent
    else:
        np.testing.assert_array_equal(row_model.row_weights, mask)
        assert not row_model.latent
    v = row_model.visible["v_observed"].value
    np.testing.assert_array_equal(np.asarray(v)[mask], data[mask])
    assert np.all(np.isfinite(v))


def test_rows_without_observation_count_as_masked():
    """`obs_mask` of whole rows: they integrate to one, whatever stands in their place."""
    rng = np.random.default_rng(1)
    data, mask = jnp.asarray(rng.normal(size=9)), jnp.arange(9) % 3 != 1

    def unobserved(data, mask):
        precision = numpyro.param("precision", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data, obs_mask=mask)
            ebm.energy("E", 0.5 * precision * v**2)

    spoilt = jnp.where(mask, data, jnp.nan)
    params = {"precision": jnp.array(1.3), "log_normalizer": jnp.array(1.0)}

    def loss(objective, model, *args):
        key = jax.random.key(0)
        own = params if isinstance(objective, ebm.NCE) else {"precision": params["precision"]}
        return objective.loss(key, own, model, None, *args)

    for objective in (ebm.ScoreMatching(), ebm.NCE(dist.Normal(0.0, 1.5))):
        expected = loss(objective, lambda d, m: plain(d, None, m), data, mask)
        np.testing.assert_allclose(loss(objective, unobserved, spoilt, mask), expected, rtol=1e-10)
    jitted = jax.jit(partial(loss, objective, unobserved))(spoilt, mask)
    np.testing.assert_allclose(jitted, expected, rtol=1e-10)
    key, model = jax.random.key(0), ebm.fixed(unobserved, {"precision": 1.3})
    log_z = ebm.log_normalizer(key, model, spoilt, mask, method="enumerate")
    np.testing.assert_allclose(log_z.value, 0.5 * np.log(2 * np.pi / 1.3), rtol=1e-5)
    rows = ebm.log_likelihood(key, model, spoilt, mask, log_normalizer=log_z)
    expected = jnp.where(mask, dist.Normal(0.0, 1.3**-0.5).log_prob(data), 0.0)
    np.testing.assert_allclose(rows, expected, rtol=1e-5)


# Refusals


def around(*names, weights=2.0):
    """A model with a scale around some of its sites."""

    def model(data, w=weights):
        precision = numpyro.param("precision", 1.0)

        def weighted(name):
            stack = ExitStack()
            if name in names:
                stack.enter_context(handlers.scale(scale=w))
            return stack

        with numpyro.plate("data", len(data)):
            with weighted("v"):
                v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            with weighted("E"):
                ebm.energy("E", 0.5 * precision * v**2)
            with weighted("E2"):
                ebm.energy("E2", jnp.zeros(len(data)))

    return model


@pytest.mark.parametrize(
    "names, missing",
    [(("E", "E2"), "v"), (("v",), "E"), (("v", "E"), "E2"), (("v", "E2"), "E")],
)
@pytest.mark.parametrize("weights", [2.0, jnp.arange(1.0, 4.0)], ids=["one", "by row"])
def test_a_scale_around_some_sites_is_refused(names, missing, weights):
    with pytest.raises(ebm.ModelError, match=rf"not around \['{missing}'"):
        ebm.ScoreMatching().loss(
            jax.random.key(0),
            {"precision": 1.0},
            around(*names, weights=weights),
            None,
            jnp.ones(3),
        )


def test_other_weights_for_other_sites_are_refused_and_equal_ones_are_not():
    def two(data, w, other):
        precision = numpyro.param("precision", 1.0)
        with numpyro.plate("data", len(data)):
            with handlers.scale(scale=w):
                v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            with handlers.scale(scale=other):
                ebm.energy("E", 0.5 * precision * v**2)

    loss = lambda *args: ebm.ScoreMatching().loss(  # noqa: E731
        jax.random.key(0), {"precision": 1.0}, two, None, jnp.ones(3), *args
    )
    w = jnp.arange(1.0, 4.0)
    assert loss(w, 1.0 * w) == loss(w, w)
    with pytest.raises(ebm.ModelError, match="different values"):
        loss(w, 2.0 * w)
    with pytest.raises(ebm.ModelError, match="different values"):
        jax.jit(lambda w, x: loss(w, x))(w, w)  # nothing shows that they are the same


def test_weights_are_data():
    def model(data):
        power = numpyro.param("power", 1.0)
        with numpyro.plate("data", len(data)), handlers.scale(scale=power):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * v**2)

    with pytest.raises(ebm.ModelError, match=r"depends on \['power'\]"):
        ebm.ScoreMatching().loss(jax.random.key(0), {"power": 1.0}, model, None, jnp.ones(3))


@pytest.mark.parametrize("bad", [-1.0, jnp.array([1.0, -1.0, 1.0]), jnp.array([1.0, jnp.nan, 1.0])])
def test_weights_are_finite_and_not_negative(bad):
    with pytest.raises((ebm.ModelError, ValueError), match=r"finite and not negative|positive"):
        ebm.ScoreMatching().loss(
            jax.random.key(0), {"precision": 1.0}, plain, None, jnp.ones(3), weights=bad
        )


def test_a_scale_within_a_row_is_refused():
    def model(data):
        with numpyro.plate("data", len(data), dim=-1):
            with numpyro.plate("units", 2, dim=-2), handlers.scale(scale=jnp.ones((2, 1)) * 2):
                v = numpyro.sample("v", ebm.Lebesgue(), obs=data.T)
            with handlers.scale(scale=2.0):
                ebm.energy("E", 0.5 * jnp.sum(v**2, 0))

    with pytest.raises(ebm.ModelError, match="differs within a row"):
        ebm.ScoreMatching().loss(jax.random.key(0), {}, model, None, jnp.ones((3, 2)))


def test_a_kernel_of_numpyro_would_sample_a_power_of_the_density():
    objective = ebm.ContrastiveDivergence(lambda m: numpyro.infer.HMC(m, step_size=0.1))
    with pytest.raises(ebm.ModelError, match="raised to their power"):
        objective.loss(
            jax.random.key(0), {"precision": 1.0}, plain, None, jnp.ones(3), jnp.arange(1.0, 4.0)
        )
