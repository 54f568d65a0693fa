# SPDX-License-Identifier: Apache-2.0
"""Draws of generalised posteriors, moved to the width of their estimator."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.linalg
from numpyro.handlers import mask, scale
from numpyro.infer import MCMC, SVI, BarkerMH, Trace_ELBO
from numpyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal
from posterior_cases import KEY, ROWS, lattice_model, precision_model

import numpyro_ebm as ebm
from numpyro_ebm.errors import ModelError, WidthWarning
from numpyro_ebm.posteriors.calibration import _bootstrap
from numpyro_ebm.posteriors.sandwich import sandwich_map

HEAVY = np.random.default_rng(3).standard_t(5, 400)
WEAK = dist.Normal(0.0, 100.0).expand([2]).to_event(1)
STRONG = dist.Normal(0.5, 0.05).expand([2]).to_event(1)


def positive_definite(rng, size):
    root = rng.standard_normal((size, size))
    return root @ root.T + 0.1 * np.eye(size)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_map_has_the_covariance_that_it_should(size):
    rng = np.random.default_rng(size)
    H, J, Q = (positive_definite(rng, size) for _ in range(3))
    beta, num, q = 0.7, 50, rng.standard_normal(size)
    flat = sandwich_map(H, J, num, beta)
    sqrtm = lambda x: np.real(scipy.linalg.sqrtm(x))  # noqa: E731
    np.testing.assert_allclose(flat.matrix, beta**0.5 * np.linalg.inv(H) @ sqrtm(J) @ sqrtm(H))
    found = sandwich_map(H, J, num, beta, q, Q)
    before, after = beta * num * H + Q, num * H @ np.linalg.inv(J) @ H + Q
    np.testing.assert_allclose(
        found.matrix @ np.linalg.inv(before) @ found.matrix.T, np.linalg.inv(after)
    )
    np.testing.assert_allclose(found.source, np.linalg.solve(before, q))
    np.testing.assert_allclose(found.target, np.linalg.solve(after, q))
    unread = sandwich_map(1e-9 * H, 1e-9 * J, num, beta, q, Q)  # the prior alone speaks
    np.testing.assert_allclose(unread.matrix, np.eye(size), atol=1e-4)
    right = sandwich_map(H, H, num, 1.0, q, Q)  # a likelihood has J = H
    np.testing.assert_allclose(right.matrix, np.eye(size), atol=1e-9)
    several = sandwich_map(H, J, num, beta, np.stack([0 * q, q]), np.stack([0 * Q, Q]))
    np.testing.assert_allclose(several.matrix, [flat.matrix, found.matrix])
    x = rng.standard_normal((5, size))
    at = [found.target + found.matrix @ (row - found.source) for row in x]
    np.testing.assert_allclose(found(x), at)


def linear_model(data, prior=WEAK):
    theta = numpyro.sample("theta", prior)
    numpyro.deterministic("mean", theta[0] / theta[1])
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta[1] * v**2 - theta[0] * v)


def score_matching_by_hand(v):
    """Minimiser, H and J of the mean of ½ (θ₀ - θ₁ v)² - θ₁."""
    H = np.array([[1.0, -v.mean()], [-v.mean(), np.mean(v**2)]])
    best = np.linalg.solve(H, [0.0, 1.0])
    score = best[0] - best[1] * v
    return best, H, np.cov(np.stack([score, -v * score - 1]))


@pytest.mark.parametrize("prior", [WEAK, STRONG], ids=["weak prior", "strong prior"])
def test_adjusted_draws_of_a_gaussian_posterior(x64, prior):
    """The posterior is Gaussian before and after, so that its moments are known."""
    best, H, J = score_matching_by_hand(HEAVY)
    model = ebm.generalized(linear_model, ebm.ScoreMatching(), "calibrate")
    found = model.calibrate(HEAVY, prior, num_resamples=400)  # every row for itself
    np.testing.assert_allclose(found.hessian, H, rtol=1e-6, atol=1e-8)
    rate = 2 / np.trace(np.linalg.solve(H, J))
    np.testing.assert_allclose(found.learning_rate, rate, rtol=1e-5)
    exact = model.closed_form(HEAVY, prior)
    draws = np.random.default_rng(0).multivariate_normal(
        exact.mean["theta"], exact.covariance, (4, 5_000)
    )
    moved = model.adjust({"theta": draws, "unknown": draws}, HEAVY, prior)
    assert set(moved) == {"theta"} and moved["theta"].shape == draws.shape
    spread = np.linalg.inv(H) @ found.score_covariance @ np.linalg.inv(H) / len(HEAVY)
    np.testing.assert_allclose(found.score_covariance, J, rtol=1e-5)
    variance = np.asarray(prior.variance)
    after = np.linalg.inv(np.linalg.inv(spread) + np.diag(1 / variance))
    mean = after @ (np.linalg.solve(spread, best) + np.asarray(prior.mean) / variance)
    rows = np.reshape(moved["theta"], (-1, 2))
    error = np.sqrt(np.diag(after))
    assert np.all(np.abs(rows.mean(0) - mean) < 4 * error / np.sqrt(len(rows)))
    ratio = np.linalg.solve(after, np.cov(rows.T))  # the identity, but for the draws' own error
    np.testing.assert_allclose(
        ratio, np.eye(2), atol=6 / np.sqrt(len(rows)) * np.linalg.cond(after) ** 0.5
    )


@pytest.mark.slow
def test_a_likelihood_and_a_single_parameter_are_left_alone(x64):
    """J = H up to noise for a likelihood, and β alone is right for one parameter."""
    model = ebm.generalized(precision_model, ebm.ScoreMatching(), "calibrate")
    model.calibrate(ROWS)
    noise = np.random.default_rng(0).standard_normal((2, 300))
    center = np.log(model.calibration.minimizer["precision"])
    draws = {"precision": np.exp(center + model.calibration.standard_error * noise)}
    moved = model.adjust(draws)
    np.testing.assert_allclose(moved["precision"], draws["precision"], rtol=1e-3)
    narrow = ebm.generalized(precision_model, ebm.ScoreMatching(), 4 * model.learning_rate)
    narrow.calibrate(ROWS)  # its draws are half as wide as they should be
    with pytest.warns(WidthWarning, match="times as wide"):
        narrow.adjust(draws)
    draws["precision"] = np.exp(center + 0.5 * model.calibration.standard_error * noise)
    moved = np.log(narrow.adjust(draws)["precision"])
    slope, _ = np.polyfit(np.ravel(np.log(draws["precision"])), np.ravel(moved), 1)
    with pytest.warns(WidthWarning, match="off by"):
        narrow.adjust({"precision": 2.0 * draws["precision"]})
    np.testing.assert_allclose(slope, 2.0, rtol=0.05)


def grouped_model(data, labels):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("groups", 3):
        theta = numpyro.sample("theta", dist.Normal(mu, 0.3))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * v**2 - theta[labels] * v)


@pytest.mark.slow
def test_a_hierarchy_is_adjusted_given_what_its_rows_do_not_read(x64):
    """θ of group g given μ: N(θ̂, s²/n) of its rows times N(μ, 0.3²)."""
    labels = np.repeat([0, 1, 2], [20, 40, 60])
    data = 2.0 * np.random.default_rng(2).standard_normal(120)
    model = ebm.generalized(grouped_model, ebm.ScoreMatching(), 1.0)
    found = model.calibrate(data, labels, num_resamples=120)
    np.testing.assert_array_equal(found.informed, [False, True, True, True])
    assert np.isnan(found.standard_error[0])
    draws = {"mu": np.array([-1.0, 0.5]), "theta": np.zeros((2, 3))}
    moved = model.adjust(draws)
    np.testing.assert_array_equal(moved["mu"], draws["mu"])
    for g in range(3):
        rows = data[labels == g]
        # J is measured over all rows, of which others say nothing of this group.
        score = np.where(labels == g, rows.mean() - data, 0.0)
        error = np.sum((score - score.mean()) ** 2) * 120 / 119 / len(rows) ** 2
        before = 1 / (len(rows) + 0.3**-2)
        after = 1 / (1 / error + 0.3**-2)
        mean = lambda width, v: width * (v * rows.mean() + draws["mu"] / 0.09)  # noqa: B023, E731
        wanted = mean(after, 1 / error) + np.sqrt(after / before) * (0 - mean(before, len(rows)))
        np.testing.assert_allclose(moved["theta"][:, g], wanted, rtol=0.02, atol=0.01)


X = np.random.default_rng(5).standard_normal((60, 2))
Y = X @ [1.0, -0.5] + np.random.default_rng(6).standard_t(4, 60)
WEIGHTS = np.random.default_rng(7).gamma(2.0, 0.5, 60)
COUNTS = jnp.arange(60) % 4 > 0


def regression(data, mean, handlers=()):
    theta = numpyro.sample("theta", dist.Normal(0.0, 100.0).expand([2]).to_event(1))
    with numpyro.plate("data", len(data)), contextlib.ExitStack() as stack:
        for handler in handlers:
            stack.enter_context(handler)
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (v - mean(theta)) ** 2)


BY_INDEX = np.eye(2)[np.arange(60) // 30]
REGRESSIONS = {  # covariates and weights of the rows, and the model
    "closed-over covariates": (X, 1.0, lambda y: regression(y, lambda t: X @ t)),
    "a closed-over index": (BY_INDEX, 1.0, lambda y: regression(y, lambda t: t[GROUPS])),
    "the number of a row": (BY_INDEX, 1.0, lambda y: regression(y, lambda t: t[numbers(y)])),
    "blocks of rows": (BY_INDEX, 1.0, lambda y: regression(y, lambda t: jnp.repeat(t, 30))),
    "weights": (X, WEIGHTS, lambda y: regression(y, lambda t: X @ t, [scale(scale=WEIGHTS)])),
    "a mask": (X, COUNTS * 1.0, lambda y: regression(y, lambda t: X @ t, [mask(mask=COUNTS)])),
}
GROUPS = np.arange(60) // 30


def numbers(data):
    return jnp.arange(len(data)) // 30


@pytest.mark.parametrize("name", REGRESSIONS)
def test_rows_are_left_out_where_they_stand(x64, name):
    """Least squares: H = X'WX/N and J = X'W²R²X/N with the residuals R, whatever gives X and W."""
    x, w, model = REGRESSIONS[name]
    found = ebm.generalized(model, ebm.ScoreMatching()).calibrate(Y, method="sandwich")
    w = np.broadcast_to(w, 60)
    H = (w[:, None] * x).T @ x / 60
    best = np.linalg.solve(H, x.T @ (w * Y) / 60)
    np.testing.assert_allclose(found.point, best, rtol=1e-5)
    np.testing.assert_allclose(found.hessian, H, atol=1e-6)
    scores = (w * (Y - x @ best))[:, None] * x
    np.testing.assert_allclose(found.score_covariance, scores.T @ scores / 59, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "most"), [(ebm.DenoisingScoreMatching(0.1), 1.8), (ebm.NCE(dist.Normal(0, 2)), 2)]
)
def test_random_objectives_keep_their_noise(x64, objective, most):
    """To leave a row out is to draw no other noise for the rest: that would double the spread."""
    found = ebm.generalized(linear_model, objective).calibrate(ROWS)
    _, H, J = score_matching_by_hand(ROWS)
    efficient = np.sqrt(np.diag(np.linalg.inv(H) @ J @ np.linalg.inv(H)) / len(ROWS))
    ratio = found.standard_error[-2:] / efficient  # after those of the objective's own
    assert np.all(ratio < most) and np.all(ratio > 0.8)  # of nine keys: from 0.87 to 1.70


@pytest.mark.parametrize("num_groups", [20, 57])
def test_rows_are_left_out_in_groups_where_there_are_many(x64, num_groups):
    """More rows than groups, as of every real data set: J from the sums over blocks of rows."""
    found = ebm.generalized(linear_model, ebm.ScoreMatching()).calibrate(
        HEAVY, method="sandwich", num_resamples=num_groups
    )
    best, H, _ = score_matching_by_hand(HEAVY)
    score = best[0] - best[1] * HEAVY
    blocks = np.array_split(np.stack([score, -HEAVY * score - 1], -1), num_groups)
    sums = np.array([block.sum(0) for block in blocks])
    expected = num_groups * np.cov(sums.T) / len(HEAVY)
    if 400 % num_groups == 0:
        np.testing.assert_allclose(found.score_covariance, expected, rtol=1e-4)
    else:  # blocks of seven and eight rows stand at other places
        spread = np.sqrt(np.diag(found.score_covariance) / np.diag(expected))
        np.testing.assert_allclose(spread, 1.0, atol=0.3)


def test_rows_of_a_group_count_as_one(x64):
    """Every row three times over tells nothing new."""
    prior = dist.Normal(0.0, 100.0).expand([2]).to_event(1)
    model = ebm.generalized(linear_model, ebm.ScoreMatching())
    once = model.calibrate(HEAVY, prior, num_resamples=400)
    order = np.random.default_rng(0).permutation(1_200)
    data, labels = np.tile(HEAVY, 3)[order], np.tile(np.arange(400), 3)[order]
    grouped = model.calibrate(data, prior, groups=labels)
    np.testing.assert_allclose(grouped.standard_error, once.standard_error, rtol=0.01)
    apart = model.calibrate(data, prior)
    np.testing.assert_allclose(apart.standard_error, once.standard_error / 3**0.5, rtol=0.1)


def test_the_trace_rule_and_its_cap(x64):
    _, H, J = score_matching_by_hand(HEAVY)
    model = ebm.generalized(linear_model, ebm.ScoreMatching())
    found = model.calibrate(HEAVY, method="trace", num_resamples=400)
    wanted = np.trace(H @ np.linalg.solve(J, H)) / np.trace(H)
    np.testing.assert_allclose(found.learning_rate, wanted, rtol=1e-4)
    assert model.learning_rate == 1.0  # the model keeps the number that it was given
    likely = ebm.generalized(lattice_model, ebm.PseudoLikelihood())
    data = np.random.default_rng(0).integers(0, 2, (40, 3, 3))
    raw, capped = (likely.calibrate(data, method="trace", cap=cap) for cap in (False, True))
    assert capped.learning_rate == raw.learning_rate < 1.0
    light = np.cbrt(HEAVY)
    raw, capped = (model.calibrate(light, method="trace", cap=cap) for cap in (False, True))
    assert capped.learning_rate == 1.0 < raw.learning_rate


def test_adjust_refuses():
    model = ebm.generalized(linear_model, ebm.ScoreMatching(), "calibrate")
    with pytest.raises(ModelError, match="there has been none"):
        model.adjust({"theta": np.ones((5, 2))})
    model.calibrate(HEAVY)
    for samples, message in (
        ({}, "lack the parameter"),
        ({"theta": np.ones((5, 3))}, "a draw of it \\(2,\\)"),
        ({"theta": np.ones(())}, "a draw of it"),
    ):
        with pytest.raises(ModelError, match=message):
            model.adjust(samples)
    for args, kwargs in (((HEAVY + 1,), {}), ((), {"data": HEAVY + 1})):
        with pytest.raises(ModelError, match="other data than the draws"):
            model.adjust({"theta": np.ones((5, 2))}, *args, **kwargs)
    for options, message in (
        ({"groups": np.zeros(3)}, "names the group of each of the 400 rows"),
        ({"groups": np.arange(400) % 3}, "at least 4 for 2 parameters, and there are 3"),
        ({"groups": np.arange(400) % 9, "method": "bootstrap"}, "takes no `groups`"),
    ):
        with pytest.raises(ModelError, match=message):
            model.calibrate(HEAVY, **options)
    checkers = np.indices((3, 3)).sum(0) % 2
    with pytest.raises(ModelError, match="has no minimum: it falls further and further"):
        ebm.generalized(lattice_model, ebm.PseudoLikelihood()).calibrate(checkers[None])
    with pytest.raises(ModelError, match="method='simulation'"):
        model.calibrate(HEAVY[:3], method="sandwich")

    def shifted(data):  # two names for one number
        a, b = (numpyro.sample(name, dist.Normal(0.0, 1.0)) for name in "ab")
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * v**2 - (a + b) * v)

    with pytest.raises(ModelError, match="if it is centred"):
        ebm.generalized(shifted, ebm.ScoreMatching()).calibrate(HEAVY)


@pytest.mark.slow
def test_to_arviz_keeps_raw_and_adjusted_draws_apart():
    model = ebm.generalized(linear_model, ebm.ScoreMatching(), "calibrate")
    mcmc = MCMC(BarkerMH(model), num_warmup=500, num_samples=3_000, progress_bar=False)
    data = HEAVY.astype(np.float32)
    mcmc.run(KEY, data)
    found = ebm.to_arviz(mcmc)
    raw, adjusted = (found[k]["theta"].values for k in ("posterior_raw", "posterior"))
    np.testing.assert_array_equal(raw, mcmc.get_samples(group_by_chain=True)["theta"])
    np.testing.assert_allclose(adjusted, model.adjust(mcmc.get_samples(True), data)["theta"])
    mean = found["posterior"]["mean"].values
    np.testing.assert_allclose(mean, adjusted[..., 0] / adjusted[..., 1], rtol=1e-4)
    assert "open-faced sandwich" in found["posterior"].attrs["adjusted"]
    _, H, J = score_matching_by_hand(HEAVY)
    wanted = np.sqrt(np.diag(np.linalg.inv(H) @ J @ np.linalg.inv(H)) / len(HEAVY))
    np.testing.assert_allclose(adjusted.std((0, 1)), wanted, rtol=0.2)
    model.calibrate(data + 1)
    with pytest.raises(ModelError, match="other data"):
        ebm.to_arviz(mcmc)


@pytest.mark.slow
@pytest.mark.parametrize("make", [AutoMultivariateNormal, AutoLaplaceApproximation])
def test_draws_of_a_guide_are_adjusted(make):
    """Gaussian guides on constrained scales, against the sandwich of their logarithms."""

    def scale_model(data):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 10.0).expand([2]).to_event(1))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
            ebm.energy("E", 0.5 * jnp.sum((v / scale) ** 2, -1))

    other = 0.5 * HEAVY[:300] + np.random.default_rng(4).standard_normal(300)
    data = np.stack([HEAVY[:300], other], 1).astype(np.float32)
    model = ebm.generalized(scale_model, ebm.ScoreMatching(), "calibrate")
    model.calibrate(data)
    guide = make(model)
    fit = SVI(model, guide, numpyro.optim.Adam(0.01), Trace_ELBO(16)).run(
        KEY, 3_000, data, progress_bar=False
    )
    draws = guide.sample_posterior(KEY, fit.params, sample_shape=(4_000,))
    moved = np.log(np.asarray(model.adjust(draws)["scale"]))
    # The minimiser is the standard deviation of a column: log σ̂ = ½ log mean v².
    square = data**2 / np.mean(data**2, 0)
    wanted = np.cov(0.5 * square.T) / len(data)
    np.testing.assert_allclose(np.cov(moved.T), wanted, rtol=0.25, atol=0.1 * wanted.max())


def test_the_rate_of_a_bootstrap_is_one_over_the_variance_of_a_row():
    """Of a mean with variance s² under the loss (x - μ)²: 1 / 2 s²."""
    rows = 2.0 * np.random.default_rng(5).normal(size=40)

    class Mean:
        num_rows, start = 40, jnp.zeros(1)
        log_prior = staticmethod(lambda x: -0.005 * jnp.sum(x**2))

        def loss(self, x, rng_key, weights):
            return jnp.mean(weights * (x - rows) ** 2)

    potential, once = Mean(), jnp.ones(40)
    at_all = jax.jit(jax.value_and_grad(lambda x: potential.loss(x, KEY, once)))
    best, hessian = np.array([rows.mean()], np.float32), np.full((1, 1), 2.0)
    rate, covariance = _bootstrap(potential, at_all, best, hessian, KEY, KEY, 200, False)
    bound = 4.5 * np.sqrt(2 / 200)
    assert abs(rate * 2 * rows.var() - 1) < bound / (1 - bound)
    assert abs(covariance[0, 0] / (4 * rows.var()) - 1) < bound


def test_a_prior_that_is_not_concave_adds_no_width():
    """Where its logarithm bends upwards it counts as flat there, beside where it bends down."""
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 3, 3))
    directions, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    curvature = [directions @ np.diag(x) @ directions.T for x in ([-3.0, 0.0, 2.0], [0, 0, 2.0])]
    slope = rng.normal(size=3)
    maps = [sandwich_map(a @ a.T, b @ b.T, 10.0, 0.7, slope, x) for x in curvature]
    for one, other in zip(*maps, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
