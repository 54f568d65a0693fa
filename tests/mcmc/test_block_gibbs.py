# SPDX-License-Identifier: Apache-2.0
"""Block Gibbs: exact conditionals against enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import assert_mean
from gibbs_cases import moments_of, straight
from jax import lax

import numpyro_ebm as ebm
from numpyro_ebm.mcmc.block_gibbs import BlockGibbs
from numpyro_ebm.samplers import block_gibbs
from numpyro_ebm.samplers.gibbs_blocks import plan_block


def last(kernel, num_rows, num_sweeps=25, seed=0, **kwargs):
    """The state after some sweeps: rows are independent draws."""
    state = kernel.init(jax.random.key(seed), 0, None, (), {"num_rows": num_rows, **kwargs})
    sweep = lambda _, s: kernel.sample(s, (), {"num_rows": num_rows, **kwargs})  # noqa: E731
    return jax.jit(lambda s: lax.fori_loop(0, num_sweeps, sweep, s))(state)


def assert_law(h, energy, num_values):
    """Chi-square of rows against enumeration; its statistic has mean n and variance 2 n."""
    h = np.asarray(h).reshape(len(h), -1)
    states = np.array(list(itertools.product(range(num_values), repeat=h.shape[1])))
    probabilities = np.exp(-energy(states))
    probabilities /= probabilities.sum()
    index = h @ num_values ** np.arange(h.shape[1])[::-1]
    counts = np.bincount(index, minlength=len(states))
    expected = len(h) * probabilities
    freedom = len(states) - 1
    assert np.sum((counts - expected) ** 2 / expected) < freedom + 4.5 * (2 * freedom) ** 0.5


COUPLING = np.array(
    [[0.0, 0.9, -0.7, 0.0], [0.0, 0.0, 0.5, 0.3], [0.0, 0.0, 0.0, 0.8], [0.0, 0.0, 0.0, 0.0]]
)


BIAS = np.array([0.3, -0.5, 0.2, 0.1])


def ising_energy(h):
    return -h @ BIAS - ((h @ COUPLING) * h).sum(-1)


def ising(num_rows):
    with numpyro.plate("data", num_rows):
        h = numpyro.sample("h", ebm.Counting(2, (4,)))
        ebm.energy("E", ising_energy(h))


def split_ising(num_rows):
    """The same with a plate of units left of the rows, and the other units as scalar sites."""
    rows = numpyro.plate("data", num_rows, dim=-1)
    with rows, numpyro.plate("units", 2, dim=-2):
        h = numpyro.sample("h", ebm.Counting(2))
    with rows:
        a, b = numpyro.sample("a", ebm.Counting(2)), numpyro.sample("b", ebm.Counting(2))
        ebm.energy("E", ising_energy(jnp.stack([h[0], h[1], a, b], -1)))


def insisting_ising(num_rows):
    """The same, but it indexes with h, which no float can do."""
    table = jnp.array([0.0, 1.0])
    with numpyro.plate("data", num_rows):
        h = numpyro.sample("h", ebm.Counting(2, (4,)))
        ebm.energy("E", ising_energy(table[h]))


POTTS = np.random.default_rng(1).normal(size=(2, 3, 3))


def potts(num_rows):
    """Three units on a line, three values each, a table of energies for every bond."""
    with numpyro.plate("data", num_rows):
        h = numpyro.sample("h", ebm.Counting(3, (3,)))
        one_hot = jax.nn.one_hot(h, 3)
        ebm.energy("E", jnp.einsum("nia,iab,nib->n", one_hot[:, :-1], POTTS, one_hot[:, 1:]))


def potts_energy(h):
    return POTTS[0][h[:, 0], h[:, 1]] + POTTS[1][h[:, 1], h[:, 2]]


@pytest.mark.slow
def test_sequential_blocks_have_the_law_of_enumeration():
    for model in (ising, insisting_ising):
        assert_law(last(BlockGibbs(ebm.fixed(model, {})), 4_000).z["h"], ising_energy, 2)
    assert_law(last(BlockGibbs(ebm.fixed(potts, {})), 4_000).z["h"], potts_energy, 3)


@pytest.mark.parametrize(
    "blocks",
    [
        [["h", "a"], ["b"]],
        *(pytest.param(x, marks=pytest.mark.slow) for x in (None, [["b", "h", "a"]])),
    ],
)
def test_sites_that_interact_may_share_a_block(blocks):
    state = last(BlockGibbs(ebm.fixed(split_ising, {}), blocks), 4_000)
    z = state.z
    assert z["h"].shape == (2, 4_000) and z["a"].shape == (4_000,)
    h = np.stack([*z["h"], z["a"], z["b"]], -1)
    assert_law(h, ising_energy, 2)
    np.testing.assert_allclose(state.potential_energy, ising_energy(h), atol=1e-5)


def test_sites_that_do_not_interact_are_drawn_at_once():
    bias = np.array([0.4, -1.0, 0.7])

    def model(num_rows):
        with numpyro.plate("data", num_rows):
            h = numpyro.sample("h", ebm.Counting(2, (2,)))
            s = numpyro.sample("s", ebm.Counting(2))
            ebm.energy("E", -(jnp.concatenate([h, s[:, None]], -1) @ bias))

    kernel = BlockGibbs(ebm.fixed(model, {}), [["h", "s"]])
    row_model, log_density = kernel._target((), {"num_rows": 4_000})
    rows = {"h": jnp.zeros((4_000, 2), int), "s": jnp.zeros(4_000, int)}
    assert [b.kind for b in kernel._plan(row_model, log_density, rows)] == ["bernoulli"]
    z = last(kernel, 4_000, num_sweeps=1).z
    assert z["s"].dtype == rows["s"].dtype
    assert_law(np.column_stack([z["h"], z["s"]]), lambda h: -h @ bias, 2)


def test_two_values_need_not_be_zero_and_one():
    def log_density(x):
        return 0.4 * x["s"][:, 0] - 0.6 * x["s"][:, 1]

    position = {"s": jnp.full((4_000, 2), 3)}
    block = plan_block(log_density, position, ["s"], {"s": [3, 5]})
    assert block.kind == "bernoulli"
    s = block_gibbs.draw_block(jax.random.key(0), position, log_density, block)["s"]
    assert_law((s - 3) // 2, lambda h: -2 * h @ np.array([0.4, -0.6]), 2)


@pytest.mark.slow
def test_a_proper_base_measure_is_tilted():
    """Bernoulli(0.7) tilted by e^h, beside N(1, 4) tilted by e^v: N(5, 4)."""

    def model(num_rows):
        with numpyro.plate("data", num_rows):
            h = numpyro.sample("h", dist.Bernoulli(0.7))
            v = numpyro.sample("v", dist.Normal(1.0, 2.0))
            s = numpyro.sample("s", dist.DiscreteUniform(3, 4))
            ebm.energy("E", -h * 1.0 - v + 0.5 * s)

    z = last(BlockGibbs(ebm.fixed(model, {})), 4_000, num_sweeps=2).z
    p = 0.7 * np.e / (0.7 * np.e + 0.3)
    assert abs(np.mean(z["h"]) - p) < 4.5 * (p * (1 - p) / 4_000) ** 0.5
    assert set(np.unique(z["s"])) == {3, 4}
    assert_law(z["s"] - 3, lambda s: 0.5 * s[:, 0], 2)
    assert abs(np.mean(z["v"]) - 5.0) < 4.5 * 2 / 4_000**0.5
    assert abs(np.var(z["v"]) / 4 - 1) < 4.5 * (2 / 4_000) ** 0.5


def test_custom_derivatives_are_not_trusted():
    """The gradient of this energy lies; its values do not."""

    def model(num_rows, real=False):
        with numpyro.plate("data", num_rows):
            h = numpyro.sample("h", ebm.Lebesgue() if real else ebm.Counting(2))
            ebm.energy("E", straight(h.astype(float)) + real * h**2)

    assert_law(last(BlockGibbs(ebm.fixed(model, {})), 4_000).z["h"], lambda h: 2.0 * h[:, 0], 2)
    with pytest.raises(ebm.ModelError, match="'h'.*custom_jvp"):
        last(BlockGibbs(ebm.fixed(model, {})), 3, real=True)


PRECISION = np.array([[2.0, -0.9, 0.0], [-0.9, 1.0, 0.4], [0.0, 0.4, 1.5]])


def gaussian(num_rows=1, scale=1.0):
    """A correlated Gaussian in two sites, its mean and its precision different in every row."""
    shift = jnp.arange(num_rows, dtype=float) / num_rows
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue((2,)))
        u = numpyro.sample("u", ebm.Lebesgue())
        x = jnp.concatenate([v, u[:, None]], -1) - shift[:, None]
        quadratic = 0.5 * jnp.einsum("ni,ij,nj->n", x, PRECISION, x)
        ebm.energy("E", scale * (1 + shift) * quadratic)


@pytest.mark.parametrize("blocks", [None, [["u", "v"]]])
def test_gaussian_blocks_of_any_precision(blocks):
    num_rows = 5_000
    z = last(
        BlockGibbs(ebm.fixed(gaussian, {}), blocks), num_rows, num_sweeps=1 if blocks else 20
    ).z
    shift = np.arange(num_rows) / num_rows
    x = np.column_stack([z["v"], z["u"]]) - shift[:, None]
    second = (x[:, :, None] * x[:, None, :]) * (1 + shift)[:, None, None]
    covariance = np.linalg.inv(PRECISION)
    for statistic, expected in ((x, 0.0), (second, covariance)):
        error = statistic.std(0) / num_rows**0.5
        assert np.all(np.abs(statistic.mean(0) - expected) < 4.5 * error)


def assert_moments(v, h, oracle):
    mean, second, hidden = oracle.moments()
    assert_mean(v, mean)
    assert_mean(v[..., :, None] * v[..., None, :], second)
    assert_mean(h, hidden)


def test_moments_of_a_grbm(grbm):
    mcmc, draws = moments_of(BlockGibbs(ebm.fixed(grbm.model, grbm.params)), 8_000)
    v, h = draws["v"], draws["h"]
    assert v.shape == (8_000, 1, 2) and v.dtype == "float32" and h.dtype == "int32"
    assert_moments(v.swapaxes(0, 1), h.swapaxes(0, 1), grbm.oracle)
    assert mcmc.get_extra_fields()["potential_energy"].shape == (8_000, 1)
    _, draws = moments_of(BlockGibbs(ebm.fixed(grbm.plate_model, grbm.params)), 8_000)
    assert draws["h"].shape == (8_000, 3, 1)
    assert_moments(draws["v"].swapaxes(0, 1), draws["h"].transpose(2, 0, 1), grbm.oracle)


@pytest.mark.slow
def test_moments_of_a_grbm_in_double_precision(grbm, x64):
    # Arrays of this test's own: JAX remembers NumPy constants across number types.
    params = {k: jnp.array(x) for k, x in grbm.params.items()}
    _, draws = moments_of(BlockGibbs(ebm.fixed(grbm.model, params)), 100_000)
    v, h = draws["v"].swapaxes(0, 1), draws["h"].swapaxes(0, 1)
    assert v.dtype == "float64"
    assert_moments(v, h, grbm.oracle)


def test_rows_are_chains_of_their_own(grbm):
    def model():
        return ebm.models.grbm(num_hidden=3, num_rows=50)

    _, draws = moments_of(BlockGibbs(ebm.fixed(model, grbm.params)), 500)
    v, h = draws["v"].swapaxes(0, 1), draws["h"].swapaxes(0, 1)
    assert_moments(v, h, grbm.oracle)
    correlation = np.corrcoef(v[:, :, 0])
    assert np.abs(correlation - np.eye(50)).max() < 5.5 * 2 / 500**0.5


def test_a_sweep_of_a_grbm_is_a_few_evaluations(grbm):
    calls, sizes = [], {"num_visible": 30, "num_hidden": 40, "num_rows": 7}

    def model():
        calls.append(1)
        return ebm.models.grbm(**sizes)

    params = {"W": jnp.ones((30, 40)), "b": jnp.zeros(30), "c": jnp.zeros(40)}
    kernel = BlockGibbs(ebm.fixed(model, {**params, "scale": jnp.ones(30)}))
    state = kernel.init(jax.random.key(0), 0, None, (), {})
    row_model, log_density = kernel._target((), {})
    blocks = kernel._plan(row_model, log_density, state.z)
    assert [(b.names, b.kind, b.is_diagonal) for b in blocks] == [
        (("v",), "gaussian", True),
        (("h",), "bernoulli", False),
    ]
    calls.clear()
    jaxpr = jax.make_jaxpr(lambda s: kernel.sample(s, (), {}))(state)
    assert len(calls) <= 7
    assert "cholesky" not in str(jaxpr) and "scan" not in str(jaxpr)
