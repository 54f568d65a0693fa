# SPDX-License-Identifier: Apache-2.0
"""Elements of a row that were not observed, by `obs_mask`: integrated out in learning.

The oracles: marginals of a multivariate normal, and sums over all states of few bits. What stands
in the data where nothing was observed is NaN, or no value of the site.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.infer import Trace_ELBO
from numpyro.infer import log_likelihood as numpyro_log_likelihood

import numpyro_ebm as ebm
from numpyro_ebm.guides.losses import row_guide_loss
from numpyro_ebm.marginals import exact_marginal
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.model.reference import draw_reference, reference_log_prob

D = 3
ROWS = 8
rng = np.random.default_rng(0)
MASK = rng.random((D, ROWS)) < 0.6
MASK[:, 0], MASK[:, 1] = True, False  # all of a row, and nothing of it
COUPLINGS = np.array([[0.0, 0.9, -0.4], [0.9, 0.0, 0.5], [-0.4, 0.5, 0.0]])


def network(data, mask):
    strength = numpyro.sample("strength", dist.Normal(0.0, 1.0))
    rows = numpyro.plate("data", data.shape[1], dim=-1)
    with rows, numpyro.plate("units", D, dim=-2):
        x = numpyro.sample("x", ebm.Counting(2), obs=data, obs_mask=mask)
    with rows:
        ebm.energy("E", -0.5 * strength * jnp.einsum("in,ij,jn->n", x, COUPLINGS, x) - 0.3 * x[0])


BITS = jnp.asarray(np.where(MASK, rng.integers(0, 2, (D, ROWS)), 7))
STATES = np.indices((2,) * D).reshape(D, -1)


def expected_of_bits(strength, bits=BITS, mask=MASK):
    """log p of the observed bits of every row."""
    log_p = 0.5 * strength * jnp.einsum("is,ij,js->s", STATES, COUPLINGS, STATES) + 0.3 * STATES[0]
    log_p = log_p - jax.nn.logsumexp(log_p)
    agree = jnp.all((STATES[:, None] == np.asarray(bits)[..., None]) | ~mask[..., None], 0)
    return jax.nn.logsumexp(jnp.where(agree, log_p, -jnp.inf), axis=1)


def test_a_row_sums_over_its_missing_bits():
    """What stands in their place has a law of its own, one half each."""
    strength, seen = jnp.array(0.7), MASK[:, :4]
    row_model = read_model(network, (BITS[:, :4], seen), {}, {"strength": strength})
    marginal, values = exact_marginal(row_model), row_model.visible_values
    found = jax.jit(lambda x: marginal.log_density(row_model, {"strength": x}, values))(strength)
    log_p = 0.35 * np.einsum("is,ij,js->s", STATES, COUPLINGS, STATES) + 0.3 * STATES[0]
    log_z = jax.nn.logsumexp(log_p)
    expected = expected_of_bits(0.7, BITS[:, :4], seen) + log_z - np.log(2) * np.sum(~seen, 0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_bits_that_are_missing_are_summed_out():
    key, strength = jax.random.key(0), jnp.array(0.7)
    expected = expected_of_bits(strength)
    model = ebm.fixed(network, {"strength": strength})
    rows = ebm.log_likelihood(key, model, BITS, MASK, method="enumerate")
    np.testing.assert_allclose(rows, expected, rtol=1e-7, atol=1e-10)
    posterior = ebm.normalized(network, "enumerate")
    found = numpyro_log_likelihood(posterior, {"strength": strength[None]}, BITS, MASK)
    total = sum(jnp.sum(x) for x in found.values())
    if found:  # a site of a further plate has no value a row
        np.testing.assert_allclose(total, expected.sum(), rtol=1e-7)

    def loss(strength):
        objective = ebm.MaximumLikelihood()
        return objective.loss(key, {"strength": strength}, network, None, BITS, MASK)

    found = jax.jit(jax.value_and_grad(loss))(strength)
    right = jax.value_and_grad(lambda x: -jnp.mean(expected_of_bits(x)))(strength)
    np.testing.assert_allclose(found, right, rtol=1e-7)


# Gaussian

BASE = np.array([[2.0, 0.6, 0.0], [0.6, 1.5, -0.5], [0.0, -0.5, 1.0]])
FULL = rng.normal(size=(ROWS, D)) @ np.linalg.cholesky(np.linalg.inv(BASE)).T
SEEN = jnp.asarray(np.where(MASK, FULL.T, np.nan))


def gaussian(data, mask):
    scale = numpyro.param("scale", 1.0)
    rows = numpyro.plate("data", data.shape[1], dim=-1)
    with rows, numpyro.plate("units", D, dim=-2):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data, obs_mask=mask)
    with rows:
        ebm.energy("E", 0.5 * scale * jnp.einsum("in,ij,jn->n", v, BASE, v))


def expected_of_normal(scale, values=FULL, mask=MASK):
    """log p of the observed elements of every row, and the score-matching loss of these."""
    covariance = np.linalg.inv(BASE) / scale
    log_p, losses = [], []
    for row, seen in zip(values, mask.T, strict=True):
        block = covariance[np.ix_(seen, seen)]
        precision = np.linalg.inv(block)
        x = row[seen]
        log_det = np.linalg.slogdet(2 * np.pi * block)[1] if seen.any() else 0.0
        log_p.append(-0.5 * x @ precision @ x - 0.5 * log_det)
        losses.append(0.5 * np.sum((precision @ x) ** 2) - np.trace(precision))
    return np.array(log_p), np.array(losses)


@pytest.mark.usefixtures("x64")
def test_coordinates_that_are_missing_are_integrated_out():
    key = jax.random.key(0)
    model = ebm.fixed(gaussian, {"scale": 1.3})
    rows = ebm.log_likelihood(key, model, SEEN, MASK, method="enumerate")
    np.testing.assert_allclose(rows, expected_of_normal(1.3)[0], rtol=1e-6, atol=1e-6)

    @jax.jit
    def loss(scale):
        return ebm.ScoreMatching().loss(key, {"scale": scale}, gaussian, None, SEEN, MASK)

    gap = float(loss(1.7) - loss(1.3))
    right = np.mean(expected_of_normal(1.7)[1] - expected_of_normal(1.3)[1])
    np.testing.assert_allclose(gap, right, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("where", ["seen", "one missing"])
def test_the_elbo_of_the_exact_guide_is_the_marginal_at_every_draw(where):
    mask = np.ones((D, ROWS), bool)
    if where == "one missing":
        mask[np.arange(ROWS) % D, np.arange(ROWS)] = False
    data = jnp.asarray(np.where(mask, FULL.T, np.nan))

    def guide(data, mask):
        numpyro.param("unused", 0.0)
        precision = 1.3 * BASE
        v = jnp.where(mask, ebm.visible("v_observed", data), 0.0)
        mean = -(precision @ v) / jnp.diag(precision)[:, None]
        deviation = jnp.diag(precision)[:, None] ** -0.5
        with numpyro.plate("data", data.shape[1], dim=-1), numpyro.plate("units", D, dim=-2):
            loc, scale = jnp.where(mask, 0.0, mean), jnp.where(mask, 1.0, deviation)
            numpyro.sample("v_unobserved", dist.Normal(loc, scale))

    objective, params = ebm.ScoreMatching(ebm.VaGES(3)), {"scale": jnp.array(1.3)}
    key = jax.random.key(0)
    problem = objective.prepare(key, params, gaussian, guide, (data, mask), {})
    losses = [
        row_guide_loss(Trace_ELBO(), key, params, {"unused": 0.0}, problem, guide)
        for key in jax.random.split(key, 3)
    ]
    site = problem.row_model.visible["v_observed"]
    unread = jnp.sum(reference_log_prob(site.fn, site.value))
    log_z = 0.5 * np.linalg.slogdet(2 * np.pi * np.linalg.inv(1.3 * BASE))[1]
    log_p, _ = expected_of_normal(1.3, mask=mask)
    expected = -(np.mean(log_p) + log_z + unread / ROWS)
    np.testing.assert_allclose(losses, [expected] * 3, rtol=1e-6)


# Every objective: rows that are completed by draws of the reference are draws of the model.

MANY = 6_000
OBJECTIVES = {
    "ConditionalNCE": (ebm.ConditionalNCE(0.8, 2), "v"),
    "KernelRatioMatching of bits": (ebm.KernelRatioMatching(flip_probability=0.3), "x"),
    "EnergyDiscrepancy": (ebm.EnergyDiscrepancy(0.7, 4), "v"),
    "EnergyDiscrepancy of bits": (ebm.EnergyDiscrepancy(num_samples=4, flip_probability=0.3), "x"),
    "PseudoLikelihood": (ebm.PseudoLikelihood(), "x"),
    "DiscreteFisher": (ebm.DiscreteFisher(), "x"),
    "RankingNCE": (ebm.RankingNCE(dist.Normal(0.0, 1.2), 4), "v"),
    "ContrastiveDivergence": (
        ebm.ContrastiveDivergence(lambda m: ebm.MALA(m, step_size=0.3), 2),
        "v",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_vanishes_at_the_truth_with_elements_missing(name):
    objective, site = OBJECTIVES[name]
    rng = np.random.default_rng(1)
    mask = rng.random((D, MANY)) < 0.7
    if site == "v":
        values = rng.normal(size=(MANY, D)) @ np.linalg.cholesky(np.linalg.inv(1.3 * BASE)).T
        model, at, data = gaussian, {"scale": jnp.array(1.3)}, np.where(mask, values.T, np.nan)
    else:
        log_p = 0.35 * np.einsum("is,ij,js->s", STATES, COUPLINGS, STATES) + 0.3 * STATES[0]
        chosen = rng.choice(2**D, MANY, p=np.exp(log_p) / np.exp(log_p).sum())
        model, at, data = (
            network,
            {"strength": jnp.array(0.7)},
            np.where(mask, STATES[:, chosen], 7),
        )
    (parameter,) = at

    @jax.jit
    def gradient(rng_key, data, mask):
        return jax.grad(lambda p: objective.loss(rng_key, p, model, None, data, mask))(at)[
            parameter
        ]

    parts = 30
    found = np.array(
        [
            gradient(key, *batch)
            for key, *batch in zip(
                jax.random.split(jax.random.key(0), parts),
                np.split(data, parts, axis=1),
                np.split(mask, parts, axis=1),
                strict=True,
            )
        ]
    )
    assert abs(found.mean()) < 4 * found.std(ddof=1) / np.sqrt(parts)


# The reference


@pytest.mark.parametrize(
    "fn",
    [
        ebm.Lebesgue(support=constraints.positive),
        ebm.Lebesgue((2,), support=constraints.unit_interval),
        ebm.Lebesgue((3,), support=constraints.ordered_vector),
        ebm.Counting(4),
        ebm.Counting(3, (2,)),
        dist.Poisson(3.0),
        dist.DiscreteUniform(2, 4),
        dist.Normal(5.0, 0.1),
    ],
    ids=lambda fn: f"{type(fn).__name__}-{fn.support}",
)
def test_the_reference_is_normalised(fn):
    """By importance: the mean of q/r over draws of r is one, for another density q."""
    masked = fn.expand((2,)).mask(jnp.array([True, False]))
    draws = jax.vmap(lambda key: draw_reference(key, masked))(
        jax.random.split(jax.random.key(0), 4_000)
    )
    log_r = jax.vmap(lambda x: reference_log_prob(masked, x))(draws)
    assert jnp.all(log_r[:, 0] == 0.0) and bool(jnp.all(masked.support(draws)))
    if fn.support.is_discrete:
        x = np.asarray(draws)[:, 1]
        _, first, counts = np.unique(x, axis=0, return_index=True, return_counts=True)
        p = np.exp(np.asarray(log_r)[first, 1])
        error = np.sqrt(p * (1 - p) / len(x))
        assert np.all(np.abs(counts / len(x) - p) < 4 * error + 1e-3)
        return
    z = dist.biject_to(fn.support).inv(draws[:, 1])
    jacobian = dist.biject_to(fn.support).log_abs_det_jacobian(z, draws[:, 1])
    jacobian = jnp.sum(jnp.reshape(jacobian, (len(z), -1)), -1)
    normal = jnp.sum(jnp.reshape(dist.Normal(0, 1).log_prob(z), (len(z), -1)), -1)
    np.testing.assert_allclose(log_r[:, 1], normal - jacobian, rtol=1e-4, atol=1e-4)
    assert abs(float(jnp.mean(z))) < 4 / np.sqrt(z.size)


def test_a_mask_of_rows_beside_one_of_elements_is_refused_as_what_it_is():
    masked = numpyro.handlers.mask(gaussian, mask=jnp.arange(ROWS) != 2)
    with pytest.raises(
        ebm.ModelError, match="goes with no `obs_mask` of elements, as of .*Leave these rows out"
    ):
        ebm.ScoreMatching().loss(jax.random.key(5), {"scale": 1.3}, masked, None, SEEN, MASK)
