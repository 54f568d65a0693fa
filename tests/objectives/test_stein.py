# SPDX-License-Identifier: Apache-2.0
"""Kernelised Stein discrepancy against the population, and with each way to a score.

Its formula over every marginal is held in `test_formulas.py`; here the pairs are averaged out.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import oracles
import pytest
from numpyro.distributions import constraints
from oracles import assert_unbiased, draws, flat, jit, z_scores

import numpyro_ebm as ebm
from numpyro_ebm.objectives.stein import _weighted_median

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
TRUTH = {"mean": np.array(0.5), "precision": np.array(1.6)}
AWAY = {"mean": np.array(0.1), "precision": np.array(2.4)}


def normal(data):
    mean = numpyro.param("mean", jnp.array(0.0))
    precision = numpyro.param("precision", jnp.array(1.0), constraint=constraints.positive)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * (v - mean) ** 2)


def arrays(params):
    return jax.tree.map(jnp.asarray, params)


def value_and_gradient(fn):
    return lambda params: flat(jax.value_and_grad(fn)(params))


def loss_of(objective, system, data=None):
    """(rng_key, params) -> loss at the data of a system."""
    data = jnp.asarray(system.data if data is None else data)
    return lambda key, p: objective.loss(key, p, system.model, system.guide, data)


# The population


def population(kernel, width, degree=60):
    """E κ over two independent rows of the truth, by quadrature."""
    x, w = np.polynomial.hermite_e.hermegauss(degree)
    v = jnp.asarray(TRUTH["mean"] + x / np.sqrt(TRUTH["precision"]))[:, None]
    w = w / w.sum()

    def value(p):
        kappa = oracles.stein_kernel(lambda u: p["precision"] * (p["mean"] - u), kernel, width)
        return w @ jax.vmap(lambda x: jax.vmap(lambda y: kappa(x, y))(v))(v) @ w

    return value


@pytest.mark.slow
def test_the_population_value_has_its_closed_form():
    """RBF, data N(0, 1), model N(m, 1): the score differs by m from that of the data, so that
    KSD = m² E k = m² ℓ / √(ℓ² + 2)."""
    shift, width = 0.4, 0.7
    params = {"mean": TRUTH["mean"] + shift, "precision": TRUTH["precision"]}
    value = population("rbf", width)(arrays(params))
    difference, variance = TRUTH["precision"] * shift, 1 / TRUTH["precision"]
    closed = difference**2 * width / np.sqrt(width**2 + 2 * variance)
    np.testing.assert_allclose(value, closed, rtol=1e-9)


@pytest.mark.parametrize("pairs", ["all", "halves"])
@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_value_and_gradient_are_unbiased_for_the_population(kernel, pairs):
    """Over batches of the truth; and there, value and gradient are zero."""
    width, num_rows = 0.8, 6
    objective = ebm.KernelSteinDiscrepancy(kernel=kernel, bandwidth=width, pairs=pairs)
    expected = jit(value_and_gradient(population(kernel, width)))

    def of(params):
        def one(rng_key):
            noise = jax.random.normal(rng_key, (num_rows,))
            data = TRUTH["mean"] + noise / np.sqrt(TRUTH["precision"])
            return value_and_gradient(lambda p: objective.loss(KEY, p, normal, None, data))(params)

        return one

    for name, params in (("away", AWAY), ("truth", TRUTH)):
        exact = np.asarray(expected(arrays(params)))
        if name == "truth":
            np.testing.assert_allclose(exact, 0.0, atol=1e-4 if kernel == "imq" else 1e-9)
            exact = 0.0 * exact
        samples = draws(of(arrays(params)), jax.random.key(1), 20_000)
        assert_unbiased(samples, exact, f"{kernel}, {pairs}, {name}")
        if name == "away":
            assert np.max(np.abs(z_scores(samples, 0.0 * exact))) > 10


@pytest.mark.parametrize("pairs", ["all", "halves"])
def test_a_weighted_kernel_is_a_kernel(pairs):
    """w w' k in the place of k, its derivatives by autodiff."""
    system, weight = oracles.grbm_system(num_rows=4), lambda x: 1 / (1 + jnp.sum(x**2, -1))
    options = {"kernel": "imq", "bandwidth": 0.8, "pairs": pairs, "weight": weight}
    loss = partial(loss_of(ebm.KernelSteinDiscrepancy(**options), system), KEY)
    expected = oracles.stein_discrepancy(system, **options)
    params = arrays(system.params)
    found, expected = (jit(jax.value_and_grad(fn))(params) for fn in (loss, expected))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-8), found, expected)


# The pairs and the bandwidth


@pytest.mark.parametrize("num_rows", [2, 3, 4, 5])
def test_the_median_is_that_of_the_distances(num_rows):
    """Also of an even number of pairs, where it lies between two of them."""
    system = oracles.gaussian_system(num_rows=num_rows)
    params = arrays(system.params)
    for pairs in ["all"] + ["halves"] * (num_rows % 2 == 0):
        width = oracles.median_distance(system.data, pairs)
        values = [
            jit(partial(loss_of(ebm.KernelSteinDiscrepancy(bandwidth=b, pairs=pairs), system), KEY))
            for b in ("median", float(width))
        ]
        np.testing.assert_allclose(*(value(params) for value in values), rtol=1e-12)


@pytest.mark.parametrize("counts", [[1, 2, 1], [3, 1, 2], [1, 1, 4], [2, 0, 2], [5, 1, 1]])
def test_the_weighted_median_is_that_of_repeated_values(counts):
    """Also where one half of the weights ends between two values."""
    x = np.array([2.0, 0.5, 7.0])
    found = _weighted_median(jnp.asarray(x), jnp.asarray(counts, float))
    np.testing.assert_allclose(found, np.median(np.repeat(x, counts)))


@pytest.mark.slow
def test_the_median_is_a_constant_of_the_learning_and_follows_the_units():
    """The data ten times as large, the model with them: the scores shrink by ten, KSD by 100."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=8)
    objective = ebm.KernelSteinDiscrepancy(kernel="imq")
    small = objective.loss(KEY, arrays(AWAY), normal, None, jnp.asarray(data))
    params = {"mean": AWAY["mean"] * 10, "precision": AWAY["precision"] / 100}
    large = objective.loss(KEY, arrays(params), normal, None, jnp.asarray(10 * data))
    np.testing.assert_allclose(small, 100 * large, rtol=1e-10)


def test_rows_permuted_are_the_same_loss_over_all_pairs():
    system = oracles.grbm_system(num_rows=5)
    objective = ebm.KernelSteinDiscrepancy(kernel="imq")
    of = jit(
        lambda data: value_and_gradient(lambda p: objective.loss(KEY, p, system.model, None, data))(
            arrays(system.params)
        )
    )
    data = jnp.asarray(system.data)
    np.testing.assert_allclose(of(data[jnp.array([3, 0, 4, 2, 1])]), of(data), rtol=1e-10)


def test_identical_rows_of_a_pair_are_finite():
    system = oracles.gaussian_system(num_rows=4)
    data = np.concatenate([system.data[:3], system.data[:1]])
    for kernel in ("rbf", "imq"):
        objective = ebm.KernelSteinDiscrepancy(kernel=kernel)
        of = value_and_gradient(partial(loss_of(objective, system, data), KEY))
        expected = oracles.stein_discrepancy(system._replace(data=data), kernel)
        result = jit(of)(arrays(system.params))
        np.testing.assert_allclose(
            result, jit(value_and_gradient(expected))(arrays(system.params)), rtol=1e-9
        )


# Other marginals


def coin_guide(data):
    """A guide that ignores v."""
    with numpyro.plate("data", len(data)):
        numpyro.sample("h", dist.Bernoulli(0.5 * jnp.ones(3)).to_event(1))


@pytest.mark.slow
def test_importance_sampling_from_a_coin_is_consistent_and_biased_for_few_particles():
    """IS-KSD: no guide to learn, and many particles needed."""
    system = oracles.grbm_system(num_rows=3)._replace(guide=coin_guide)
    params = arrays(system.params)
    oracle = oracles.stein_discrepancy(system, bandwidth=0.9)
    expected = np.asarray(jit(value_and_gradient(oracle))(params))
    bias, z = {}, {}
    for particles, num_draws in ((2, 4_000), (16, 4_000), (512, 1_000)):
        marginal = ebm.ImportanceBound(particles)
        loss = loss_of(ebm.KernelSteinDiscrepancy(marginal, bandwidth=0.9), system)

        def one(key, loss=loss):
            return jax.value_and_grad(partial(loss, key))(params)

        samples = draws(one, jax.random.key(2), num_draws)
        bias[particles] = samples.mean(0) - expected
        z[particles] = z_scores(samples, expected)
    norms = {k: np.linalg.norm(x[1:]) for k, x in bias.items()}
    size = np.linalg.norm(expected[1:])
    print(f"gradient {size:.3f}, bias {norms}; value {expected[0]:.3f}, bias", bias)
    assert np.max(np.abs(z[2])) > 10
    assert norms[2] > 0.1 * size
    assert norms[16] < 0.5 * norms[2]
    assert norms[512] < 0.02 * size
    assert abs(bias[512][0]) < 0.02 * abs(expected[0])


def test_vages_without_weights_wants_a_guide_that_reads_v():
    system = oracles.grbm_system()._replace(guide=coin_guide)
    loss = loss_of(ebm.KernelSteinDiscrepancy(ebm.VaGES(2)), system)
    with pytest.raises(ebm.ModelError, match="The guide ignores the visible sites"):
        loss(KEY, arrays(system.params))


@pytest.mark.slow
@pytest.mark.parametrize("pairs", ["all", "halves"])
def test_energy_svi_learns_with_it(pairs):
    """VaGES-KSD of a linear-Gaussian model, guide and all, from minibatches."""
    truth = oracles.LINEAR
    rng = np.random.default_rng(3)
    h, noise = rng.normal(size=(600, 2)), rng.normal(size=(600, 3))
    data = jnp.asarray(truth["b"] + h @ truth["A"].T + truth["scale"] * noise)
    # Two particles let the guide's error feed itself for one seed in three; ten never did.
    objective = ebm.KernelSteinDiscrepancy(ebm.VaGES(10), pairs=pairs)
    svi = ebm.EnergySVI(
        oracles.linear_gaussian,
        oracles.learned_linear_guide,
        optax.adam(optax.cosine_decay_schedule(0.01, 800)),
        objective,
        num_guide_steps=2,
    )
    start = {"A": jnp.asarray(truth["A"] + 0.3 * rng.normal(size=(3, 2)))}
    exact = jit(
        oracles.stein_discrepancy(oracles.linear_system()._replace(data=np.asarray(data[:200])))
    )
    fit = svi.run(KEY, 800, data, batch_size=120, progress_bar=False, init_params=start)
    assert np.all(np.isfinite(fit.losses))
    before = exact({"b": jnp.zeros(3), "scale": jnp.array(1.0), **start})
    after = exact(fit.params)
    print(f"{pairs}: exact KSD {before:.4f} -> {after:.4f}")
    assert abs(after) < 0.2 * before


# Input that is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "laplace"}, r"`kernel` must be one of \['imq', 'rbf'\], got 'laplace'"),
        ({"bandwidth": 0}, "`bandwidth` must be positive, got 0"),
        ({"bandwidth": -0.5}, "`bandwidth` must be positive"),
        ({"bandwidth": float("nan")}, "`bandwidth` must be positive"),
        ({"bandwidth": "mean"}, "`bandwidth` must be a number, positive, got 'mean'"),
        ({"pairs": "some"}, "`pairs` must be 'all', 'square' or 'halves', got 'some'"),
        ({"marginal": "exact"}, "`marginal` must be a marginal"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ebm.ModelError, match=message):
        ebm.KernelSteinDiscrepancy(**options)


@pytest.mark.parametrize(
    ("pairs", "num_rows", "message"),
    [
        ("all", 1, "the batch has only one"),
        ("halves", 1, "the batch has only one"),
        ("halves", 5, "even number of rows, got 5.*even `batch_size`"),
    ],
)
def test_bad_batches(pairs, num_rows, message):
    system = oracles.gaussian_system(num_rows=num_rows)
    with pytest.raises(ebm.ModelError, match=message):
        loss_of(ebm.KernelSteinDiscrepancy(pairs=pairs), system)(KEY, arrays(system.params))


def test_discrete_visibles_are_refused():
    def coin(data):
        logit = numpyro.param("logit", 0.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Counting(), obs=data)
            ebm.energy("E", -logit * v)

    with pytest.raises(ebm.ModelError, match="'v' is discrete"):
        ebm.KernelSteinDiscrepancy().loss(KEY, {"logit": 0.0}, coin, None, jnp.array([0, 1]))
