# SPDX-License-Identifier: Apache-2.0
"""Block Gibbs: what energies are polynomials, exact conditionals against enumeration, protocol."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import assert_mean, enable_x64
from jax import lax
from numpyro import handlers
from numpyro.infer import MCMC, Gibbs, init_to_value

import numpyro_ebm as ebm
from numpyro_ebm.mcmc.block_gibbs import BlockGibbs
from numpyro_ebm.program.polynomial import degree, structure
from numpyro_ebm.samplers import block_gibbs
from numpyro_ebm.samplers.gibbs_blocks import plan_block

ONES = jnp.ones((3, 2))
MATRIX = np.array([[1.0, 0.3], [0.2, -0.5]])
INF = float("inf")


@jax.custom_jvp
def straight(x):
    return 2 * x


straight.defjvp(lambda primals, tangents: (straight(*primals), 0 * tangents[0]))


# Polynomials


@pytest.mark.parametrize(
    "fn, expected, separable",
    [
        (lambda x: 3.0, 0, True),
        (lambda x: jnp.ones(3) + 0 * x[0, 0], 1, True),  # an upper bound
        (lambda x: jnp.sum(x @ MATRIX, -1) / 2 - 1, 1, True),
        (lambda x: jnp.cumsum(jnp.pad(x, 1)[::-1].T.reshape(-1)), 1, True),
        (lambda x: jnp.mean(jnp.concatenate([x, -x])[1:]), 1, True),
        (lambda x: x[jnp.array([0, 2])] + x[0], 1, True),
        (lambda x: jnp.where(ONES > 0, x, 2.0) ** 2, 2, True),
        (lambda x: jnp.sum(((x - 1) / jnp.array([0.5, 2.0])) ** 2, -1), 2, True),
        (lambda x: jnp.square(x).sum() + x @ MATRIX[0], 2, True),
        (lambda x: jnp.einsum("ni,ni->n", x - 1, x - 1), 2, True),
        (lambda x: jnp.einsum("ni,ij,nj->n", x, MATRIX, x), 2, False),
        (lambda x: jnp.sum(x, -1) ** 2, 2, False),
        (lambda x: x * x[:, ::-1], 2, False),
        (lambda x: jnp.vdot(x, x[::-1]), 2, False),
        (lambda x: jnp.stack([x, x])[0] * x, 2, False),  # true, but not told
        (lambda x: x**3 * x, 4, True),
        (lambda x: x**2.0, 2, True),
        (lambda x: x**0, 0, True),
        (lambda x: jax.checkpoint(jax.jit(lambda y: y * y))(x), 2, True),
        (lambda x: straight(x) * x, 2, True),
        (lambda x: dist.Normal(1.0, 2.0).log_prob(x), 2, True),
        (lambda x: dist.Normal(jnp.ones(2), 2.0).to_event(1).log_prob(x), 2, True),
        (lambda x: dist.MultivariateNormal(jnp.ones(2), jnp.eye(2)).log_prob(x), 2, False),
        (lambda x: jnp.exp(jnp.ones(3)) + jnp.sum(x), 1, True),
        (lambda x: jnp.exp(x), INF, False),
        (lambda x: jnp.abs(x), INF, False),
        (lambda x: 1 / x, INF, False),
        (lambda x: x**0.5, INF, False),
        (lambda x: x**-1, INF, False),
        (lambda x: jnp.maximum(x, 0), INF, False),
        (lambda x: jnp.where(x > 0, x, 0), INF, False),
        (lambda x: lax.stop_gradient(x), INF, False),
        (lambda x: jnp.arange(3.0)[x.astype(int)], INF, False),
        (lambda x: lax.scan(lambda c, y: (c + y[0], y), 0.0, x)[0], INF, False),
        (lambda x: jnp.ones(3) * (x[:, 0] == 1), INF, False),
    ],
)
def test_degree_and_separability(fn, expected, separable):
    assert degree(fn, ONES) == expected
    found = structure(jax.jit(fn), ONES)
    assert (found.degree, found.separable) == (expected, separable)


def test_degree_is_joint_and_knows_number_types():
    x = {"a": jnp.ones(3), "b": jnp.ones(3)}
    assert degree(lambda x: jnp.sum(x["a"] * x["b"]), x) == 2
    assert degree(lambda x: {"c": x["a"], "d": x["b"] ** 3}, x) == 3
    bits = jnp.ones(3, int)
    assert degree(lambda h: (1 - h) * 0.5 + h / 2, bits) == 1
    assert degree(lambda h: h // 2, bits) == INF
    assert degree(lambda h: h.astype(bool) * 1.0, bits) == INF
    assert degree(lambda h: -h.astype(jnp.uint8), bits) == INF
    assert degree(lambda h: h * 2.0, bits.astype(bool)) == 1
    assert structure(lambda x: x["a"], x).true_gradient
    assert not structure(lambda x: straight(x["a"]), x).true_gradient


def test_symbolic_work_only():
    """A big model is walked, not run: shapes are enough."""
    shape = jax.ShapeDtypeStruct((10_000, 4_000), jnp.float32)
    assert structure(lambda x: jnp.sum(x**2, -1), shape) == (2, False, True)  # too many to label


# Stationary laws


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


# Restricted Boltzmann machines


def moments_of(kernel, num_draws, **kwargs):
    mcmc = MCMC(kernel, num_warmup=20, num_samples=num_draws, progress_bar=False)
    mcmc.run(jax.random.key(0), **kwargs)
    return mcmc, {k: np.asarray(x) for k, x in mcmc.get_samples().items()}


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


# Protocol


def test_contrastive_divergence_asks_inside_jit_with_traced_parameters(grbm):
    params = {k: jnp.asarray(x, jnp.float32) for k, x in grbm.params.items()}
    data = jnp.asarray(grbm.data, jnp.float32)

    @jax.jit
    def chains(rng_key, params):
        def model():
            return ebm.models.grbm(num_hidden=3, num_rows=len(data))

        kernel = BlockGibbs(ebm.fixed(model, params))
        state = kernel.init(rng_key, 0, {"v": data}, (), {})
        start = state.z
        sample = lambda _, s: kernel.sample(s, (), {})  # noqa: E731
        return start, lax.fori_loop(0, 300, sample, state)

    start, state = chains(jax.random.key(0), params)
    np.testing.assert_array_equal(start["v"], data)
    assert state.i == 300 and state.potential_energy.shape == (5,)
    energy = -grbm.oracle.log_joint(state.z["v"], state.z["h"])
    np.testing.assert_allclose(state.potential_energy, energy, rtol=1e-4)
    moved = {**params, "b": params["b"] + 100.0}
    assert np.all(chains(jax.random.key(0), moved)[1].z["v"] > 80.0)


def test_starting_from_data_keeps_the_hidden_units_in_step(grbm):
    """With v clamped the hidden units are drawn from their posterior in one sweep."""
    clamped = handlers.condition(
        ebm.fixed(grbm.model, grbm.params), {"v": jnp.array([[0.5, -1.0]])}
    )
    _, draws = moments_of(BlockGibbs(clamped), 4_000)
    expected = grbm.oracle.posterior_mean(np.array([[0.5, -1.0]]))[0]
    error = np.sqrt(expected * (1 - expected) / 4_000)
    assert np.all(np.abs(draws["h"][:, 0].mean(0) - expected) < 4.5 * error)


@pytest.mark.filterwarnings("ignore:Some donated buffers:UserWarning")  # NumPyro's, under vmap
@pytest.mark.parametrize(
    "method",
    ["vectorized", *(pytest.param(m, marks=pytest.mark.slow) for m in ("sequential", jax.vmap))],
)
def test_chain_methods(method, grbm):
    kernel = BlockGibbs(ebm.fixed(grbm.model, grbm.params))
    options = {"num_warmup": 5, "num_samples": 30, "num_chains": 2, "progress_bar": False}
    mcmc = MCMC(kernel, chain_method=method, **options)
    init = {"v": jnp.array([[[5.0, 5.0]], [[-5.0, -5.0]]])}
    mcmc.run(jax.random.key(0), init_params=init)
    draws = mcmc.get_samples(group_by_chain=True)
    assert draws["v"].shape == (2, 30, 1, 2) and draws["h"].shape == (2, 30, 1, 3)
    assert not np.allclose(draws["v"][0], draws["v"][1])


def test_float64_and_deterministic_sites():
    def model():
        with numpyro.plate("data", 30):
            v = numpyro.sample("v", ebm.Lebesgue((2,)))
            numpyro.deterministic("square", v**2)
            ebm.energy("E", jnp.sum((v - 1) ** 2, -1))

    with enable_x64():
        _, draws = moments_of(BlockGibbs(ebm.fixed(model, {})), 100)
        assert draws["v"].dtype == "float64"
        np.testing.assert_allclose(draws["square"], draws["v"] ** 2, rtol=1e-12)
        assert_mean(draws["v"].swapaxes(0, 1), 1.0)


def skewed():
    """A Gumbel scalar g with a bit and a Gaussian that lean on it."""
    with numpyro.plate("data", 20):
        g = numpyro.sample("g", ebm.Lebesgue())
        v = numpyro.sample("v", ebm.Lebesgue())
        bit = numpyro.sample("bit", ebm.Counting(2))
        ebm.energy("E", g + jnp.exp(-g) + 0.5 * (v - g) ** 2 - bit * 0.5)


def test_a_block_of_gibbs_beside_mala():
    model = ebm.fixed(skewed, {})
    with pytest.raises(ebm.ModelError, match=r"\['g'\].*Gibbs\(\[\(MALA\(model\), \['g'\]\)"):
        moments_of(BlockGibbs(model), 5)
    kernel = Gibbs([(ebm.MALA(model), ["g"]), (BlockGibbs(model), ["v", "bit"])])
    mcmc = MCMC(kernel, num_warmup=300, num_samples=1_500, progress_bar=False)
    mcmc.run(jax.random.key(0))
    g, v, bit = (np.asarray(mcmc.get_samples()[k]).T for k in ("g", "v", "bit"))
    assert_mean(g, np.euler_gamma)
    assert_mean(np.exp(-g), 1.0)
    assert_mean(v - g, 0.0)
    assert_mean((v - g) ** 2, 1.0)
    assert_mean(bit, 1 / (1 + np.exp(-0.5)))


def test_refresh_recomputes_what_depends_on_the_conditioning(grbm):
    def conditional(h=None):
        return handlers.condition(ebm.fixed(grbm.model, grbm.params), {"h": h})()

    kernel, states = BlockGibbs(conditional), [jnp.zeros((1, 3), int), jnp.ones((1, 3), int)]
    init = {"v": jnp.ones((1, 2))}
    fresh = [kernel.init(jax.random.key(0), 5, init, (), {"h": h}) for h in states]
    assert fresh[0].potential_energy != fresh[1].potential_energy
    moved = kernel.refresh(fresh[0], (), {"h": states[1]})
    np.testing.assert_allclose(moved.potential_energy, fresh[1].potential_energy, rtol=1e-5)
    wrapped = kernel.wrap_model(lambda m: m)
    assert wrapped is not kernel and wrapped.model is conditional
    assert "conditionals" in kernel.get_diagnostics_str(moved)


def test_the_sampler_is_blackjax_shaped():
    def log_density(x):
        return jnp.sum(x["h"] * x["v"] - 0.5 * x["v"] ** 2, -1)

    position = {"v": jnp.zeros((3, 2)), "h": jnp.ones((3, 2), int)}
    blocks = [plan_block(log_density, position, [k], {"h": [0, 1]}) for k in "vh"]
    algorithm = block_gibbs.as_top_level_api(log_density, blocks)
    state, info = jax.jit(algorithm.step)(jax.random.key(0), algorithm.init(position))
    assert isinstance(state, block_gibbs.BlockGibbsChainState) and state.logdensity.shape == (3,)
    assert isinstance(info, block_gibbs.BlockGibbsInfo) and not info.is_divergent.any()
    assert state.position["h"].dtype == position["h"].dtype


def continuous(energy, support=dist.constraints.real):
    def model():
        with numpyro.plate("data", 2):
            v = numpyro.sample("v", ebm.Lebesgue((), support))
            w = numpyro.sample("w", ebm.Lebesgue())
            h = numpyro.sample("h", ebm.Counting(2))
            ebm.energy("E", energy(v, w, h))

    return ebm.fixed(model, {})


def poisson():
    with numpyro.plate("data", 2):
        n = numpyro.sample("n", dist.Poisson(2.0))
        ebm.energy("E", 0.1 * n)


def bowl(v, w, h):
    return v**2 + w**2 + h


def run(kernel, **options):
    return moments_of(kernel, 3, **options)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: run(BlockGibbs(continuous(lambda v, w, h: v**4 + w**2 + h))),
            r"\['v'\] are not.*degree 4.*MALA\(model\), \['v'\]\), \(BlockGibbs\(model\), "
            r"\['h', 'w'\]",
        ),
        (lambda: run(BlockGibbs(continuous(lambda v, w, h: v + w**2))), r"\['v'\].*does not bend"),
        (
            lambda: run(BlockGibbs(continuous(lambda v, w, h: w**2 - v**2))),
            "'v'.*positive definite",
        ),
        (
            lambda: run(BlockGibbs(continuous(bowl, dist.constraints.positive))),
            "'v'.*Positive.*MALA",
        ),
        (
            lambda: run(BlockGibbs(continuous(bowl), [["v", "h"], ["w"]])),
            "real.*'v'.*'h'.*together",
        ),
        (
            lambda: run(
                BlockGibbs(continuous(lambda v, w, h: v**2 * (1 + w**2)), [["v", "w"], "h"])
            ),
            "sequence of sequences",
        ),
        (
            lambda: run(
                BlockGibbs(continuous(lambda v, w, h: v**2 * (1 + w**2)), [["v", "w"], ["h"]])
            ),
            r"\['v', 'w'\] are not jointly Gaussian.*degree 4",
        ),
        (lambda: run(BlockGibbs(continuous(bowl), ["v", "w", "h"])), "sequence of sequences"),
        (lambda: run(BlockGibbs(continuous(bowl), [["v"], ["h"]])), r"\['w'\] are missing"),
        (lambda: run(BlockGibbs(continuous(bowl), [["v"], ["w", "h", "v"]])), r"\['v'\] are"),
        (lambda: run(BlockGibbs(continuous(bowl), [["v", "w", "h", "x"]])), r"\['x'\] are"),
        (lambda: run(BlockGibbs(ebm.fixed(poisson, {}))), "'n'.*Poisson.*finite"),
        (lambda: run(BlockGibbs(ebm.models.grbm)), "'W', 'b', 'c', 'scale'.*fixed"),
        (
            lambda: run(BlockGibbs(continuous(bowl)), init_params={"x": jnp.ones(2)}),
            "init_params.*'x'",
        ),
        (
            lambda: run(BlockGibbs(continuous(bowl)), init_params={"v": jnp.ones(3)}),
            r"init_params.*'v' of shape \(3,\)",
        ),
        (
            lambda: run(
                BlockGibbs(
                    continuous(bowl),
                    init_strategy=init_to_value(values={"v": jnp.full(2, jnp.inf)}),
                )
            ),
            "not finite at the initial.*init_strategy",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ebm.ModelError, match=message):
        make()
