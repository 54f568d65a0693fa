# SPDX-License-Identifier: Apache-2.0
"""The Stein test against its definition, and its size and power."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import oracles
import pytest
from conftest import grbm_guide
from diagnostic_cases import GAUSSIAN, KEY, all_states, chain, conditional, own_grbm
from oracles import LINEAR, assert_unbiased
from scipy.stats import kstest

import numpyro_ebm as ebm

GRBM, GRBM_FIXED, _ = own_grbm()


def exact_draws(rng_key, num, params, data):
    """Draws of h given v, (num, rows, hidden), by NumPy's formula and JAX's numbers."""
    logits = data @ params["W"] + params["c"]
    return {"h": jax.random.bernoulli(rng_key, jax.nn.sigmoid(logits), (num, *logits.shape)) * 1}


def stein(model, data, *args, rng_key=KEY, **options):
    """`stein_test`, quickly compiled."""

    def run(data):
        return ebm.stein_test(rng_key, model, data, *args, **options)

    return oracles.jit(run)(jnp.asarray(data))


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_stein_statistic_is_the_u_statistic(kernel, x64):
    system = oracles.grbm_system(num_rows=7)
    expected = oracles.jit(oracles.stein_discrepancy(system, kernel))(system.params)
    found = stein(GRBM_FIXED, system.data, kernel=kernel)
    np.testing.assert_allclose(found.statistic, expected, rtol=1e-10)
    np.testing.assert_allclose(found.by_row.mean(), expected, rtol=1e-10)
    np.testing.assert_allclose(found.bandwidth, oracles.median_distance(system.data))
    fixed_width = oracles.jit(oracles.stein_discrepancy(system, kernel, 0.7))(system.params)
    found = stein(GRBM_FIXED, system.data, kernel=kernel, bandwidth=0.7)
    np.testing.assert_allclose(found.statistic, fixed_width, rtol=1e-10)


def test_stein_bootstrap_is_the_signed_sum(x64):
    """All signs of four rows: the bootstrap's support, and its mean and variance."""
    data = jnp.asarray(oracles.grbm_system(num_rows=4).data)
    found = stein(GRBM_FIXED, data, num_bootstrap=4_000)
    system = oracles.grbm_system(num_rows=4)
    score = lambda v: oracles.grbm_score(GRBM, v)  # noqa: E731
    kappa = oracles.stein_kernel(score, "imq", oracles.median_distance(system.data))
    pairs = jax.vmap(jax.vmap(kappa, (None, 0)), (0, None))
    table = np.array(oracles.jit(pairs)(data, data))
    np.fill_diagonal(table, 0)
    signs = 1 - 2 * all_states(4)
    sums = np.einsum("si,ij,sj->s", signs, table, signs) / 12
    nearest = np.abs(np.asarray(found.null)[:, None] - sums).min(1)
    assert nearest.max() < 1e-10
    assert_unbiased(np.asarray(found.null)[:, None], [sums.mean()], "bootstrap")
    assert_unbiased(np.asarray(found.null)[:, None] ** 2, [(sums**2).mean()], "its square")
    share = (1 + np.sum(np.asarray(found.null) >= float(found.statistic))) / 4_001
    assert float(found.p_value) == pytest.approx(share)


@pytest.mark.parametrize("kind", ["guide", "draws"])
def test_latent_stein_statistic_is_unbiased(kind):
    """With draws of the exact posterior the statistic has the exact one as its mean."""
    system = oracles.grbm_system(num_rows=6)
    expected = oracles.jit(oracles.stein_discrepancy(system, "imq"))(system.params)
    data = jnp.asarray(system.data)

    def one(rng_key):
        if kind == "guide":
            options = {"guide": system.guide, "marginal": ebm.VaGES(2)}
        else:
            options = {"draws": exact_draws(rng_key, 2, GRBM, data)}
        return ebm.stein_test(rng_key, GRBM_FIXED, data, num_bootstrap=1, **options).statistic

    assert_unbiased(oracles.draws(one, jax.random.key(3), 4_000), [float(expected)], kind)


def p_values(kind, data, kernel="imq", rows_at=KEY):
    """p-values of many data sets under the GRBM, (sets,)."""

    def one(x):
        rng_key, rows = x
        options = {}
        if kind == "guide":
            options = {"guide": oracles.grbm_guide(), "marginal": ebm.VaGES(2)}
        if kind == "draws":
            options = {"draws": exact_draws(jax.random.fold_in(rng_key, 1), 1, GRBM, rows)}
        test = ebm.stein_test(
            rng_key, GRBM_FIXED, rows, kernel=kernel, num_bootstrap=500, **options
        )
        return test.p_value

    keys = jax.random.split(rows_at, len(data))
    return np.asarray(oracles.jit(lambda x: jax.lax.map(one, x))((keys, jnp.asarray(data))))


def grbm_sets(num_sets, num_rows, seed, perturbation=0.0):
    rng = np.random.default_rng(seed)
    shift = perturbation * np.random.default_rng(9).normal(size=GRBM["W"].shape)
    truth = {**GRBM, "W": GRBM["W"] + shift}
    rows = oracles.grbm_draws(truth, num_sets * num_rows, rng)
    return rows.reshape(num_sets, num_rows, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["imq", "rbf"])
@pytest.mark.parametrize("kind", ["exact", "guide", "draws"])
def test_stein_test_has_its_size_and_power(kind, kernel):
    null = p_values(kind, grbm_sets(200, 200, seed=1), kernel)
    rejected = np.sum(null <= 0.05)
    assert 3 <= rejected <= 20, rejected  # Binomial(200, 0.05) leaves this once in 400
    assert kstest(null, "uniform").pvalue > 0.01
    power = np.mean(p_values(kind, grbm_sets(200, 200, seed=2, perturbation=0.4), kernel) <= 0.05)
    assert power > 0.9, power


@pytest.mark.slow
def test_stein_test_with_draws_of_a_kernel_has_its_size():
    """Posterior draws by `sample` and its Markov chains, continuous latents."""
    model = ebm.fixed(oracles.linear_gaussian, LINEAR)
    covariance = LINEAR["A"] @ LINEAR["A"].T + LINEAR["scale"] ** 2 * np.eye(3)

    def one(x):
        rng_key, rows = x
        draws = ebm.sample(rng_key, model, 5, rows, kernel=ebm.MALA(model), num_warmup=100)
        return ebm.stein_test(rng_key, model, rows, num_bootstrap=500, draws=draws).p_value

    run = jax.jit(lambda x: jax.lax.map(one, x))
    rng = np.random.default_rng(4)
    for shift, low, high in ((0.0, 3, 20), (0.6, 180, 200)):
        data = rng.multivariate_normal(LINEAR["b"] + shift, covariance, (200, 100))
        found = run((jax.random.split(KEY, 200), jnp.asarray(data)))
        assert low <= np.sum(np.asarray(found) <= 0.05) <= high


def test_stein_test_tells_a_right_model_from_a_wrong_one():
    null = p_values("exact", grbm_sets(20, 200, seed=1))
    wrong = p_values("exact", grbm_sets(20, 200, seed=2, perturbation=0.4))
    assert np.sum(null <= 0.05) <= 4 and np.sum(wrong <= 0.05) >= 17


@pytest.mark.slow
def test_rows_of_a_chain_want_rare_flips():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(100, 500)) * np.sqrt(1 - 0.9**2)
    chains = np.empty((100, 500))
    chains[:, 0] = rng.normal(size=100)
    for t in range(1, 500):
        chains[:, t] = 0.9 * chains[:, t - 1] + noise[:, t]
    sizes = []
    for flip in (0.5, 0.03):

        def one(rows, flip=flip):
            return ebm.stein_test(KEY, GAUSSIAN, rows, flip_probability=flip).p_value

        sizes.append(np.mean(np.asarray(jax.lax.map(one, jnp.asarray(chains))) <= 0.05))
    assert sizes[0] > 0.3 and sizes[1] < 0.15, sizes


def test_stein_test_in_unconstrained_coordinates(x64):
    system = oracles.gamma_system()
    model = ebm.fixed(oracles.gamma, system.params)
    found = stein(model, system.data)
    expected = oracles.jit(oracles.stein_discrepancy(system, "imq"))(system.params)
    np.testing.assert_allclose(found.statistic, expected, rtol=1e-8)


@pytest.mark.slow
def test_stein_test_does_not_mind_the_order_of_rows():
    data = jnp.asarray(grbm_sets(1, 60, 0)[0])
    one = ebm.stein_test(KEY, GRBM_FIXED, data)
    other = stein(GRBM_FIXED, data[::-1])
    np.testing.assert_allclose(one.statistic, other.statistic, rtol=1e-3)
    np.testing.assert_allclose(one.by_row[::-1], other.by_row, atol=1e-5)
    jitted = stein(GRBM_FIXED, data)
    np.testing.assert_allclose(jitted.p_value, one.p_value, atol=0.005)
    assert one.statistic.dtype == jnp.float32


def spins(data=None):
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Counting(2, event_shape=(3,)), obs=data)
        ebm.energy("E", jnp.sum(v, -1))


@pytest.mark.slow
def test_stein_test_refuses_what_it_cannot_do():
    data = jnp.asarray(oracles.grbm_system().data)
    linear = ebm.fixed(oracles.linear_opaque, LINEAR)
    three = jnp.zeros((4, 3)) + jnp.arange(4.0)[:, None]
    cases = [
        ("free parameter", (oracles.grbm, data), {}),
        ("Hold them", (oracles.grbm, data), {}),
        ("data` is None", (GRBM_FIXED, None), {}),
        ("discrete", (ebm.fixed(spins, {}), jnp.zeros((4, 3), int)), {}),
        ("differs from row to row", (ebm.fixed(conditional, {}), jnp.ones(3), jnp.ones(3)), {}),
        ("only one", (GRBM_FIXED, data[:1]), {}),
        ("draws=", (linear, three), {}),
        ("`kernel`", (GRBM_FIXED, data), {"kernel": "cauchy"}),
        ("`bandwidth`", (GRBM_FIXED, data), {"bandwidth": 0.0}),
        ("`bandwidth`", (GRBM_FIXED, jnp.zeros((5, 2))), {}),
        ("`num_bootstrap`", (GRBM_FIXED, data), {"num_bootstrap": 0}),
        ("`flip_probability`", (GRBM_FIXED, data), {"flip_probability": 0.9}),
        ("model has none", (GAUSSIAN, jnp.ones(3)), {"draws": {"h": jnp.ones((1, 3))}}),
        (r"shape \(draws, 4, 3\), got nothing", (GRBM_FIXED, data), {"draws": {}}),
        (r"got \(2, 5, 3\)", (GRBM_FIXED, data), {"draws": {"h": jnp.ones((2, 5, 3), int)}}),
        (
            "take the place",
            (GRBM_FIXED, data),
            {"draws": {"h": jnp.ones((2, 4, 3), int)}, "marginal": ebm.Enumerated()},
        ),
        ("'A', 'd'", (GRBM_FIXED, data), {"guide": grbm_guide}),
        ("`marginal` must be", (GRBM_FIXED, data), {"marginal": "exact"}),
        ("not finite", (ebm.fixed(bumpy, {}), jnp.array([0.0, 1.0, 2.0])), {}),
    ]
    for message, args, options in cases:
        with pytest.raises(ebm.ModelError, match=message):
            ebm.stein_test(KEY, *args, **options)


def bumpy(data=None):
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", jnp.sqrt(jnp.abs(v)))


@pytest.fixture(scope="module")
def run():
    return chain(ebm.MALA(GRBM_FIXED))
