# SPDX-License-Identifier: Apache-2.0
"""`predictive`: the law of the model at each draw of its parameters."""

import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers

import numpyro_ebm as ebm
from numpyro_ebm.mcmc.convergence import Convergence
from numpyro_ebm.posteriors.predictive import _of_all

KEY = jax.random.key(0)
X = np.linspace(-1.0, 1.0, 200)
GROUP = np.arange(200) % 2


def regression(data):
    """Rows with a covariate in a closure, two groups, and a deterministic site."""
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    with numpyro.plate("groups", 2):
        precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
    numpyro.deterministic("sd", precision**-0.5)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        numpyro.deterministic("twice", 2 * v)
        ebm.energy("E", 0.5 * precision[GROUP] * (v - slope * X) ** 2)


def test_every_draw_of_the_parameters_has_its_own_law():
    rng = np.random.default_rng(0)
    draws = {
        "slope": 3 * rng.normal(size=(2, 4)),
        "precision": rng.choice([1.0, 4.0, 100.0], size=(2, 4, 2)),
        "other": np.zeros(7),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", ebm.ConvergenceWarning)  # laws differ, and chains are right
        found = ebm.predictive(KEY, regression, draws, np.zeros(200, np.float32))
    assert found["v"].shape == (2, 4, 200) and found["sd"].shape == (2, 4, 2)
    np.testing.assert_allclose(found["twice"], 2 * found["v"])
    scale = draws["precision"][..., GROUP] ** -0.5
    z = (found["v"] - draws["slope"][..., None] * X) / scale
    for group in (0, 1):
        of_group = np.asarray(z[..., group == GROUP])
        assert np.all(abs(of_group.mean(-1)) < 4 / 10)
        assert np.all(abs((of_group**2).mean(-1) - 1) < 4 * (2 / 100) ** 0.5)


def bits(data, num_bits=3):
    logit = numpyro.sample("logit", dist.Normal(0.0, 1.0))
    w = numpyro.param("w", 0.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(event_shape=(num_bits,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(3, event_shape=(1,)))
        ebm.energy("E", -logit * jnp.sum(v, -1) - w * h[..., 0])


def test_rows_whose_states_can_be_counted_are_drawn_exactly():
    logit = np.linspace(-2.0, 2.0, 150)  # more than run side by side
    model = handlers.substitute(bits, data={"w": 1.0})
    found = ebm.predictive(KEY, model, {"logit": logit}, np.zeros((200, 3), np.int8))
    assert found["v"].dtype == np.int32 and found["h"].shape == (150, 200, 1)
    p = 1 / (1 + np.exp(-logit))
    z = (found["v"].mean((1, 2)) - p) / np.sqrt(p * (1 - p) / 600)
    assert np.all(abs(z) < 5) and abs(np.mean(z**2) - 1) < 5 * (2 / 150) ** 0.5
    weights = np.exp([0.0, 1.0, 2.0])
    counts = np.bincount(np.ravel(found["h"]), minlength=3) / found["h"].size
    np.testing.assert_allclose(counts, weights / weights.sum(), atol=0.01)


def test_observed_sites_stay():
    data = np.ones((4, 3), int)
    draws = {"logit": np.zeros(5), "w": np.array([-9.0, -9.0, 9.0, 9.0, 9.0])}
    found = ebm.predictive(KEY, bits, draws, data, observed=["v"])
    assert set(found) == {"h"}
    np.testing.assert_array_equal(
        found["h"], 2 * (draws["w"][:, None, None] > 0) * np.ones((5, 4, 1))
    )


def test_weights_of_rows_are_none_of_draws():
    def weighted(data, weight=3.0, counts=(True, False, True)):
        logit = numpyro.sample("logit", dist.Normal(0.0, 1.0))
        weights = handlers.scale(scale=weight), handlers.mask(mask=np.array(counts))
        with numpyro.plate("data", len(data)), weights[0], weights[1]:
            v = numpyro.sample("v", ebm.Counting(event_shape=(3,)), obs=data)
            ebm.energy("E", -logit * jnp.sum(v, -1))

    draws = {"logit": np.array([-1.0, 2.0])}
    found = ebm.predictive(KEY, weighted, draws, np.zeros((3, 3), int))
    plain = ebm.predictive(KEY, weighted, draws, np.zeros((3, 3), int), 1.0, 3 * (True,))
    np.testing.assert_array_equal(found["v"], plain["v"])


def two_modes(data):
    shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 40.0 * ((v - shift) ** 2 - 1.0) ** 2)


def test_chains_that_stay_apart_are_told():
    draws = {"shift": np.linspace(-9.0, 9.0, 30)}
    with pytest.warns(ebm.ConvergenceWarning, match=r"predictive \(MALA\).*R-hat"):
        ebm.predictive(KEY, two_modes, draws, np.zeros(20), num_warmup=100)


@pytest.mark.parametrize(
    "draws, options, words",
    [
        ({"logit": np.zeros(5)}, {}, "lacks .w."),
        ({"logit": np.zeros((5, 2)), "w": np.zeros(5)}, {}, "leading axes|draws of"),
        ({"logit": np.zeros(5), "w": np.float64(1.0)}, {}, r"'w' have the shapes \[\(\)\]"),
        ([1.0], {}, "must be a dict"),
        ({"logit": np.zeros(0), "w": np.zeros(0)}, {}, "not empty"),
        ({"logit": np.zeros(5), "w": np.zeros(5)}, {"observed": ["x"]}, "names 'x'"),
        ({"logit": np.zeros(5), "w": np.zeros(5)}, {"kernel": "MALA"}, "predictive: `kernel`"),
        ({"logit": np.zeros(5), "w": np.zeros(5)}, {"num_chains": 0}, "`num_chains`"),
    ],
)
def test_bad_draws_are_refused(draws, options, words):
    with pytest.raises(ebm.ModelError, match=words):
        ebm.predictive(KEY, bits, draws, np.zeros((4, 3), int), **options)


def test_one_look_of_many_is_not_lost_among_the_others():
    """Draws of the parameters are looked at in groups: what is bad in one of them is bad."""
    zeros, ones = np.zeros(3, int), np.ones(3)
    right = Convergence(8, 10, zeros, zeros, zeros, 0.8 * ones, 0.0, ones, 2.0)
    wrong = Convergence(4, 10, *np.eye(3, dtype=int), 0.2 * ones, 0.5, ones + 4 * np.eye(3)[1], 9e3)
    for looks in ([right, wrong], [wrong, right]):
        found = _of_all(looks)
        assert (found.num_chains, found.num_draws, found.largest) == (12, 10, 9e3)
        for name, expected in (
            *(("not_finite", [1, 0, 0]), ("unresolved", [0, 1, 0]), ("frozen", [0, 0, 1])),
            *(("acceptance", [0.5] * 3), ("diverging", 0.25), ("r_hat", [1, 5, 1])),
        ):
            np.testing.assert_allclose(getattr(found, name), expected)


def test_the_last_draw_of_the_first_chain_is_handed_on(monkeypatch):
    """Of the chains that were asked for."""
    told = np.random.default_rng(1).normal(size=(3, 10, 200))

    def run_chains(rng_key, kernel, args, kwargs, *, num_chains, num_warmup, num_draws, every):
        assert (num_chains, num_warmup, num_draws, every) == (3, 7, 10, 5)
        return {"v": jnp.asarray(told)}, {}

    module = sys.modules["numpyro_ebm.posteriors.predictive"]  # beside the function of its name
    monkeypatch.setattr(module, "run_chains", run_chains)
    draws = {"slope": jnp.array([1.0, 2.0]), "precision": jnp.ones((2, 2))}
    options = {"num_chains": 3, "num_warmup": 7, "thinning": 5, "kernel": ebm.MALA}
    found = ebm.predictive(KEY, regression, draws, jnp.zeros(200), **options)
    np.testing.assert_allclose(found["v"], np.stack([told[0, -1]] * 2), rtol=1e-5)
