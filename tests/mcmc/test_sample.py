# SPDX-License-Identifier: Apache-2.0
"""What sample draws, and which kernel it takes."""

import gc
import logging

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import assert_mean
from discrete_cases import BIASES, DENSE, FIELD, LOADINGS, MASK, PRECISION, SEEN, factors, pixels
from numpyro import handlers

import numpyro_ebm as ebm
from numpyro_ebm.mcmc import choose_kernel


def units(size, energy, values=2):
    def model():
        with numpyro.plate("data", 1):
            s = numpyro.sample("s", ebm.Counting(values, (size,)))
            ebm.energy("E", energy(s))

    return ebm.fixed(model, {})


def magnet(s):
    return (jnp.mean(s, -1) - 0.3) ** 2


def mixed(size, energy, support=dist.constraints.real):
    def model():
        with numpyro.plate("data", 1):
            v = numpyro.sample("v", ebm.Lebesgue((2,), support))
            s = numpyro.sample("s", ebm.Counting(2, (size,)))
            ebm.energy("E", energy(v, s))

    return ebm.fixed(model, {})


def quartic(v):
    return jnp.sum(v**4, -1)


def quadratic(v):
    return jnp.sum(v**2, -1) + 0.3 * v[:, 0] * v[:, 1]


@pytest.mark.parametrize(
    "model, expected",
    [
        (lambda: units(10, magnet), None),
        (lambda: units(40, lambda s: -s[:, 1:] @ s[0, :-1]), "BlockGibbs"),
        (lambda: units(40, magnet), "BlockGibbs"),
        (lambda: units(300, magnet), "DiscreteLangevin"),
        (lambda: units(300, lambda s: magnet(s == 2), 3), "BlockGibbs"),
        (lambda: mixed(3, lambda v, s: quadratic(v) - v[:, 0] * s[:, 0]), "BlockGibbs"),
        (lambda: mixed(3, lambda v, s: quartic(v) - v[:, 0] * s[:, 0]), "MALA"),
        (
            lambda: mixed(3, lambda v, s: quadratic(v) - s[:, 0], dist.constraints.positive),
            "MALA",
        ),
        (
            lambda: mixed(20, lambda v, s: quartic(v) - v[:, 0] * magnet(s)),
            r"Gibbs\(\[\(MALA, \('v',\)\), \(BlockGibbs, \('s',\)\)\]\)",
        ),
        (
            lambda: mixed(300, lambda v, s: quadratic(v) - v[:, 0] * magnet(s)),
            r"Gibbs\(\[\(BlockGibbs, \('v',\)\), \(DiscreteLangevin, \('s',\)\)\]\)",
        ),
    ],
)
def test_the_kernel_follows_from_supports_and_energy(model, expected):
    kernel = choose_kernel(model())
    from numpyro_ebm.mcmc.sampling import name_of_kernel

    if expected is None:
        assert kernel is None
    else:
        import re

        assert re.fullmatch(expected, name_of_kernel(kernel)), name_of_kernel(kernel)


@pytest.mark.slow
def test_sample_says_what_it_does(caplog, grbm):
    model = ebm.fixed(grbm.model, grbm.params)
    with caplog.at_level(logging.INFO, "numpyro_ebm.mcmc.sampling"):
        ebm.sample(jax.random.key(0), model, 5, num_warmup=5, kernel=ebm.BlockGibbs)
        ebm.sample(jax.random.key(0), units(3, magnet), 5)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "sample: BlockGibbs",
        "sample: drawn from the probabilities of all joint states",
    ]
    with pytest.raises(ebm.ModelError, match="`kernel` must be"):
        ebm.sample(jax.random.key(0), model, 5, kernel="MALA")


def test_draws_are_as_many_as_asked_for_and_of_every_chain():
    """Those of a loop written out: after three steps of warm-up, every fifth of four chains."""

    def normal():
        with numpyro.plate("data", 2):
            v = numpyro.sample("v", ebm.Lebesgue())
            ebm.energy("E", 0.5 * v**2)

    model, options = ebm.fixed(normal, {}), {"num_chains": 4, "thinning": 5, "num_warmup": 3}
    kernel = ebm.ULA(model, step_size=0.1)
    draws = ebm.sample(jax.random.key(3), model, 7, kernel=kernel, **options)["v"]
    keys = jax.random.split(jax.random.split(jax.random.key(3))[0], 4)
    state, step = kernel.init(keys, 3, None, (), {}), jax.jit(lambda s: kernel.sample(s, (), {}))
    seen = []
    for i in range(13):
        state = step(state)
        seen += [state.z["v"]] if i in (7, 12) else []
    np.testing.assert_allclose(draws, jnp.stack(seen, 1).reshape(8, 2)[:7], rtol=1e-5)


@pytest.mark.parametrize("name", ["z", pytest.param("x", marks=pytest.mark.slow)])
def test_clamped_sites_stay_and_the_others_follow(name):
    given = {"x": jnp.array([[1, 0, 1, 1]]), "z": jnp.array([[0.5, -1.2]])}[name]
    model = handlers.condition(ebm.fixed(factors, {}), {name: given})
    draws = ebm.sample(jax.random.key(0), model, 4_000)
    if name == "z":
        p = 1 / (1 + np.exp(-np.asarray(given) @ LOADINGS.T - BIASES))[0]
        assert np.all(np.abs(draws["x"][:, 0].mean(0) - p) < 4.5 * np.sqrt(p * (1 - p) / 4_000))
    else:
        grid = np.linspace(-8, 8, 4_001)
        log_weight = (np.asarray(given) @ LOADINGS).T * grid - 0.5 * grid**2 - 0.05 * grid**4
        weight = np.exp(log_weight)
        mean = (weight * grid).sum(-1) / weight.sum(-1)
        assert_mean(np.asarray(draws["z"])[:, 0].reshape(40, 100, 2).swapaxes(0, 1), mean)


@pytest.mark.parametrize("kernel", [None, pytest.param(ebm.MALA, marks=pytest.mark.slow)])
def test_missing_pixels_are_drawn_given_the_others(kernel):
    draws = ebm.sample(jax.random.key(0), ebm.fixed(pixels, {}), 4_000, kernel=kernel)
    v = np.asarray(draws["v"])
    np.testing.assert_array_equal(v[:, MASK], np.broadcast_to(SEEN[MASK], (4_000, 2)))
    for row in range(2):
        seen = MASK[:, row]
        block = PRECISION[np.ix_(~seen, ~seen)]
        mean = -np.linalg.solve(block, PRECISION[np.ix_(~seen, seen)] @ SEEN[seen, row])
        x = v[:, ~seen, row]
        assert_mean(x.reshape(40, 100, 2).swapaxes(0, 1), mean)
        centred = x - mean
        second = centred[:, :, None] * centred[:, None]
        covariance = np.linalg.inv(block)
        assert_mean(second.reshape(40, 100, 2, 2).swapaxes(0, 1), covariance)


@pytest.mark.parametrize(
    "kernel",
    [
        ebm.DiscreteLangevin,
        *(pytest.param(x, marks=pytest.mark.slow) for x in (None, ebm.BlockGibbs)),
    ],
)
def test_missing_units_are_drawn_given_the_others(kernel):
    mask, seen = np.array([True, False, False, True]), np.array([1, 0, 0, 0])
    couplings = DENSE[:4, :4] * 2

    def model():
        rows = numpyro.plate("data", 1, dim=-1)
        with rows, numpyro.plate("units", 4, dim=-2):
            obs = jnp.asarray(seen)[:, None]
            s = numpyro.sample("s", ebm.Counting(2), obs=obs, obs_mask=mask[:, None])
        with rows:
            ebm.energy("E", -jnp.einsum("in,ij,jn->n", s, couplings, s) - FIELD[:4] @ s)

    draws = ebm.sample(jax.random.key(0), ebm.fixed(model, {}), 4_000, kernel=kernel)
    s = np.asarray(draws["s"])[..., 0]
    assert np.all(s[:, mask] == seen[mask])
    states = np.array([[1, a, b, 0] for a in (0, 1) for b in (0, 1)])
    weights = np.exp(np.einsum("si,ij,sj->s", states, couplings, states) + states @ FIELD[:4])
    expected = 4_000 * weights / weights.sum()
    counts = np.bincount(s[:, 1] * 2 + s[:, 2], minlength=4)
    assert np.sum((counts - expected) ** 2 / expected) < 3 + 4.5 * 6**0.5


@pytest.mark.slow
def test_sampling_again_compiles_nothing_and_keeps_nothing(caplog):
    """The model and its fixed parameters made anew each time, at other values."""

    def draws(seed, scale):
        params = {"scale": jnp.asarray(scale), "shift": jnp.arange(3.0)}

        def model(num_rows=30):
            scale = numpyro.param("scale", jnp.ones(()))
            shift = numpyro.param("shift", jnp.zeros(3))
            with numpyro.plate("data", num_rows):
                v = numpyro.sample("v", ebm.Lebesgue(event_shape=(3,)))
                ebm.energy("E", 0.5 * jnp.sum(((v - shift) / scale) ** 2, -1))

        key = jax.random.key(seed)
        return ebm.sample(key, ebm.fixed(model, params), 200, kernel=ebm.MALA, num_warmup=200)["v"]

    first = draws(0, 1.0)
    gc.collect()
    alive = len(jax.live_arrays())
    with caplog.at_level("WARNING"), jax.log_compiles():
        caplog.clear()
        second = draws(1, 3.0)
    compiled = [x.getMessage() for x in caplog.records if "XLA compilation" in x.getMessage()]
    assert not compiled, compiled
    gc.collect()
    assert len(jax.live_arrays()) == alive + 1
    for x, scale in ((first, 1.0), (second, 3.0)):
        np.testing.assert_allclose(jnp.std(x, (0, 1)), scale, rtol=0.1)
        np.testing.assert_allclose(jnp.mean(x, (0, 1)), np.arange(3.0), atol=0.1 * scale)
