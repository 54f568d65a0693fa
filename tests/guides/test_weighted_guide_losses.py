# SPDX-License-Identifier: Apache-2.0
"""Weights of rows in the losses of guides, and what refuses weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import Trace_ELBO, TraceGraph_ELBO

import numpyro_ebm as ebm
from numpyro_ebm.guides.losses import row_guide_loss

ROWS = 5
WEIGHTS = (0.5, 2.0, 1.0, 3.0, 0.25)


def weighted(weights, mask):
    return handlers.scale(scale=weights), handlers.mask(mask=mask)


def model(discrete, data, weights, mask):
    scaled, masked = weighted(weights, mask)
    with numpyro.plate("data", len(data)), scaled, masked:
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        base = ebm.Counting() if discrete else dist.Normal(0.0, 1.0)
        h = numpyro.sample("h", base)
        ebm.energy("E", 0.5 * (v - h) ** 2 + 0.1 * h)


def guide(discrete, scaled, data, weights, mask):
    """With the handlers around it as well, as `numpyro.infer.SVI` would need them, or without."""
    slope = numpyro.param("slope", 0.7)
    around, masked = weighted(weights if scaled else 1.0, True)
    with numpyro.plate("data", len(data)), around, masked:
        v = ebm.visible("v", data)
        fn = dist.Bernoulli(logits=slope * v) if discrete else dist.Normal(slope * v, 0.8)
        numpyro.sample("h", fn)


LOSSES = {
    "Trace_ELBO": (Trace_ELBO(), False),
    "TraceGraph_ELBO": (TraceGraph_ELBO(), True),
    "PosteriorScore": (ebm.PosteriorScore(), False),
    "RelaxedELBO": (ebm.RelaxedELBO(), True),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scaled", [False, True], ids=["model", "both"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_guide_is_the_weighted_sum_of_those_of_the_rows(name, scaled):
    guide_loss, discrete = LOSSES[name]
    here, q = partial(model, discrete), partial(guide, discrete, scaled)
    objective = ebm.DenoisingScoreMatching(0.3, ebm.VaGES(3))
    data = jnp.asarray(np.random.default_rng(0).normal(size=ROWS))
    key = jax.random.key(3)

    @jax.jit
    @jax.value_and_grad
    def loss(slope, weights, mask):
        problem = objective.prepare(key, {}, here, q, (data, weights, mask), {})
        return row_guide_loss(guide_loss, key, {}, {"slope": slope}, problem, q)

    ones = jnp.ones(ROWS)
    rows = [loss(0.7, ones, i == jnp.arange(ROWS)) for i in range(ROWS)]
    for weights in (ones, jnp.asarray(WEIGHTS)):
        expected = jax.tree.map(lambda *x: jnp.tensordot(weights, jnp.stack(x), 1), *rows)  # noqa: B023
        found = loss(0.7, weights, ones > 0)
        # TraceGraph_ELBO takes the roots of the weights twice in its gradient, once in its value.
        parts = slice(1, 2) if name == "TraceGraph_ELBO" else slice(2)
        np.testing.assert_allclose(jnp.stack(found[parts]), jnp.stack(expected[parts]), rtol=1e-9)


def test_weights_of_rows_and_of_an_objective_multiply():
    """Noise levels weigh the rows as well; a row twice is a row of weight two."""
    objective, key = ebm.MultiscaleDenoisingScoreMatching(marginal=ebm.VaGES(2)), jax.random.key(3)
    data, q = jnp.array([0.3, -1.2]), partial(guide, False, False)

    def loss(weights, levels, mask=(True, True)):
        arguments = data, jnp.asarray(weights), jnp.asarray(mask)
        problem = objective.prepare(key, {}, partial(model, False), q, arguments, {})
        problem = problem._replace(row_weights=jnp.asarray(levels))
        return row_guide_loss(Trace_ELBO(), key, {}, {"slope": 0.7}, problem, q)

    ones = [1.0, 1.0]
    first, second = (loss(ones, ones, mask) for mask in ((True, False), (False, True)))
    np.testing.assert_allclose(loss([2.0, 0.5], [3.0, 5.0]), 6 * first + 2.5 * second, rtol=1e-5)


def test_units_of_a_plate_that_subsamples_count_for_those_left_out():
    """With weights around the rows and without: a weight of two is twice the loss."""

    def units():
        return numpyro.plate("units", 6, subsample_size=2, dim=-2)

    def both(data, weight):
        with numpyro.plate("data", len(data), dim=-1), handlers.scale(scale=weight):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * v**2)
            with units():
                h = numpyro.sample("h", dist.Normal(0.0, 1.0))
                ebm.energy("own", 0.3 * (v - h) ** 2)

    def q(data, weight):
        with numpyro.plate("data", len(data), dim=-1), units():
            numpyro.sample("h", dist.Normal(0.2 * ebm.visible("v", data), 0.8))

    def loss(weight):
        objective, key = ebm.DenoisingScoreMatching(0.3, ebm.VaGES(2)), jax.random.key(3)
        problem = objective.prepare(key, {}, both, q, (jnp.array([0.3, -1.2]), weight), {})
        return row_guide_loss(Trace_ELBO(), key, {}, {}, problem, q)

    np.testing.assert_allclose(loss(2.0), 2 * loss(1.0), rtol=1e-5)


def test_tests_of_fit_that_count_rows_alike_refuse_weights():
    def gaussian(data, weights):
        with numpyro.plate("data", len(data)), handlers.scale(scale=weights):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * v**2)

    with pytest.raises(ebm.ModelError, match="counts every row once"):
        ebm.stein_test(
            jax.random.key(0), ebm.fixed(gaussian, {}), jnp.ones(4), jnp.arange(1.0, 5.0)
        )


def test_weights_that_are_not_cut_with_the_rows_are_refused():
    weights = jnp.arange(1.0, 9.0)

    def gaussian(data):
        precision = numpyro.param("precision", 1.0)
        with numpyro.plate("data", len(data)), handlers.scale(scale=weights):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * precision * v**2)

    svi = ebm.EnergySVI(gaussian, None, numpyro.optim.Adam(0.1), ebm.ScoreMatching())
    with pytest.raises(ebm.ModelError, match="as arguments of the model"):
        svi.run(jax.random.key(0), 2, jnp.ones(8), batch_size=4, progress_bar=False)
