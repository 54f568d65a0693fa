# SPDX-License-Identifier: Apache-2.0
"""`compare`: scores of rows against closed forms, their errors, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from scipy import stats

import numpyro_ebm as ebm
from numpyro_ebm.diagnostics.arviz.groups import Likelihood, to_data
from numpyro_ebm.diagnostics.row_scores import log_scores
from numpyro_ebm.log_normalizers import LogLikelihood, LogNormalizer

KEY = jax.random.key(0)
rng = np.random.default_rng(1)
ROWS = rng.standard_t(5, 200)
COVARIATE = np.linspace(-1.0, 2.0, 200)


def gaussian(data, support=dist.constraints.real):
    precision = numpyro.param("precision", 1.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(support=support), obs=data)
        ebm.energy("E", 0.5 * precision * (v - COVARIATE[: len(data)]) ** 2)


def smooth_laplace(data):
    c = numpyro.param("c", 1.0)
    with numpyro.plate("data", len(data)):
        x = numpyro.sample("x", ebm.Lebesgue(), obs=data)
        ebm.energy("E", c * jnp.sqrt(1 + x**2))


def bits(data):
    logit = numpyro.param("logit", jnp.zeros(3))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(event_shape=(3,)), obs=data)
        ebm.energy("E", -v @ logit)


BITS = rng.integers(0, 2, (200, 3))


def sum_and_errors(*rows):
    """The sum of each, and its standard error over rows."""
    rows = np.stack(rows)
    return rows.sum(1), np.sqrt(np.sum((rows - rows.mean(1, keepdims=True)) ** 2, 1))


def check_log_scores(found, best, other):
    """A table of two models against the log-likelihoods of rows in closed form."""
    totals, errors = sum_and_errors(best, other, other - best)
    assert list(found["rank"]) == [0, 1] and set(found.scale) == {"log"}
    np.testing.assert_allclose(found.elpd, totals[:2], rtol=1e-5)
    np.testing.assert_allclose(found.se, errors[:2], rtol=1e-4)
    np.testing.assert_allclose(found.elpd_diff, [0, totals[2]], rtol=1e-4)
    np.testing.assert_allclose(found.dse, [0, errors[2]], rtol=1e-4)
    shares = np.linspace(0, 1, 2_001)[:, None]
    mixed = np.log(shares * np.exp(best) + (1 - shares) * np.exp(other)).sum(1)
    np.testing.assert_allclose(found.weight.iloc[0], shares[mixed.argmax(), 0], atol=2e-3)


def test_log_scores_of_bits_are_those_of_closed_forms():
    logits = {"far": np.array([0.5, -1.0, 1.2]), "near": np.array([0.1, 0.3, -0.2])}
    found = ebm.compare({name: (bits, {"logit": x}) for name, x in logits.items()}, BITS)
    far, near = ((BITS @ x) - np.logaddexp(0, x).sum() for x in (logits["far"], logits["near"]))
    assert list(found.index) == ["near", "far"] and not found.warning.any()
    check_log_scores(found, near, far)


@pytest.mark.slow
def test_log_scores_of_rows_with_covariates_are_those_of_closed_forms():
    models = {"narrow": (gaussian, {"precision": 4.0}), "wide": (gaussian, {"precision": 0.5})}
    found = ebm.compare(models, ROWS)
    narrow, wide = (stats.norm(COVARIATE, t**-0.5).logpdf(ROWS) for t in (4.0, 0.5))
    assert list(found.index) == ["wide", "narrow"]
    check_log_scores(found, wide, narrow)
    square = (narrow - wide - (narrow - wide).mean()) ** 2
    assert found.warning["narrow"] == (square.max() > 0.5 * square.sum())


def test_hyvarinen_scores_are_those_of_closed_forms():
    def centred(data):
        precision = numpyro.param("precision", 1.0)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * precision * v**2)

    models = {"A": (centred, {"precision": 0.6}), "B": (smooth_laplace, {"c": 1.4})}
    found = ebm.compare(models, ROWS, score="hyvarinen", check_integrable=False)
    score = 1.4 * ROWS / np.sqrt(1 + ROWS**2)
    b = 1.4 * (1 + ROWS**2) ** -1.5 - 0.5 * score**2
    a = 0.6 - 0.5 * (0.6 * ROWS) ** 2
    totals, errors = sum_and_errors(a, b, a - b)
    np.testing.assert_allclose(found.score[["A", "B"]], totals[:2], rtol=1e-4)
    np.testing.assert_allclose(found.se[["A", "B"]], errors[:2], rtol=1e-4)
    np.testing.assert_allclose(abs(found.score_diff.iloc[1]), abs(totals[2]), rtol=1e-3)
    np.testing.assert_allclose(found.dse.iloc[1], errors[2], rtol=1e-4)
    assert found.weight.isna().all() and set(found.scale) == {"hyvarinen"}


@pytest.mark.parametrize(
    "score, of_bits",
    [
        ("pseudo_likelihood", lambda p: np.log(p)),  # where bits are independent
        ("ratio_matching", lambda p: -((1 - p) ** 2)),
        ("discrete_fisher", lambda p: -(((1 - p) / p) ** 2) + 2 * p / (1 - p)),
        (ebm.MinimumProbabilityFlow(), lambda p: -np.sqrt((1 - p) / p)),
    ],
)
def test_scores_of_bits_are_those_of_closed_forms(score, of_bits):
    logit = np.array([0.5, -1.0, 0.2])
    found = ebm.compare({"bits": (bits, {"logit": logit})}, BITS, score=score)
    p = 1 / (1 + np.exp(-logit))
    each = of_bits(np.where(BITS == 1, p, 1 - p)).sum(1)
    (total,), (error,) = sum_and_errors(each)
    np.testing.assert_allclose(found.score["bits"], total, rtol=1e-4)
    np.testing.assert_allclose(found.se["bits"], error, rtol=1e-4)


def test_the_error_of_log_z_is_that_of_all_rows():
    values = rng.normal(size=50)
    log_z = LogNormalizer(0.0, 0.3, 100.0, "ais")
    noisy = LogLikelihood(jnp.asarray(values), jnp.full(50, 0.5), log_z)  # ± 0.4 of latents each
    exact = noisy._replace(mcse=jnp.zeros(50), log_normalizer=log_z._replace(mcse=0.0))
    exact = exact._replace(value=exact.value + 0.01)
    found = ebm.compare({"noisy": noisy, "exact": exact})
    _, (of_rows,) = sum_and_errors(values)
    of_log_z = 50 * 0.16 + (50 * 0.3) ** 2
    np.testing.assert_allclose(found.se["noisy"], np.sqrt(of_rows**2 + of_log_z), rtol=1e-5)
    np.testing.assert_allclose(found.dse["noisy"], np.sqrt(of_log_z), rtol=1e-5)
    assert found.warning["noisy"] and not found.warning["exact"]


@pytest.mark.parametrize("score", [None, "pseudo_likelihood"])
def test_rows_count_by_their_weights(score):
    weights = np.array([2.0, 0.0, 1.0])
    weighted = handlers.scale(handlers.mask(bits, mask=weights > 0), scale=np.maximum(weights, 1.0))
    rows = BITS[:3]  # each model is the better one for one of those that count
    params = [{"logit": 1.5 * (2.0 * np.asarray(rows[i]) - 1.0)} for i in (0, 2)]
    some = ebm.compare(
        {k: (weighted, x) for k, x in zip("ab", params, strict=True)}, rows, score=score
    )
    again = rows[[0, 0, 2]]
    twice = ebm.compare(
        {k: (bits, x) for k, x in zip("ab", params, strict=True)}, again, score=score
    )
    for name in some.columns[1:6]:
        np.testing.assert_allclose(some[name], twice[name], rtol=1e-4, atol=1e-5)
    if score is None:
        assert np.all(np.abs(some["weight"] - 0.5) < 0.45)  # no model has all of the weight


def normal(data, loc=0.0):
    with numpyro.plate("data", len(data)):
        numpyro.sample("v", dist.Normal(loc, 1.0), obs=data)


@pytest.mark.parametrize("of_log_z", [0.3, np.array([0.1, 0.2, 0.3])], ids=["shared", "a row"])
def test_errors_are_those_of_a_row_of_weight_one(of_log_z):
    """A weight counts once, and an error that all rows share is no row's own."""
    weighted = handlers.scale(bits, scale=np.array([2.0, 0.5, 3.0]))
    log_z = LogNormalizer(jnp.zeros(np.shape(of_log_z)), of_log_z, np.inf, "given")
    model, options = ebm.fixed(weighted, {"logit": np.ones(3)}), {"log_normalizer": log_z}
    found = log_scores(KEY, model, (BITS[:3],), {}, options)
    own, shared = (of_log_z, 0.0) if np.ndim(of_log_z) else (np.zeros(3), of_log_z)
    np.testing.assert_allclose(found.errors, own, atol=1e-3)
    assert found.shared_error == pytest.approx(shared)
    np.testing.assert_allclose(found.values, BITS[:3].sum(1), rtol=1e-5)


def test_baselines_and_normalized_models_have_their_likelihood():
    def bayesian(data):
        precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * precision * v**2)

    model = ebm.normalized(bayesian, lambda p: 0.5 * jnp.log(2 * jnp.pi / p["precision"]))
    found = ebm.compare({"normalized": (model, {"precision": 1.0}), "plain": normal}, ROWS)
    np.testing.assert_allclose(found.elpd, stats.norm.logpdf(ROWS).sum(), rtol=1e-5)
    assert not found.warning.any()  # differences are those of floats


def positive(data):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(support=dist.constraints.positive), obs=data)
        ebm.energy("E", v)


def real(data):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * v**2)


def upside_down(data):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(1,)), obs=data[:, None])
        ebm.energy("E", -0.5 * jnp.sum(v**2, -1))


def counts(data, num_values=3):
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(num_values), obs=data)
        ebm.energy("E", 0.5 * v)


def shifted(data):
    real(data + 1.0)


FIXED = {fn.__name__: ebm.fixed(fn, {}) for fn in (positive, real, upside_down, counts, shifted)}
SIX = np.array([0, 1, 1, 0, 1, 1])


def four(data):
    counts(data, 4)


HYVARINEN = {"score": "hyvarinen", "check_integrable": False}
BOTH = {"a": FIXED["positive"], "b": FIXED["real"]}
KINDS = {"a": FIXED["counts"], "b": ebm.fixed(four, {})}


@pytest.mark.parametrize(
    "models, data, options, words",
    [
        ({}, (SIX,), {}, "must be a dict of models"),
        ({"a": FIXED["real"], "b": FIXED["shifted"]}, (ROWS,), HYVARINEN, "observe different data"),
        (BOTH, (abs(ROWS),), HYVARINEN, "coordinates are not"),
        pytest.param(
            *(KINDS, (SIX,), {"score": "pseudo_likelihood"}, "values are not"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(
                {"a": FIXED["counts"], "b": FIXED["real"]},
                (SIX,),
                {},
                "a probability and a density",
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *({"a": FIXED["upside_down"]}, (ROWS,), {"score": "hyvarinen"}, "model 'a'.*diverges"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *({"a": FIXED["upside_down"]}, (ROWS,), {}, "model 'a'.*diverges"),
            marks=pytest.mark.slow,
        ),
        ({"a": FIXED["counts"]}, (SIX,), {"score": "hyvarinen"}, "model 'a'.*discrete"),
        ({"a": real}, (ROWS,), {}, "model 'a'.*not resolved"),
        ({"a": (bits, {"logits": 1})}, (BITS,), {}, "no value for the parameter.*'logit'"),
        ({"a": (bits, {"logit": np.zeros((9, 3))})}, (BITS,), {}, "Draws of a posterior are no"),
        ({"a": normal}, (ROWS,), {"score": "hyvarinen"}, "states no energy"),
        ({"a": FIXED["real"]}, (ROWS,), {"score": "crps"}, "`score` must be"),
        ({"a": FIXED["real"]}, (ROWS,), {"score": ebm.NCE(dist.Normal())}, "`score` must be"),
        ({"a": 3}, (ROWS,), {}, "model 'a': it must be a fixed model"),
        ({"a": FIXED["real"]}, (np.append(ROWS, np.nan),), {}, "model 'a'"),
    ],
)
def test_what_cannot_be_compared_is_refused(models, data, options, words):
    with pytest.raises(ebm.ModelError, match=words):
        ebm.compare(models, *data, **options)


def posterior(values, data):
    groups = {"posterior": {"t": np.zeros(values.shape[:2])}, "observed_data": {"v": data}}
    return to_data(groups, {"v": ["data"]}, Likelihood("v", values, "data", {}))


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # of ArviZ 0.23 in its own code
def test_posteriors_are_handed_to_arviz():
    data = rng.normal(size=50)
    draws = 0.03 * rng.normal(size=(2, 100, 1))
    good, bad = (stats.norm.logpdf(data, draws + mean) for mean in (0.0, 0.5))
    found = ebm.compare({"bad": posterior(bad, data), "good": posterior(good, data)})
    assert list(found.index) == ["good", "bad"]
    ebm.compare({"bad": posterior(bad, data), "good": posterior(good, data.astype(np.float32))})
    with pytest.raises(ebm.ModelError, match="observe different data"):
        ebm.compare({"bad": posterior(bad, data + 1), "good": posterior(good, data)})
    with pytest.raises(ebm.ModelError, match="'b' are no posteriors"):
        ebm.compare({"a": posterior(good, data), "b": FIXED["real"]})
    with pytest.raises(ebm.ModelError, match="Give neither arguments nor `score`"):
        ebm.compare({"a": posterior(good, data)}, data)
    without = to_data({"posterior": {"t": np.zeros((1, 5))}}, {})
    with pytest.raises(ebm.ModelError, match="'b' has no log-likelihood"):
        ebm.compare({"a": posterior(good, data), "b": without})


def test_random_scores_compare_models_at_the_same_slices():
    """A model beside itself scores the same, row by row."""

    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
            ebm.energy("E", 0.5 * jnp.sum(v**2, -1) + v[:, 0] * v[:, 1] ** 2)

    models = dict.fromkeys(("a", "b"), ebm.fixed(model, {}))
    rule = ebm.SlicedScoreMatching(num_slices=1)
    data = np.random.default_rng(3).normal(size=(6, 2))
    table = ebm.compare(models, data, score=rule, check_integrable=False)
    assert np.all(table.score_diff == 0)
