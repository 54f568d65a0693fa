# SPDX-License-Identifier: Apache-2.0
"""Recovery likelihood: its gradient in closed form, its sampler, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

import numpyro_ebm as ebm

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(4)
X = np.random.default_rng(0).normal(size=6)
V = 0.8 * X + np.random.default_rng(1).normal(size=6)
PARAMS = {"slope": np.array(0.1), "variance": np.array(0.4)}
LEVELS = [2.0, 1.0, 0.4]


def regression(data, sigma=0.0):
    """Covariates in a closure."""
    slope, variance = numpyro.param("slope", 0.0), numpyro.param("variance", 1.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (v - slope * X) ** 2 / (variance + sigma**2))


def signs(data, sigma=0.0):
    """The same with a latent sign that its prior and the covariates decide at once."""
    slope, variance = numpyro.param("slope", 0.0), numpyro.param("variance", 1.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", ebm.Counting())
        mean = slope * X * (2.0 * h - 1.0)
        ebm.energy("E", 0.5 * (v - mean) ** 2 / (variance + sigma**2) + 200.0 * (1.0 - h))


def expected_gradient(params, levels):
    """∂ of the mean over levels of E(x) - E(x⁻), with p(x | y) a Gaussian."""

    def contrast(params, low, high):
        center, width = params["slope"] * X, params["variance"] + low**2
        added = high**2 - low**2
        here = V - PARAMS["slope"] * X  # at the parameters that draw x⁻
        spread = PARAMS["variance"] + low**2
        weight = spread / (spread + added)
        mean = PARAMS["slope"] * X + weight * here
        variance = weight**2 * high**2 + weight * added
        positive = 0.5 * ((V - center) ** 2 + low**2) / width
        negative = 0.5 * ((mean - center) ** 2 + variance) / width
        return jnp.mean(positive - negative)

    pairs = list(zip(levels[1:], levels[:-1], strict=True))
    return jax.grad(lambda p: sum(contrast(p, *x) for x in pairs) / len(pairs))(params)


def assert_unbiased(objective, model, levels, num):
    def draw(key):
        loss = lambda p: objective.loss(key, p, model, None, jnp.asarray(V))  # noqa: E731
        return jax.grad(loss)(PARAMS)

    found = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(5), num))
    errors = {name: np.std(x) / np.sqrt(num) for name, x in found.items()}
    for name, expected in expected_gradient(PARAMS, levels).items():
        assert abs(np.mean(found[name]) - expected) < 4 * errors[name], name
        assert errors[name] < 0.2 * abs(expected)
    return errors


@pytest.mark.parametrize("initial", ["noised", pytest.param("data", marks=pytest.mark.slow)])
def test_the_gradient_is_that_of_the_conditional_likelihood(initial):
    objective = ebm.RecoveryLikelihood(0.7, num_steps=40, step_size=0.3, initial=initial)
    assert_unbiased(objective, regression, [0.7, 0.0], 2_000)


def test_pairs_of_chains_have_the_same_mean_and_less_noise():
    """The slope's gradient is linear in x⁻: what is left of its noise are y and rejections."""
    errors = []
    for antithetic in (False, True):
        objective = ebm.RecoveryLikelihood(
            0.7, num_steps=40, step_size=0.3, initial="noised", antithetic=antithetic
        )
        errors.append(assert_unbiased(objective, regression, [0.7, 0.0], 2_000))
    assert errors[1]["slope"] < 0.7 * errors[0]["slope"]


@pytest.mark.slow
@pytest.mark.parametrize("model", [regression, signs])
def test_so_it_is_at_the_level_of_every_row_and_with_a_latent_sign(model):
    objective = ebm.RecoveryLikelihood(LEVELS, noise_argument="sigma", num_steps=25, step_size=0.5)
    assert_unbiased(objective, model, LEVELS, 3_000)


def test_every_level_has_its_share_of_the_rows():
    """A row is told a level, noised to it, and further to the one before."""
    levels, v = np.array([2.0, 1.5, 0.8, 0.4, 0.1]), jnp.arange(200.0)

    def model(data, sigma=0.0):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * v**2 / (1 + sigma**2))

    objective = ebm.RecoveryLikelihood(levels, noise_argument="sigma")
    problem = objective.prepare(jax.random.key(0), {}, model, None, (v,), {})
    told, (noised, _, added) = problem.row_model.kwargs["sigma"], problem.noise
    number = np.abs(np.asarray(told)[:, None] - levels).argmin(1)
    np.testing.assert_allclose(told, levels[number])
    np.testing.assert_array_equal(np.bincount(number, minlength=5), [0, 50, 50, 50, 50])
    assert np.any(np.diff(number) < 0) and np.any(np.diff(number) > 0)  # in no order
    np.testing.assert_allclose(added, np.sqrt(levels[number - 1] ** 2 - levels[number] ** 2))
    first, second = problem.unconstrained["v"] - v, noised["v"] - problem.unconstrained["v"]
    for noise, scale in ((first, told), (second, added)):
        assert abs(np.mean((noise / scale) ** 2) - 1) < 4 * np.sqrt(2 / 200)
    assert abs(np.mean(first * second / told / added)) < 4 / np.sqrt(200)


@pytest.mark.parametrize("initial", ["data", "noised"])
def test_a_step_is_as_long_as_the_conditional_of_its_level_is_narrow(initial):
    """A tiny one from where the chain begins: noise of the variance 2 r / (1/τ² + 1/σ²) a row."""
    levels, num, r = np.array([2.0, 1.0, 0.3, 0.0]), 3_000, 1e-4

    def model(data, sigma=0.0):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * v**2 / (1 + sigma**2))

    options = {"num_steps": 1, "step_size": r, "initial": initial, "noise_argument": "sigma"}
    objective = ebm.RecoveryLikelihood(levels, **options)

    @jax.jit
    def one(key):
        problem = objective.prepare(key, {}, model, None, (jnp.zeros(num),), {})
        found = objective._recover(key, {}, problem, objective.estimate(key, {}, problem))
        return found, problem.noise, problem.unconstrained

    ((moved,), accepted), (noised, told, added), data = one(KEY)
    begin = data if initial == "data" else noised
    narrow = 1 / added**2 + np.where(told > 0, 1 / np.maximum(told, 1e-9) ** 2, 0.0)
    z = np.asarray(moved["v"] - begin["v"]) / np.sqrt(2 * r / narrow)
    assert np.mean(accepted) > 0.99
    for level in levels[1:]:
        own = z[np.isclose(told, level)]
        assert abs(np.mean(own**2) - 1) < 4.5 * np.sqrt(2 / len(own))
    assert abs(np.mean(z[1:] * z[:-1])) < 4.5 / np.sqrt(num)  # each row with its own noise


def test_a_walk_down_the_levels_is_that_of_its_steps():
    """Of Gaussian levels, 200 rows, against the means and variances of so many linear steps."""
    levels, widths, num_steps, r = np.geomspace(4.0, 0.5, 5), np.array([1.0, 0.3]), 4, 0.4

    def model(sigma=0.5):
        with numpyro.plate("data", 200):
            v = numpyro.sample("v", ebm.Lebesgue((2,)))
            variance = widths + jnp.asarray(sigma)[..., None] ** 2
            ebm.energy("E", 0.5 * jnp.sum((v - 1.0) ** 2 / variance, -1))

    mean, variance = np.zeros(2), np.full(2, levels[0] ** 2)
    for high, low in zip(levels[:-1], levels[1:], strict=True):
        tether, own = 1 / (high**2 - low**2), 1 / (widths + low**2)
        step = r / (tether + 1 / low**2)
        kept = (1 - step * (own + tether)) ** num_steps
        of_start = kept + (1 - kept) * tether / (own + tether)
        mean = of_start * mean + (1 - of_start) * 1.0
        left = (1 - kept**2) / (1 - (1 - step * (own + tether)) ** 2)
        variance = of_start**2 * variance + 2 * step * left

    def kernel(model):
        return ebm.AnnealedLangevin(
            model,
            levels,
            noise_argument="sigma",
            recover=True,
            denoise=False,
            num_steps=num_steps,
            step_size=r,
        )

    draws = ebm.sample(jax.random.key(0), ebm.fixed(model, {}), 50, kernel=kernel)["v"]
    v = np.asarray(draws).reshape(-1, 2)
    assert np.all(np.abs(v.mean(0) - mean) < 4 * np.sqrt(variance / len(v)))
    np.testing.assert_allclose(v.var(0), variance, rtol=4 * np.sqrt(2 / len(v)))


@pytest.mark.slow
def test_modes_far_apart_have_their_shares():
    """Which neither score matching at one small noise nor chains between them would find."""
    key, key_sign, key_noise = jax.random.split(jax.random.key(0), 3)
    sign = jax.random.bernoulli(key_sign, 0.7, (4_000, 1))
    data = jnp.where(sign, 3.0, -3.0) + 0.5 * jax.random.normal(key_noise, (4_000, 2))

    def model(data=None, sigma=0.1, num_rows=100):
        logit = numpyro.param("logit", 0.0)
        with numpyro.plate("data", num_rows if data is None else len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
            width = jnp.asarray(0.25 + sigma**2)[..., None]
            left, right = (-0.5 * jnp.sum((v + s) ** 2 / width, -1) for s in (3.0, -3.0))
            ebm.energy("E", -jnp.logaddexp(left, right + logit))

    levels = jnp.geomspace(12.0, 0.1, 12)  # the first so wide that it does not know the shares
    objective = ebm.RecoveryLikelihood(levels, noise_argument="sigma", num_steps=10, step_size=0.3)
    optim = optax.adam(optax.cosine_decay_schedule(0.05, 1_500))
    fit = ebm.EnergySVI(model, None, optim, objective).run(
        key, 1_500, data, batch_size=200, progress_bar=False
    )
    learned = float(jax.nn.sigmoid(fit.params["logit"]))
    assert abs(learned - float(sign.mean())) < 4 * 0.0072  # of 4,000 rows

    def kernel(model):
        return ebm.AnnealedLangevin(
            model, levels, noise_argument="sigma", recover=True, num_steps=60
        )

    v = ebm.sample(key, ebm.fixed(model, fit.params), 20, kernel=kernel)["v"].reshape(-1, 2)
    right = np.asarray(v[:, 0] > 0)
    assert abs(right.mean() - learned) < 4 * np.sqrt(learned * (1 - learned) / 2_000)
    np.testing.assert_allclose(v[right].mean(0), 3.0, atol=0.1)


def test_the_acceptance_of_the_chains_is_looked_at():
    """Nearly all of tiny steps, next to none of huge ones, in the mean over steps and rows."""
    for step_size, low, high in ((1e-4, 0.99, 1.0), (500.0, 0.0, 0.2)):
        objective = ebm.RecoveryLikelihood(1.0, step_size=step_size, num_steps=5)
        problem = objective.prepare(KEY, PARAMS, regression, None, (jnp.asarray(V),), {})
        found = jax.jit(lambda key, x=objective, p=problem: x.statistics(key, PARAMS, p))(KEY)
        assert low <= found <= high
    with pytest.warns(ebm.ConvergenceWarning, match="accept"):
        objective.review(found)
    objective.review(jnp.array(0.5))


@pytest.mark.slow
def test_chains_that_do_not_move_are_told():
    objective = ebm.RecoveryLikelihood(1.0, step_size=500.0, num_steps=2)
    svi = ebm.EnergySVI(regression, None, optax.sgd(1e-3), objective)
    with pytest.warns(ebm.ConvergenceWarning, match="RecoveryLikelihood: the chains accept"):
        svi.run(jax.random.key(0), 2, jnp.asarray(V), progress_bar=False)


@pytest.mark.parametrize("levels", [-1.0, [1.0], [0.5, 1.0], [1.0, -0.1], [[1.0, 0.5]], np.inf])
def test_levels_out_of_order_are_refused(levels):
    with pytest.raises(ebm.ModelError, match="must be a positive number, or two or more"):
        ebm.RecoveryLikelihood(levels, noise_argument="sigma")


def test_what_cannot_be_recovered_is_refused():
    def guide(data, sigma=0.0):
        with numpyro.plate("data", len(data)):
            numpyro.sample("h", dist.Bernoulli(0.5))

    v = jnp.asarray(V)
    with pytest.raises(ebm.ModelError, match='set `noise_argument="sigma"`'):
        ebm.RecoveryLikelihood(LEVELS)
    with pytest.raises(ebm.ModelError, match="compares values of log"):
        ebm.RecoveryLikelihood(1.0, ebm.VaGES(2)).loss(jax.random.key(0), PARAMS, signs, guide, v)
    with pytest.raises(ebm.ModelError, match="two or more `noise_scales`"):
        ebm.AnnealedLangevin(
            ebm.fixed(regression, PARAMS), [2.0, 1.0], noise_scale=1.0, recover=True
        )
