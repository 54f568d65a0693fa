# SPDX-License-Identifier: Apache-2.0
"""Diagnostics: Stein tests, posterior gaps and energies against closed forms; ArviZ; plots."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import oracles
import pytest
from conftest import grbm_guide
from numpyro.infer import MCMC, NUTS, DiscreteGibbs, Gibbs
from oracles import LINEAR, assert_unbiased
from scipy.special import gammaln
from scipy.stats import gamma as gamma_law
from scipy.stats import kstest

import numpyro_ebm as ebm
from numpyro_ebm.log_normalizers import LogNormalizer

KEY = jax.random.key(0)
# Copies: JAX remembers a NumPy array that a function closes over in the precision it met it in
# first, and other tests meet the originals in double precision.
GRBM = {name: np.array(x) for name, x in oracles.GRBM.items()}
GRBM_FIXED = ebm.fixed(oracles.grbm, GRBM)
FIT = {"A": GRBM["W"], "d": GRBM["c"]}  # the guide's parameters at the exact posterior


def all_states(num_hidden=3):
    return (np.arange(2**num_hidden)[:, None] >> np.arange(num_hidden)) & 1


def exact_draws(rng_key, num, params, data):
    """Draws of h given v, (num, rows, hidden), by NumPy's formula and JAX's numbers."""
    logits = data @ params["W"] + params["c"]
    return {"h": jax.random.bernoulli(rng_key, jax.nn.sigmoid(logits), (num, *logits.shape)) * 1}


# Stein test


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


def gaussian(data=None, *, precision=1.0):
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * v**2)


GAUSSIAN = ebm.fixed(gaussian, {})


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


def conditional(data=None, x=None):
    with numpyro.plate("data", 3):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (v - x) ** 2)


def test_stein_test_refuses_what_it_cannot_do():
    data = jnp.asarray(oracles.grbm_system().data)
    linear = ebm.fixed(oracles.linear_gaussian, LINEAR)
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


# Posterior gap


def shifted_guide(shift, hidden_plate=False):
    return oracles.grbm_guide(np.asarray(shift), hidden_plate=hidden_plate)


SHIFT = np.array([0.5, -0.3, 0.2])


def enumerated(data, shift):
    """log p̃(v, h) and log q(h | v) at all states, (states, rows), by NumPy."""
    h = all_states()
    field = data @ GRBM["W"] + GRBM["c"]  # rows, hidden
    bowl = 0.5 * np.sum(((data - GRBM["b"]) / GRBM["scale"]) ** 2, -1)
    logits = field + shift
    return h @ field.T - bowl, h @ logits.T - np.logaddexp(0, logits).sum(-1)


@pytest.mark.parametrize("plate", [False, True])
def test_gap_is_exact_where_the_latents_are_enumerated(plate, x64):
    data = np.random.default_rng(0).normal(size=(6, 2))
    model = oracles.grbm_plated if plate else oracles.grbm
    gap = ebm.posterior_gap(KEY, model, shifted_guide(SHIFT, plate), GRBM, jnp.asarray(data))
    log_p, log_q = enumerated(data, SHIFT)
    marginal = np.logaddexp.reduce(log_p)
    p, q = np.exp(log_p - marginal), np.exp(log_q)
    kl = np.sum(q * (log_q - np.log(p)), 0)
    assert gap.method == "enumerate" and gap.fisher is None and gap.pareto_k is None
    np.testing.assert_allclose(gap.kl, kl, rtol=1e-8)
    np.testing.assert_allclose(gap.value, kl.mean(), rtol=1e-8)
    assert float(gap.standard_error) == 0
    np.testing.assert_allclose(gap.log_marginal, marginal, rtol=1e-8)
    np.testing.assert_allclose(gap.elbo, marginal - kl, rtol=1e-8)
    np.testing.assert_allclose(gap.tv, 0.5 * np.abs(p - q).sum(0), rtol=1e-8)
    np.testing.assert_allclose(gap.tv_bound, np.sqrt(kl / 2), rtol=1e-8)
    np.testing.assert_allclose(gap.ess, 1_000 / np.sum(p**2 / q, 0), rtol=1e-8)
    assert np.all(gap.tv <= gap.tv_bound)
    # The score given h, (states, rows, visible): W h and a part without h.
    score = (all_states() @ GRBM["W"].T)[:, None] - (data - GRBM["b"]) / GRBM["scale"] ** 2
    bias = np.linalg.norm(np.einsum("sr,srd->rd", q - p, score), axis=-1)
    width = np.linalg.norm(score.max(0) - score.min(0), axis=-1)
    np.testing.assert_allclose(gap.vaes.bias, bias, rtol=1e-8)
    np.testing.assert_allclose(gap.vaes.range_bound, width * gap.tv, rtol=1e-8)
    largest = np.linalg.norm(score, axis=-1).max(0)
    np.testing.assert_allclose(gap.vaes.norm_bound, 2 * largest * gap.tv, rtol=1e-8)
    assert gap.vages is None


def exact_vages_bias(data, shift):
    """Norm of the bias of VaGES over all parameters, by autodiff of closed forms."""
    h = jnp.asarray(all_states(), float)

    def log_joint(p, v):
        return h @ (p["c"] + v @ p["W"]) - 0.5 * jnp.sum(((v - p["b"]) / p["scale"]) ** 2)

    def one(v, log_q):
        q = jnp.exp(log_q)

        def estimate(p, v):  # Σ q and half the variance under q of log p̃
            x = log_joint(p, v) - jax.lax.stop_gradient(log_joint(p, v))
            return q @ x + 0.5 * (q @ x**2 - (q @ x) ** 2)

        exact = lambda p, v: jax.nn.logsumexp(log_joint(p, v))  # noqa: E731
        gradient = jax.jacrev(jax.grad(estimate, 1))(GRBM, v)
        exact = jax.jacrev(jax.grad(exact, 1))(GRBM, v)
        squares = jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2), gradient, exact)
        return jnp.sqrt(sum(jax.tree.leaves(squares)))

    _, log_q = enumerated(data, shift)
    return np.asarray(oracles.jit(jax.vmap(one))(jnp.asarray(data), jnp.asarray(log_q.T)))


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.02, 0.3])
def test_bias_bounds_bound_the_bias(delta, x64):
    data = 1.5 * np.random.default_rng(1).normal(size=(40, 2))
    shift = delta * np.random.default_rng(2).normal(size=3)
    guide = shifted_guide(shift)
    gap = ebm.posterior_gap(KEY, oracles.grbm, guide, GRBM, jnp.asarray(data), gradient=True)
    np.testing.assert_allclose(gap.vages.bias, exact_vages_bias(data, shift), rtol=1e-6)
    for bound in (gap.vaes, gap.vages):
        assert np.all(bound.bias > 0)
        assert np.all(bound.bias <= bound.range_bound)
        assert np.all(bound.bias <= bound.norm_bound)


def test_bias_goes_like_the_root_of_kl(x64):
    data = jnp.asarray(1.5 * np.random.default_rng(1).normal(size=(40, 2)))
    direction = np.random.default_rng(2).normal(size=3)
    gaps = [
        ebm.posterior_gap(KEY, oracles.grbm, shifted_guide(d * direction), GRBM, data)
        for d in (0.01, 0.1)
    ]
    slope = np.diff([np.log(np.mean(g.vaes.bias)) for g in gaps]) / np.diff(
        [np.log(float(g.value)) for g in gaps]
    )
    assert slope == pytest.approx(0.5, abs=0.03)


def test_the_exact_posterior_has_no_gap(x64):
    data = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
    for options in ({}, {"max_states": 0}):
        gap = ebm.posterior_gap(
            KEY, GRBM_FIXED, oracles.learned_grbm_guide, FIT, data, num_particles=50, **options
        )
        np.testing.assert_allclose(gap.kl, 0, atol=1e-10)
        np.testing.assert_allclose(gap.ess, 50, rtol=1e-8)
        np.testing.assert_allclose(gap.vaes.bias, 0, atol=1e-6 if not options else 0.5)


def gaps(rng_keys, fields, *args, **options):
    """Fields of the gaps at many keys, keys leading."""

    def one(rng_key):
        gap = ebm.posterior_gap(rng_key, *args, **options)
        return tuple(getattr(gap, name) for name in fields)

    return [np.asarray(x) for x in oracles.jit(lambda keys: jax.lax.map(one, keys))(rng_keys)]


def test_gap_from_particles_with_an_exact_marginal():
    data = np.random.default_rng(0).normal(size=(4, 2))
    log_p, log_q = enumerated(data, SHIFT)
    exact = np.sum(np.exp(log_q) * (log_q - log_p), 0) + np.logaddexp.reduce(log_p)
    args = oracles.grbm, shifted_guide(SHIFT), GRBM, jnp.asarray(data)
    options = dict(num_particles=200, max_states=0)
    fields = "kl", "kl_error", "value", "standard_error"
    kl, error, value, standard_error = gaps(jax.random.split(KEY, 200), fields, *args, **options)
    z = (kl - exact) / error
    assert abs(z.mean()) < 4 / np.sqrt(z.size) and 0.85 < z.std() < 1.15
    z = (value - exact.mean()) / standard_error
    assert 0.8 < z.std() < 1.2
    gap = ebm.posterior_gap(KEY, *args, **options)
    assert gap.method == "marginal" and np.shape(gap.pareto_k) == (4,)


def test_gap_of_continuous_latents():
    """Gaussian q against a Gaussian posterior: closed forms for KL and the Fisher gap."""
    system = oracles.linear_system(num_rows=5)
    model, std = ebm.fixed(oracles.linear_gaussian, LINEAR), oracles.exact_linear_guide()["std"]
    noise, shift = 0.8, 0.2
    kl = np.sum(-np.log(noise) + 0.5 * (noise**2 + (shift / std) ** 2) - 0.5)
    fisher = 0.5 * np.sum((noise * std) ** 2 * (1 - noise**-2) ** 2 / std**4 + shift**2 / std**4)
    args = model, oracles.linear_guide(noise=noise, shift=shift), {}, jnp.asarray(system.data)
    large = ebm.posterior_gap(jax.random.key(1), *args, num_particles=5_000)
    assert large.method == "importance" and large.vages is None
    assert np.all(np.abs(large.kl - kl) < 4 * large.kl_error + 0.01)
    assert np.all(np.abs(large.fisher - fisher) < 4 * large.fisher_error)
    assert np.all(large.pareto_k < 0.7) and np.all(large.ess > 1_000)
    # A lower bound in the mean, which rises with the particles.
    keys = jax.random.split(KEY, 200)
    few, more = (gaps(keys, ("value",), *args, num_particles=n)[0].mean() for n in (2, 20))
    assert few < more - 0.02 < kl - 0.02
    wide = model, oracles.linear_guide(noise=1.3, shift=0.2), {}, args[-1]
    found, error = gaps(keys, ("kl", "kl_error"), *wide, num_particles=100)
    np.testing.assert_allclose(error.mean(), found.std(0).mean(), rtol=0.1)
    # The score is linear in h: its bias is A times the shift of the mean, whatever the noise.
    bias = np.linalg.norm(LINEAR["A"] @ np.full(2, shift)) / LINEAR["scale"] ** 2
    np.testing.assert_allclose(large.vaes.bias, bias, rtol=0.25)
    assert np.all(large.vaes.bias < large.vaes.range_bound)
    exact = ebm.posterior_gap(KEY, model, system.guide, {}, jnp.asarray(system.data))
    np.testing.assert_allclose(exact.kl, 0, atol=1e-4)
    np.testing.assert_allclose(exact.fisher, 0, atol=1e-6)
    narrow = oracles.linear_guide(noise=0.3)
    narrow = ebm.posterior_gap(KEY, model, narrow, {}, jnp.asarray(system.data))
    assert np.mean(narrow.pareto_k) > 0.7 > np.max(large.pareto_k)


def test_tails_of_weights():
    """Weights that are Pareto distributed have the shape 1/α, heavy tails included."""
    from numpyro_ebm.diagnostics.gap.posterior import _pareto_shapes

    rng = np.random.default_rng(0)
    shapes = np.array([0.2, 0.5, 0.9, 2.0])
    log_w = shapes * rng.exponential(size=(20_000, 4))
    np.testing.assert_allclose(_pareto_shapes(jnp.asarray(log_w)), shapes, atol=0.15)
    assert np.all(_pareto_shapes(jnp.zeros((100, 2))) == 0)
    assert np.all(_pareto_shapes(jnp.zeros((20, 2))) == np.inf)


def test_gap_of_discrete_visibles_has_no_scores():
    def model(data=None):
        with numpyro.plate("data", 1 if data is None else len(data)):
            v = numpyro.sample("v", ebm.Counting(2, event_shape=(3,)), obs=data)
            h = numpyro.sample("h", ebm.Counting(3))
            ebm.energy("E", -h * jnp.sum(v, -1))

    def guide(data=None):
        with numpyro.plate("data", len(data)):
            v = ebm.visible("v", data)
            numpyro.sample("h", dist.Categorical(logits=jnp.stack([0.0 * v[:, 0]] * 3, -1)))

    data = jnp.array([[0, 0, 0], [1, 1, 0]])
    gap = ebm.posterior_gap(KEY, ebm.fixed(model, {}), guide, {}, data)
    p = np.exp(np.outer(data.sum(-1), np.arange(3)))
    expected = -np.log(3) - np.mean(np.log(p / p.sum(-1, keepdims=True)), -1)
    np.testing.assert_allclose(gap.kl, expected, atol=1e-5)
    assert gap.vaes is None


def test_gap_refuses_what_it_cannot_do():
    data = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))

    def auxiliary(data=None):
        with numpyro.plate("data", len(data)):
            ebm.visible("v", data)
            x = numpyro.sample("x", dist.Normal(0, 1))
            numpyro.sample("h", dist.Bernoulli(logits=x[:, None] * jnp.ones(3)).to_event(1))

    guide = oracles.learned_grbm_guide
    cases = [
        ("'A', 'd'", (GRBM_FIXED, guide, {}, data), {}),
        ("'W', 'b', 'c', 'scale'", (oracles.grbm, guide, FIT, data), {}),
        ("must be a dict", (GRBM_FIXED, guide, data), {}),
        ("`guide` must be", (GRBM_FIXED, None, FIT, data), {}),
        ("observes nothing", (GRBM_FIXED, guide, FIT), {}),
        ("no latent sites", (GAUSSIAN, guide, FIT, jnp.ones(3)), {}),
        ("num_particles", (GRBM_FIXED, guide, FIT, data), {"num_particles": 1}),
        ("gradient=True", (GRBM_FIXED, guide, FIT, data), {"gradient": True}),
        ("draws 'x'", (GRBM_FIXED, auxiliary, FIT, data), {}),
        ("does not draw", (GRBM_FIXED, lambda data=None: None, FIT, data), {}),
    ]
    for message, args, options in cases:
        with pytest.raises(ebm.ModelError, match=message):
            ebm.posterior_gap(KEY, *args, **options)


# Energies


def test_energies_of_data_and_samples():
    rng = np.random.default_rng(0)
    data, draws = (oracles.grbm_draws(GRBM, n, rng) for n in (40, 130))
    energy = lambda x: -np.array([oracles.grbm_log_density(GRBM, v) for v in x])  # noqa: E731
    gap = ebm.energy_gap(KEY, GRBM_FIXED, jnp.asarray(data), jnp.asarray(draws))
    np.testing.assert_allclose(gap.data, energy(data), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gap.samples, energy(draws), rtol=1e-4, atol=1e-5)
    assert gap.difference == pytest.approx(gap.data.mean() - gap.samples.mean(), abs=1e-5)
    error = np.sqrt(np.var(gap.data, ddof=1) / 40 + np.var(gap.samples, ddof=1) / 130)
    assert gap.standard_error == pytest.approx(error, rel=1e-5)
    both = np.sort(np.concatenate([gap.data, gap.samples]))
    cdf = lambda x: np.searchsorted(np.sort(x), both, side="right") / len(x)  # noqa: E731
    assert gap.statistic == pytest.approx(np.abs(cdf(gap.data) - cdf(gap.samples)).max())
    # What `sample` returns: draws of a plate, other sites aside.
    by_rows = {"v": draws.reshape(65, 2, 2), "h": jnp.zeros((65, 2, 3))}
    again = ebm.energy_gap(KEY, GRBM_FIXED, jnp.asarray(data), by_rows)
    np.testing.assert_allclose(again.samples, gap.samples, rtol=1e-5)
    far = ebm.energy_gap(KEY, GRBM_FIXED, jnp.asarray(data) + 2, draws)
    assert far.difference > 5 * far.standard_error and far.p_value < 1e-3 < gap.p_value


def test_energies_on_bounded_supports_are_those_of_the_site():
    params = {"a": np.array(2.5), "rate": np.array(1.3)}
    data = np.random.default_rng(0).gamma(2.0, size=4)
    gap = ebm.energy_gap(KEY, ebm.fixed(oracles.gamma, params), jnp.asarray(data), data)
    np.testing.assert_allclose(gap.data, 1.3 * data - 1.5 * np.log(data), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gap.samples, gap.data, rtol=1e-5)
    assert gap.statistic == 0 and gap.p_value == 1


def test_energies_under_a_bound_and_with_covariates():
    system = oracles.linear_system(num_rows=5)
    model, data = ebm.fixed(oracles.linear_gaussian, LINEAR), jnp.asarray(system.data)
    gap = ebm.energy_gap(
        KEY, model, data, data, marginal=ebm.ImportanceBound(3), guide=system.guide
    )  # the exact posterior: no gap in the bound
    energy = -np.array([oracles.linear_log_density(LINEAR, v) for v in system.data])
    np.testing.assert_allclose(np.diff(gap.data), np.diff(energy), atol=1e-3)
    np.testing.assert_allclose(gap.samples, gap.data, atol=1e-3)
    regression, x = ebm.fixed(conditional, {}), jnp.arange(3.0)
    gap = ebm.energy_gap(KEY, regression, x, {"v": jnp.tile(x + 1, (4, 1))}, x)
    np.testing.assert_allclose(gap.samples, 0.5)
    with pytest.raises(ebm.ModelError, match="must be of the 3 rows"):
        ebm.energy_gap(KEY, regression, x, {"v": jnp.ones((4, 2))}, x)


def test_energy_gap_refuses_what_it_cannot_do():
    data = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
    guide = oracles.learned_grbm_guide
    cases = [
        ("free parameter", (oracles.grbm, data, data), {}),
        ("lack the visible site 'v'", (GRBM_FIXED, data, {"h": data}), {}),
        (
            r"shape \(4, 2, 3\); it should be \(draws, 3, 2\)",
            (GRBM_FIXED, data, jnp.ones((4, 2, 3))),
            {},
        ),
        (
            "derivatives only",
            (GRBM_FIXED, data, data),
            {"marginal": ebm.VaGES(), "guide": guide, "guide_params": FIT},
        ),
        ("ImportanceBound", (GRBM_FIXED, data, data), {"guide": guide}),
        ("not finite", (GRBM_FIXED, data, jnp.full((4, 2), jnp.inf)), {}),
        (
            "`samples` as a dict",
            (ebm.fixed(two_sites, {}), {"a": data[:, 0], "b": data[:, 1]}, data),
            {},
        ),
    ]
    for message, args, options in cases:
        with pytest.raises(ebm.ModelError, match=message):
            ebm.energy_gap(KEY, *args, **options)


def two_sites(data=None):
    with numpyro.plate("data", 1 if data is None else len(data["a"])):
        a = numpyro.sample("a", ebm.Lebesgue(), obs=None if data is None else data["a"])
        b = numpyro.sample("b", ebm.Lebesgue(), obs=None if data is None else data["b"])
        ebm.energy("E", 0.5 * a**2 + 0.5 * (b - a) ** 2)


# ArviZ


def groups_of(idata):
    return {str(g).strip("/") for g in (idata.groups() if callable(idata.groups) else idata.groups)}


def chain(kernel, num_chains=2, num_samples=60, extra_fields=(), args=()):
    mcmc = MCMC(
        kernel,
        num_warmup=40,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method=jax.vmap if isinstance(kernel, Gibbs) else "vectorized",
        progress_bar=False,
    )
    mcmc.run(KEY, *args, extra_fields=extra_fields)
    return mcmc


@pytest.fixture(scope="module")
def run():
    return chain(ebm.MALA(GRBM_FIXED))


@pytest.fixture(scope="module")
def held_out():
    return oracles.grbm_draws(GRBM, 30, np.random.default_rng(3))


LOG_Z = float(ebm.models.grbm_log_normalizer(GRBM))


def log_likelihood(data):
    return np.array([oracles.grbm_log_density(GRBM, v) for v in data]) - LOG_Z


def test_log_likelihood_only_with_log_z(run, held_out):
    import arviz as az

    plain = ebm.to_arviz(run, observed=jnp.asarray(held_out))
    assert groups_of(plain) - {""} == {
        "posterior",
        "sample_stats",
        "posterior_predictive",
        "observed_data",
    }
    with pytest.raises((TypeError, ValueError, AttributeError, KeyError)):
        az.loo(plain)
    log_z = LogNormalizer(LOG_Z, 0.02, 500.0, "ais", "below")
    idata = ebm.to_arviz(run, log_normalizer=log_z, observed=jnp.asarray(held_out))
    rows = idata["log_likelihood"]["v"]
    assert rows.dims == ("chain", "draw", "data") and rows.shape == (2, 60, 30)
    np.testing.assert_allclose(
        rows.values, np.broadcast_to(log_likelihood(held_out), (2, 60, 30)), rtol=1e-5
    )
    assert np.all(rows.values == rows.values[0, 0])  # no draw depends on a row
    attrs = idata["log_likelihood"].attrs
    assert attrs["log_normalizer"] == LOG_Z and attrs["log_normalizer_mcse"] == 0.02
    assert (attrs["log_normalizer_method"], attrs["log_normalizer_bias"]) == ("ais", "below")
    np.testing.assert_array_equal(idata["observed_data"]["v"].values, held_out.astype("float32"))
    drawn = run.get_samples(group_by_chain=True)["v"]
    np.testing.assert_array_equal(idata["posterior_predictive"]["v"].values, drawn)

    plain_number = ebm.to_arviz(run, log_normalizer=LOG_Z, observed=jnp.asarray(held_out))
    assert np.isnan(plain_number["log_likelihood"].attrs["log_normalizer_mcse"])


def some_draws(num, rows=1):
    rng = np.random.default_rng(7)
    v = oracles.grbm_draws(GRBM, num * rows, rng).reshape(num, rows, 2)
    return {"v": v, "h": rng.integers(0, 2, (num, rows, 3))}


def test_log_likelihood_of_what_was_observed(held_out):
    """h given v: one log-likelihood a row, whatever h; one log Z for each row works as well."""
    data, h = jnp.asarray(held_out[:5]), {"h": some_draws(120, 5)["h"]}
    idata = ebm.to_arviz(h, GRBM_FIXED, data, log_normalizer=np.full(5, LOG_Z))
    expected = np.broadcast_to(log_likelihood(held_out[:5]), (1, 120, 5))
    np.testing.assert_allclose(idata["log_likelihood"]["v"].values, expected, rtol=1e-4)
    assert idata["posterior"]["h"].shape == (1, 120, 5, 3)
    assert "posterior_predictive" not in groups_of(idata)
    idata = ebm.to_arviz(h, GRBM_FIXED, data, fantasies=some_draws(40))
    assert set(idata["posterior_predictive"]) == {"v"}
    assert idata["posterior_predictive"]["v"].shape == (1, 40, 1, 2)
    assert "log_likelihood" not in groups_of(idata)


def test_log_likelihood_of_continuous_latents_is_given():
    system = oracles.linear_system(num_rows=5)
    model, data = ebm.fixed(oracles.linear_gaussian, LINEAR), jnp.asarray(system.data)
    draws = {"h": np.random.default_rng(0).normal(size=(10, 5, 2))}
    with pytest.raises(ebm.ModelError, match="log_likelihood=numpyro_ebm.log_likelihood"):
        ebm.to_arviz(draws, model, data, log_normalizer=0.0)
    idata = ebm.to_arviz(draws, model, data, log_likelihood=np.arange(5.0))
    values = idata["log_likelihood"]["v"].values
    assert values.shape == (1, 10, 5)
    np.testing.assert_allclose(values[0, 0], np.arange(5), atol=1e-5)
    assert np.isnan(idata["log_likelihood"].attrs["log_normalizer"])


def test_log_z_and_log_likelihood_of_the_library(held_out):
    """What `log_normalizer` and `log_likelihood` return goes in as it is."""
    data = jnp.asarray(held_out)
    log_z = ebm.log_normalizer(KEY, GRBM_FIXED)
    by_row = ebm.log_likelihood(KEY, GRBM_FIXED, data, log_normalizer=log_z, with_error=True)
    for known in ({"log_normalizer": log_z}, {"log_likelihood": by_row}):
        idata = ebm.to_arviz(some_draws(40), GRBM_FIXED, observed=data, **known)
        rows = idata["log_likelihood"]
        np.testing.assert_allclose(rows["v"].values[0, 0], log_likelihood(held_out), rtol=1e-4)
        assert rows.attrs["log_normalizer_method"] == "enumerate"
        assert rows.attrs["log_normalizer_mcse"] == 0


def test_log_likelihood_on_a_bounded_support():
    params = {"a": np.array(2.5), "rate": np.array(1.3)}
    data = np.random.default_rng(0).gamma(2.0, size=4)
    log_z = gammaln(2.5) - 2.5 * np.log(1.3)
    model = ebm.fixed(oracles.gamma, params)
    idata = ebm.to_arviz(
        {"v": np.ones((100, 1))}, model, log_normalizer=log_z, observed=jnp.asarray(data)
    )
    expected = gamma_law(2.5, scale=1 / 1.3).logpdf(data)
    np.testing.assert_allclose(idata["log_likelihood"]["v"].values[0, 0], expected, atol=1e-4)


FIELDS = {
    "MALA": (ebm.MALA, {"step_size", "acceptance_rate", "diverging", "lp"}),
    "UnderdampedLangevin": (
        ebm.UnderdampedLangevin,
        {"step_size", "acceptance_rate", "diverging", "hamiltonian_energy"},
    ),
    "MCLMC": (ebm.MCLMC, {"step_size", "acceptance_rate", "diverging", "n_steps"}),
    "ReplicaExchange": (
        ebm.ReplicaExchange,
        {"step_size", "acceptance_rate", "diverging", "swap_prob", "mean_swap_prob"},
    ),
    "BlockGibbs": (ebm.BlockGibbs, {"lp"}),
    "NUTS": (NUTS, {"step_size", "acceptance_rate", "diverging", "n_steps"}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Some algorithms will automatically enumerate:FutureWarning")
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("MALA", "ReplicaExchange") else pytest.param(name, marks=pytest.mark.slow)
        for name in FIELDS
    ],
)
def test_statistics_of_every_kernel(name):
    kernel, expected = FIELDS[name]
    extra = {
        "MCLMC": ("num_steps",),
        "ReplicaExchange": ("swap_prob",),
        "NUTS": ("num_steps", "accept_prob", "adapt_state.mass_matrix_sqrt", "diverging"),
    }.get(name, ())
    model = ebm.fixed(oracles.grbm_plated, GRBM) if name == "NUTS" else GRBM_FIXED
    mcmc = chain(kernel(model), extra_fields=extra)
    stats = ebm.to_arviz(mcmc)["sample_stats"]
    assert expected | {"energy", "row_energy"} <= set(stats)
    assert stats["energy"].shape == (2, 60)
    draws = {k: np.asarray(x) for k, x in mcmc.get_samples(group_by_chain=True).items()}
    v = draws["v"].reshape(-1, 2)
    if "h" in draws:
        bowl = 0.5 * np.sum(((v - GRBM["b"]) / GRBM["scale"]) ** 2, -1)
        energy = bowl - np.sum(draws["h"].reshape(-1, 3) * (v @ GRBM["W"] + GRBM["c"]), -1)
    else:
        energy = -np.array([oracles.grbm_log_density(GRBM, x) for x in v])
    np.testing.assert_allclose(stats["energy"].values.ravel(), energy, rtol=1e-3, atol=1e-3)
    final = getattr(mcmc.last_state, "adapt_state", None)
    if final is not None:
        step = np.asarray(final.step_size)
        np.testing.assert_array_equal(stats["step_size"].values[:, -1], step)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable:UserWarning")
def test_statistics_of_the_blocks_of_gibbs():
    kernel = Gibbs([(NUTS(GRBM_FIXED), ["v"]), (DiscreteGibbs(GRBM_FIXED), ["h"])])
    stats = ebm.to_arviz(chain(kernel, extra_fields=("block_states.0.accept_prob",)))[
        "sample_stats"
    ]
    assert stats["block_states_0_step_size"].shape == (2, 60)
    assert stats["block_states_0_acceptance_rate"].shape == (2, 60)


@pytest.fixture(scope="module")
def persistent():
    data = jnp.asarray(oracles.grbm_draws(GRBM, 30, np.random.default_rng(5)))
    objective = ebm.ContrastiveDivergence(ebm.BlockGibbs, persistent=True)
    svi = ebm.EnergySVI(oracles.grbm, None, optax.adam(0.01), objective)
    return svi.run(jax.random.key(1), 50, data, batch_size=6, progress_bar=False), data


def test_a_fit_with_persistent_chains(persistent):
    import arviz as az

    fit, data = persistent
    idata = ebm.to_arviz(fit, oracles.grbm, data)
    chains = fit.state.objective_state
    v = idata["posterior"]["v"]
    assert v.dims == ("chain", "draw", "data", "v_dim_0") and v.shape == (6, 12, 1, 2)
    # The last round that is remembered: the 48th of 50, at place 11 of the ring.
    np.testing.assert_array_equal(v.values[:, -1, 0], np.asarray(chains.history)[11, :, :2])
    energy = idata["sample_stats"]["energy"]
    np.testing.assert_array_equal(energy.values[:, -1], np.asarray(chains.history)[11, :, -1])
    np.testing.assert_array_equal(idata["training"]["loss"].values, fit.losses)
    assert idata["training"]["loss"].dims == ("step",)
    np.testing.assert_array_equal(idata["constant_data"]["W"].values, fit.params["W"])
    assert "v[0, 0]" in az.summary(idata).index
    assert ebm.to_arviz(fit)["posterior"]["visible"].shape == (6, 12, 2)
    with pytest.raises(ebm.ModelError, match="2 coordinates, and a row of this model has 1"):
        ebm.to_arviz(fit, gaussian, jnp.zeros(6))


def test_a_fit_without_chains(held_out):

    data = jnp.asarray(held_out)
    svi = ebm.EnergySVI(oracles.grbm, None, optax.adam(0.01), ebm.DenoisingScoreMatching(0.1))
    fit = svi.run(KEY, 20, data, progress_bar=False)
    assert groups_of(ebm.to_arviz(fit)) - {""} == {"posterior", "training"}
    idata = ebm.to_arviz(
        fit,
        oracles.grbm,
        data,
        log_normalizer=ebm.models.grbm_log_normalizer(fit.params),
        fantasies=some_draws(50),
    )
    assert idata["posterior"]["W"].shape == (1, 1, 2, 3)
    assert idata["posterior_predictive"]["v"].shape == (1, 50, 1, 2)
    exact = np.asarray(ebm.models.grbm_log_likelihood(fit.params, data))
    np.testing.assert_allclose(idata["log_likelihood"]["v"].values[0, 0], exact, rtol=1e-5)


@pytest.mark.slow
def test_bounded_supports_of_persistent_chains():
    data = jnp.asarray(np.random.default_rng(0).gamma(2.0, size=8), jnp.float32)
    objective = ebm.ContrastiveDivergence(
        lambda model: ebm.MALA(model, step_size=0.1), persistent=True
    )
    fit = ebm.EnergySVI(oracles.gamma, None, optax.adam(0.001), objective).run(
        KEY, 8, data, progress_bar=False
    )
    v = ebm.to_arviz(fit, oracles.gamma, data)["posterior"]["v"].values
    u = np.asarray(fit.state.objective_state.history)[:2, :, 0].T
    np.testing.assert_allclose(v[..., 0], np.exp(u), rtol=1e-5)


def test_to_arviz_refuses_what_it_cannot_do(run, held_out, persistent):
    data, h = jnp.asarray(held_out), {"h": some_draws(5, 30)["h"]}
    cases = [
        ("observed rows, and there are none", (run,), {"log_normalizer": LOG_Z}),
        ("itself observed", (h, GRBM_FIXED, data), {"observed": data}),
        ("has shape", (run,), {"observed": data, "log_normalizer": jnp.zeros(3)}),
        ("has shape", (run,), {"observed": data, "log_likelihood": jnp.zeros(3)}),
        (
            "not both",
            (run,),
            {"observed": data, "log_likelihood": jnp.zeros(30), "log_normalizer": LOG_Z},
        ),
        ("must be a dict", (run,), {"fantasies": data}),
        ("none of the visible", (run,), {"fantasies": {"h": data}, "observed": data}),
        ("takes an MCMC", (data,), {}),
        ("needs the model", (persistent[0],), {"observed": data}),
        ("needs its data", (persistent[0], oracles.grbm), {}),
        ("needs? the model", (persistent[0], None, data), {}),
    ]
    for message, args, options in cases:
        with pytest.raises(ebm.ModelError, match=message):
            ebm.to_arviz(*args, **options)


@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping:DeprecationWarning")
def test_arviz_plots_run(run, held_out):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import arviz as az
    import matplotlib.pyplot as plt

    idata = ebm.to_arviz(run, observed=jnp.asarray(held_out))
    az.plot_energy(idata)
    az.plot_trace(idata)
    plt.close("all")


# Plots


@pytest.fixture
def ax():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt.subplots()[1]
    plt.close("all")


def test_plot_of_a_density(ax):
    limits = dict(xlim=(-4.0, 6.0), ylim=(-5.0, 8.0), num=120)
    assert ebm.plots.density(GRBM_FIXED, ax=ax, log_normalizer=LOG_Z, **limits) is ax
    shown = np.asarray(ax.collections[0].get_array()).reshape(120, 120)
    x, y = np.linspace(-4, 6, 120), np.linspace(-5, 8, 120)
    at = np.array([x[70], y[50]])  # y leads
    assert shown[50, 70] == pytest.approx(np.exp(log_likelihood([at])[0]), rel=1e-3)
    assert np.trapezoid(np.trapezoid(shown, x, axis=1), y) == pytest.approx(1, abs=0.01)
    assert ax.get_xlim() == (-4, 6) and len(ax.figure.axes) == 2
    framed = ebm.plots.density(GRBM_FIXED, colorbar=False, **limits)
    other = np.asarray(framed.collections[0].get_array()).reshape(120, 120)
    assert framed is not ax and len(framed.figure.axes) == 1
    np.testing.assert_allclose(other, shown, rtol=0.01, atol=1e-6)
    energy = ebm.plots.density(GRBM_FIXED, kind="energy", **limits)
    shown = np.asarray(energy.collections[0].get_array()).reshape(120, 120)
    assert shown.min() == 0
    difference = shown[50, 70] - shown[20, 30]
    exact = np.subtract(*log_likelihood([[x[30], y[20]], [x[70], y[50]]]))
    assert difference == pytest.approx(exact, rel=1e-3)


def test_plot_of_chains(ax, run):
    assert ebm.plots.chains(run, GRBM_FIXED, ax=ax, num=30) is ax
    paths = [line for line in ax.lines if len(line.get_xdata()) > 1]
    drawn = np.asarray(run.get_samples(group_by_chain=True)["v"])
    assert len(paths) == 2
    np.testing.assert_allclose(paths[1].get_xydata(), drawn[1, :, 0], rtol=1e-6)
    assert len(ax.collections) >= 2  # the landscape
    rows = np.arange(24.0).reshape(1, 4, 3, 2)  # rows are chains
    found = ebm.plots.chains({"v": rows, "h": np.zeros((1, 4, 3, 5))}, max_chains=3)
    paths = [line for line in found.lines if len(line.get_xdata()) > 1]
    np.testing.assert_array_equal(paths[2].get_xydata(), rows[0, :, 2])


def test_plots_of_energies_and_training(ax):
    data = oracles.grbm_draws(GRBM, 50, np.random.default_rng(0))
    gap = ebm.energy_gap(KEY, GRBM_FIXED, jnp.asarray(data), data[:20])
    assert ebm.plots.energies(gap, ax=ax, bins=10) is ax
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["data", "samples"]
    bars = ax.patches[:10]
    assert sum(bar.get_width() * bar.get_height() for bar in bars) == pytest.approx(1)
    losses = np.random.default_rng(0).normal(size=500)
    line = ebm.plots.training(losses, window=10).lines[0]
    np.testing.assert_allclose(line.get_ydata()[-1], losses[-10:].mean())
    np.testing.assert_allclose(line.get_xdata()[[0, -1]], [10, 500])


def test_plot_of_samples(ax):
    images = np.arange(5 * 6.0).reshape(5, 2, 3)
    assert ebm.plots.samples(images, num_columns=2, ax=ax) is ax
    sheet = np.ma.filled(ax.images[0].get_array(), np.nan)
    assert sheet.shape == (3 * 3 - 1, 2 * 4 - 1)
    np.testing.assert_array_equal(sheet[3:5, :3], images[2])  # the third, below the first
    np.testing.assert_array_equal(sheet[0:2, 4:7], images[1])
    assert np.isnan(sheet[2]).all() and np.isnan(sheet[6:, 4:]).all()
    flat = ebm.plots.samples(images.reshape(5, 1, 6), shape=(2, 3), num_columns=2)
    np.testing.assert_array_equal(np.ma.filled(flat.images[0].get_array(), np.nan), sheet)


def test_plots_refuse_what_they_cannot_draw(run):

    def pairs(data=None):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Counting(3, event_shape=(2,)), obs=data.astype(int))
            ebm.energy("E", jnp.sum(v, -1))

    one = ebm.fixed(pairs, {})
    flat = jnp.zeros((3, 5))
    cases = [
        ("'density' or 'energy'", lambda: ebm.plots.density(GRBM_FIXED, kind="score")),
        ("free parameter", lambda: ebm.plots.density(oracles.grbm)),
        ("two real coordinates", lambda: ebm.plots.density(one, xlim=(0, 2), ylim=(0, 2))),
        ("`xlim`", lambda: ebm.plots.density(GRBM_FIXED, xlim=(1, 0))),
        ("`num`", lambda: ebm.plots.density(GRBM_FIXED, num=1)),
        ("(chains, draws, 2)", lambda: ebm.plots.chains(flat)),
        ("no draws of 'w'", lambda: ebm.plots.chains(run, site="w")),
        ("energy_gap", lambda: ebm.plots.energies(flat)),
        ("no images", lambda: ebm.plots.samples(flat)),
        ("no images of shape", lambda: ebm.plots.samples(flat, shape=(2, 2))),
        ("losses", lambda: ebm.plots.training(flat)),
        ("`window`", lambda: ebm.plots.training(jnp.ones(5), window=0)),
    ]
    for message, draw in cases:
        with pytest.raises(ebm.ModelError, match=message.replace("(", r"\(").replace(")", r"\)")):
            draw()


def test_plots_say_how_to_get_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="numpyro-ebm\\[examples\\]"):
        ebm.plots.training(np.ones(5))
