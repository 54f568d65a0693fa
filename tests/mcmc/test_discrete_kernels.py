# SPDX-License-Identifier: Apache-2.0
"""Discrete kernels: interaction graphs, stationary laws by enumeration, mixed models, `sample`."""

import itertools
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import assert_mean, enable_x64
from jax import lax
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, DiscreteGibbs, Gibbs
from registry.kernels import kernels

import numpyro_ebm as ebm
from numpyro_ebm.mcmc import choose_kernel
from numpyro_ebm.mcmc.block_gibbs import BlockGibbsState
from numpyro_ebm.program.coloring import greedy_colors
from numpyro_ebm.program.interactions import interactions
from numpyro_ebm.samplers import chromatic_gibbs, discrete_langevin
from numpyro_ebm.samplers.gibbs_blocks import plan_block

# Interactions -------------------------------------------------------------------------------------

SIDE = 4
TORUS = np.array(
    [
        (SIDE * i + j, SIDE * ((i + k) % SIDE) + (j + 1 - k) % SIDE)
        for i, j, k in itertools.product(range(SIDE), range(SIDE), range(2))
    ]
)
ADJACENT = np.zeros((SIDE**2, SIDE**2))
ADJACENT[TORUS[:, 0], TORUS[:, 1]] = ADJACENT[TORUS[:, 1], TORUS[:, 0]] = 1.0
UPPER = 0.3 * np.triu(ADJACENT)
TABLE = np.random.default_rng(0).normal(size=(3, 3))


def ends(s):
    """Values at the two ends of every bond."""
    return s[:, TORUS[:, 0]], s[:, TORUS[:, 1]]


def spins(s):
    return (2 * s - 1).reshape(len(s), SIDE, SIDE)


def one_hots(s):
    return jax.nn.one_hot(s[:, TORUS[:, 0]], 3), jax.nn.one_hot(s[:, TORUS[:, 1]], 3)


LATTICES = {
    "roll": lambda s: jnp.sum(
        spins(s) * (jnp.roll(spins(s), 1, 1) + jnp.roll(spins(s), 1, 2)), (1, 2)
    ),
    "einsum": lambda s: jnp.einsum("ni,ij,nj->n", s, UPPER, s),
    "matmul": lambda s: jnp.sum((s @ jnp.triu(ADJACENT) * 2.0) * s, -1),
    "outer": lambda s: jnp.sum(UPPER * s[:, :, None] * s[:, None], (1, 2)),
    "vmap": lambda s: jax.vmap(lambda x: x @ UPPER @ x)(s * 1.0),
    "squares": lambda s: jnp.sum((ends(s)[0] - ends(s)[1]) ** 2, -1),
    "equality": lambda s: jnp.sum(ends(s)[0] == ends(s)[1], -1) * 0.5,
    "where": lambda s: jnp.sum(jnp.where(ends(s)[0] == ends(s)[1], 0.3, -0.2), -1),
    "table": lambda s: jnp.sum(jnp.asarray(TABLE)[ends(s)], -1),
    "one-hot": lambda s: jnp.einsum("nia,ab,nib->n", one_hots(s)[0], TABLE, one_hots(s)[1]),
    "exponential": lambda s: jnp.sum(jnp.exp(0.1 * ends(s)[0] - ends(s)[1]), -1),
    "checkpoint": lambda s: jax.checkpoint(lambda s: jnp.prod(jnp.stack(ends(s)), 0).sum(-1))(s),
}


@pytest.mark.parametrize("name", LATTICES)
def test_interactions_are_those_of_the_lattice(name):
    x = {"s": jnp.zeros((2, SIDE**2), int)}
    graph = interactions(lambda x: LATTICES[name](x["s"]), x)
    np.testing.assert_array_equal(graph.toarray(), ADJACENT)
    found = []  # the same while it is traced: arrays made inside are not known values
    jax.jit(lambda x: found.append(interactions(lambda x: LATTICES[name](x["s"]), x)))(x)
    np.testing.assert_array_equal(found[0].toarray(), ADJACENT)
    assert greedy_colors(graph).max() == 1


@pytest.mark.parametrize(
    "fn",
    [
        lambda s: jnp.sum(s, -1) ** 2,
        lambda s: jnp.sum(jnp.cumsum(s, -1) ** 2, -1),
        lambda s: jnp.max(jnp.sort(s, -1), -1),
        lambda s: lax.fori_loop(0, 3, lambda i, t: t + s[:, 0] * s[:, 1], s.sum(-1)),
        lambda s: jnp.exp(jnp.sum(s * 0.1, -1)),
        lambda s: jnp.max(s, -1),
    ],
)
def test_what_is_not_known_interacts(fn):
    graph = interactions(lambda x: fn(x["s"]), {"s": jnp.zeros((2, 4), int)})
    assert graph is None or np.all(graph.toarray() + np.eye(4))


def test_traced_couplings_join_all_that_they_could():
    found = []

    @jax.jit
    def trace(couplings):
        energy = lambda x: jnp.einsum("ni,ij,nj->n", x["s"], couplings, x["s"])  # noqa: E731
        found.append(interactions(energy, {"s": jnp.zeros((2, SIDE**2))}))

    trace(UPPER)
    assert np.all(found[0].toarray() + np.eye(SIDE**2))


def test_interactions_of_several_sites_and_of_the_rest():
    x = {"b": jnp.ones((2, 2)), "a": jnp.ones((2, 3, 1)), "c": jnp.ones(2)}
    weights = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    rest = jnp.ones((2, 3))  # what is not an argument joins nothing
    graph = interactions(
        lambda x: (
            jnp.einsum("nk,ki,ni->n", x["a"][..., 0], weights, x["b"])
            + x["c"] * jnp.sum(rest * x["a"][..., 0], -1) * (x["c"] > 0)
        ),
        x,
    ).toarray()
    expected = np.zeros((6, 6))  # b0 b1 a0 a1 a2 c
    for i, j in ((0, 2), (1, 3), (5, 2), (5, 3), (5, 4)):
        expected[i, j] = expected[j, i] = 1
    for i, j in itertools.combinations((2, 3, 4), 2):  # joined in one product with (c > 0)
        graph[i, j] = graph[j, i] = False
    np.testing.assert_array_equal(graph, expected)


def test_colorings_are_proper_and_small():
    from scipy.sparse import csr_matrix

    rng = np.random.default_rng(0)
    half = rng.random((30, 30)) < 0.1
    bipartite = np.block([[np.zeros_like(half), half], [half.T, np.zeros_like(half)]])
    order = rng.permutation(60)
    cycle = np.roll(np.eye(7), 1, 0) + np.roll(np.eye(7), -1, 0)
    complete = 1 - np.eye(5)
    for graph, most in ((bipartite[order][:, order], 2), (cycle, 3), (complete, 5)):
        colors = greedy_colors(csr_matrix(graph))
        assert colors.max() + 1 <= most
        assert not np.any((colors[:, None] == colors) & (graph > 0))


# Stationary laws ----------------------------------------------------------------------------------

RNG = np.random.default_rng(3)
FIELD = RNG.normal(size=SIDE**2) * 0.4
BONDS = RNG.normal(size=len(TORUS)) * 0.5
DENSE = np.triu(RNG.normal(size=(6, 6)) * 0.5, 1)
LINE = RNG.normal(size=(5, 3, 3)) * 0.7


def lattice_energy(s):
    a, b = ends(2 * s - 1)
    return -(a * b) @ BONDS - s @ FIELD


def dense_energy(s):
    return -s @ FIELD[:6] - ((s @ DENSE) * s).sum(-1)


def potts_energy(s):
    """Six units on a line, three values, a table of energies for every bond."""
    return sum(jnp.asarray(LINE[i])[s[:, i], s[:, i + 1]] for i in range(5))


def ordinal_energy(s):
    """Six units on a ring, three ordered values."""
    differences = s - jnp.roll(s, 1, -1)
    return 0.6 * jnp.sum(differences**2, -1) - s @ FIELD[:6] + 0.4 * jnp.sum((s - 1) ** 3, -1)


class Law:
    """A model of one site ``s``, with the probabilities of all its states."""

    def __init__(self, energy, num_values, size, kind):
        self.energy, self.num_values, self.size, self.kind = energy, num_values, size, kind

        def model(num_rows=1):
            with numpyro.plate("data", num_rows):
                s = numpyro.sample("s", ebm.Counting(num_values, (size,)))
                ebm.energy("E", energy(s))

        self.model = ebm.fixed(model, {})

    def probabilities(self):
        states = np.indices((self.num_values,) * self.size).reshape(self.size, -1).T
        log_weights = -np.asarray(self.energy(states), float)
        weights = np.exp(log_weights - log_weights.max())
        return weights / weights.sum()

    def moment_z_scores(self, s):
        """Of the mean of every unit, and of their sum."""
        states = np.indices((self.num_values,) * self.size).reshape(self.size, -1).T
        with_sum = lambda x: np.column_stack([x, x.sum(1)])  # noqa: E731
        p, s, states = self.probabilities(), with_sum(np.asarray(s)), with_sum(states)
        mean = p @ states
        deviation = np.sqrt(p @ (states - mean) ** 2)
        return (s.mean(0) - mean) / deviation * len(s) ** 0.5

    def z_score(self, s):
        """Of chi-square against enumeration; states of less than 10 expected draws are pooled."""
        s = np.asarray(s).reshape(len(s), -1)
        index = s @ self.num_values ** np.arange(self.size)[::-1]
        p = self.probabilities()
        counts, expected = np.bincount(index, minlength=len(p)), len(s) * p
        # Rare states in groups of neighbours by index, which share most of their units.
        rare = expected < 10
        groups = np.where(rare, np.cumsum(np.where(rare, expected, 0)) // 10, 0).astype(int)
        pooled = [np.bincount(groups[rare], x[rare]) for x in (counts, expected)]
        counts, expected = (
            np.concatenate([x[~rare], y]) for x, y in zip((counts, expected), pooled, strict=True)
        )
        counts, expected = counts[expected > 2], expected[expected > 2]
        statistic = np.sum((counts - expected) ** 2 / expected)
        freedom = len(counts) - 1
        return (statistic - freedom) / (2 * freedom) ** 0.5


LAWS = {
    "lattice": Law(lattice_energy, 2, 16, "coloured"),  # 65,536 states
    "dense": Law(dense_energy, 2, 6, "sequential"),
    "potts": Law(potts_energy, 3, 6, "coloured"),
    "ordinal": Law(ordinal_energy, 3, 6, "coloured"),
}
KERNELS = kernels(moves_discrete=True)
CASES = [(name, law) for name, kernel in KERNELS.items() for law in kernel.laws]
MOST_CASES = [
    pytest.param(*case, marks=[pytest.mark.slow] if case[1] == "dense" else []) for case in CASES
]


def last(kernel, num_rows, num_warmup, num_steps, seed=0, **kwargs):
    """The state after some steps: rows are independent draws."""
    kwargs = {"num_rows": num_rows, **kwargs}
    state = kernel.init(jax.random.key(seed), num_warmup, None, (), kwargs)
    step = lambda _, s: kernel.sample(s, (), kwargs)  # noqa: E731
    return jax.jit(lambda s: lax.fori_loop(0, num_warmup + num_steps, step, s))(state)


@pytest.mark.parametrize("kernel, law", MOST_CASES)
def test_stationary_law_is_that_of_enumeration(kernel, law):
    kernel, law = KERNELS[kernel], LAWS[law]
    state = last(kernel.make(law.model), 10_000, kernel.num_steps // 3, kernel.num_steps)
    assert abs(law.z_score(state.z["s"])) < 4.5
    assert np.all(np.abs(law.moment_z_scores(state.z["s"])) < 4.5)
    energy = np.asarray(law.energy(np.asarray(state.z["s"])))
    np.testing.assert_allclose(state.potential_energy, energy, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kernel, law", CASES)
def test_stationary_law_in_double_precision(kernel, law):
    kernel, model = KERNELS[kernel], LAWS[law].model
    with enable_x64():
        state = last(kernel.make(model), 20_000, kernel.num_steps // 3, kernel.num_steps)
        assert state.potential_energy.dtype == "float64" and state.z["s"].dtype == "int64"
        assert abs(LAWS[law].z_score(state.z["s"])) < 4.5


@pytest.mark.parametrize("law", LAWS)
def test_how_blocks_are_drawn(law):
    [block] = ebm.BlockGibbs(LAWS[law].model).plan(num_rows=3)
    assert block.kind == LAWS[law].kind
    if block.kind == "coloured":
        assert block.colors.max() == 1


def test_a_sweep_of_a_lattice_is_two_gradients():
    """Whatever its size: no loop over units is left in the compiled sweep."""
    calls = []

    def model(side):
        calls.append(1)
        with numpyro.plate("data", 2):
            s = 2 * numpyro.sample("s", ebm.Counting(2, (side, side))) - 1
            bonds = s * jnp.roll(s, 1, 1) + s * jnp.roll(s, 1, 2)
            ebm.energy("E", -0.4 * jnp.sum(bonds, (1, 2)))

    kernel = ebm.BlockGibbs(ebm.fixed(model, {}))
    for side in (4, 20):
        z = {"s": jnp.zeros((2, side, side), int)}
        state = BlockGibbsState(jnp.array(0), z, jnp.zeros(2), jax.random.key(0))
        [block] = kernel.plan(side)
        checkerboard = np.indices((side, side)).sum(0) % 2
        assert set(block.colors[checkerboard.ravel() == 0]) != set(
            block.colors[checkerboard.ravel() == 1]
        )
        jaxpr = jax.make_jaxpr(lambda s, side=side: kernel.sample(s, (side,), {}))(state)
        scans = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "scan"]
        assert [e.params["length"] for e in scans] == [2]


def test_the_unadjusted_proposals_are_biased_as_known():
    g, step_size = np.array([1.5, -0.7, 0.2]), 0.8

    def model(num_rows):
        with numpyro.plate("data", num_rows):
            s = numpyro.sample("s", ebm.Counting(2, (3,)))
            ebm.energy("E", -s @ g)

    def odds(adjusted):
        kernel = ebm.DiscreteLangevin(ebm.fixed(model, {}), step_size, adjusted=adjusted)
        p = np.mean(last(kernel, 100_000, 0, 25).z["s"], 0)
        return np.log(p / (1 - p)), 1 / np.sqrt(p * (1 - p) * 100_000)

    a = 1 / (2 * step_size)
    biased = g + np.log1p(np.exp(-g / 2 - a)) - np.log1p(np.exp(g / 2 - a))
    for adjusted, expected in ((True, g), (False, biased)):
        found, error = odds(adjusted)
        assert np.all(np.abs(found - expected) < 4.5 * error)
    assert np.max(np.abs(biased - g)) > 20 * error.max()


@pytest.mark.slow
def test_the_unadjusted_proposals_miss_a_coupled_law():
    law = LAWS["dense"]
    kernel = ebm.DiscreteLangevin(law.model, 1.0, adjusted=False)
    assert law.z_score(last(kernel, 20_000, 0, 60).z["s"]) > 50


def test_step_size_is_adapted_to_the_acceptance():
    kernel = ebm.DiscreteLangevin(LAWS["ordinal"].model, target_accept_prob=0.8)
    state = last(kernel, 500, 300, 300)
    assert abs(state.mean_accept_prob - 0.8) < 0.05
    assert state.adapt_state.step_size != 0.2


# Declared colours


def running(num_rows=1):
    """A chain of spins through differences of a running sum: no rule knows it."""
    with numpyro.plate("data", num_rows):
        s = numpyro.sample("s", ebm.Counting(2, (6,)))
        neighbours = jnp.diff(jnp.cumsum(s * jnp.roll(s, 1, -1), -1), prepend=0.0)
        ebm.energy("E", -0.8 * jnp.sum(neighbours, -1) - s @ FIELD[:6])


def test_declared_colors_are_used_and_tried():
    model = ebm.fixed(running, {})
    assert ebm.BlockGibbs(model).plan()[0].kind == "sequential"
    kernel = ebm.BlockGibbs(model, colors={"s": np.arange(6) % 2})
    assert kernel.plan()[0].colors.tolist() == [0, 1] * 3
    law = Law(lambda s: -0.8 * np.sum(s * np.roll(s, 1, -1), -1) - s @ FIELD[:6], 2, 6, "")
    assert abs(law.z_score(last(kernel, 20_000, 0, 25).z["s"])) < 4.5
    wrong = ebm.BlockGibbs(model, colors={"s": np.array([0, 1, 0, 1, 1, 2])})
    with pytest.raises(ebm.ModelError, match=r"units \(3,\) and \(4,\) of 's'.*interact"):
        last(wrong, 3, 0, 1)
    all_at_once = ebm.BlockGibbs(model, colors={"s": np.zeros(6, int)})
    with pytest.raises(ebm.ModelError, match="of 's'.*interact"):  # vectorised chains
        all_at_once.init(jax.random.split(jax.random.key(0), 2), 0, None, (), {})


def test_a_weak_interaction_of_one_pair_is_found():
    def log_density(x):
        return 0.01 * x["s"][:, 3] * x["s"][:, 17] + jnp.sum(jnp.sin(x["s"]), -1)

    position = {"s": jnp.zeros((1, 30), int)}
    colors = {"s": np.zeros(30, int)}
    plan = plan_block(log_density, position, ["s"], {"s": np.arange(3)}, colors)
    assert chromatic_gibbs.find_interaction(jax.random.key(0), log_density, position, plan) == (
        3,
        17,
    )


@pytest.mark.parametrize(
    "colors, message",
    [
        ({"t": np.zeros(6, int)}, r"names 't'.*\['s'\]"),
        ({"s": np.zeros(5, int)}, r"shape \(5,\).*shape \(6,\)"),
        ({"s": np.zeros(6)}, "'s' must be integers"),
        ([0, 1], "dict of arrays"),
    ],
)
def test_bad_colors(colors, message):
    with pytest.raises(ebm.ModelError, match=message):
        last(ebm.BlockGibbs(ebm.fixed(running, {}), colors=colors), 3, 0, 1)


# Protocol -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Some donated buffers:UserWarning")  # NumPyro's, under vmap
@pytest.mark.parametrize(
    "name, method",
    [
        ("DiscreteLangevin", "vectorized"),
        *(
            pytest.param(name, method, marks=pytest.mark.slow)
            for name, method in itertools.product(KERNELS, ("sequential", "vectorized", jax.vmap))
            if (name, method) != ("DiscreteLangevin", "vectorized")
        ),
    ],
)
def test_protocol(name, method):
    law = LAWS["ordinal"]
    kernel = KERNELS[name].make(law.model)
    options = {"num_warmup": 5, "num_samples": 20, "num_chains": 2, "progress_bar": False}
    mcmc = MCMC(kernel, chain_method=method, **options)
    mcmc.run(jax.random.key(0), num_rows=3, extra_fields=kernel.default_fields[1:])
    draws = mcmc.get_samples(group_by_chain=True)
    assert draws["s"].shape == (2, 20, 3, 6) and draws["s"].dtype == "int32"
    assert np.any(draws["s"][0] != draws["s"][1])
    extra = mcmc.get_extra_fields(group_by_chain=True)
    assert extra["potential_energy"].shape == (2, 20, 3)
    energy = law.energy(np.asarray(draws["s"]).reshape(-1, 6)).reshape(2, 20, 3)
    np.testing.assert_allclose(extra["potential_energy"], energy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KERNELS)
def test_states_start_where_they_are_told_and_refresh(name):
    law = LAWS["ordinal"]
    kernel = KERNELS[name].make(law.model)
    kwargs = {"num_rows": 3}
    state = kernel.init(jax.random.key(0), 5, {"s": jnp.ones((3, 6), int)}, (), kwargs)
    np.testing.assert_array_equal(state.z["s"], 1)
    again = kernel.refresh(state, (), kwargs)
    np.testing.assert_allclose(again.potential_energy, state.potential_energy)
    np.testing.assert_array_equal(kernel.get_constrain_fn((), kwargs)(state.z)["s"], state.z["s"])
    wrapped = kernel.wrap_model(lambda m: m)
    assert wrapped is not kernel and wrapped.model is law.model
    assert isinstance(kernel.get_diagnostics_str(state), str)


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ({"differences": "exact"}, {"adjusted": False})
        ),
    ],
)
def test_the_langevin_sampler_is_blackjax_shaped(options):
    def log_density(x):
        return -dense_energy(x["s"]) + x["a"] * x["s"][:, 0]

    position = {"s": jnp.zeros((4, 6), int), "a": jnp.ones(4, int)}
    values = {"a": [1, 2, 5], "s": [0, 1]}
    algorithm = discrete_langevin.as_top_level_api(log_density, 0.5, values, **options)
    state, step = jax.jit(algorithm.init)(position), jax.jit(algorithm.step)
    for key in jax.random.split(jax.random.key(0), 20):
        state, info = step(key, state)
        assert set(np.unique(state.position["a"])) <= {1, 2, 5}
        assert set(np.unique(state.position["s"])) <= {0, 1}
    assert state.position["s"].dtype == "int32" and not info.is_divergent.any()
    np.testing.assert_allclose(state.logdensity, log_density(state.position), rtol=1e-5)


# Mixed models -------------------------------------------------------------------------------------

CONTINUOUS = {"MALA": ebm.MALA, "NUTS": NUTS, "BlockGibbs": ebm.BlockGibbs}
DISCRETE = {
    "BlockGibbs": ebm.BlockGibbs,
    "DiscreteLangevin": ebm.DiscreteLangevin,
    "DiscreteGibbs": DiscreteGibbs,
}
FAST_PAIRS = {("MALA", "BlockGibbs")}
PAIRS = [
    pytest.param(*pair, marks=[] if pair in FAST_PAIRS else pytest.mark.slow)
    for pair in itertools.product(CONTINUOUS, DISCRETE)
]


def run(kernel, num_samples=8_000, num_warmup=500, **kwargs):
    mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, progress_bar=False)
    mcmc.run(jax.random.key(1), **kwargs)
    return {k: np.asarray(x) for k, x in mcmc.get_samples().items()}


def compose(model, first, continuous, second, discrete):
    return Gibbs([(CONTINUOUS[first](model), continuous), (DISCRETE[second](model), discrete)])


@pytest.mark.parametrize("first, second", PAIRS)
def test_real_visible_and_discrete_hidden_units_take_turns(grbm, first, second):
    model = ebm.fixed(grbm.model, grbm.params)
    draws = run(compose(model, first, ["v"], second, ["h"]))
    mean, second_moment, hidden = grbm.oracle.moments()
    v, h = draws["v"].swapaxes(0, 1), draws["h"].swapaxes(0, 1)
    assert_mean(v, mean)
    assert_mean(v[..., 0] * v[..., 1], second_moment[0, 1])
    assert_mean(h, hidden)


LOADINGS = np.array([[0.8, -0.3], [0.5, 0.6], [-0.7, 0.4], [0.2, 0.9]])
BIASES = np.array([0.2, -0.4, 0.5, -0.8])


def factors(num_rows=1):
    """Discrete visible units x with real latents z: z | x ~ N(xᵀ L, 1), softened by a quartic."""
    with numpyro.plate("data", num_rows):
        x = numpyro.sample("x", ebm.Counting(2, (4,)))
        z = numpyro.sample("z", ebm.Lebesgue((2,)))
        bowl = 0.5 * jnp.sum(z**2, -1) + 0.05 * jnp.sum(z**4, -1)
        ebm.energy("E", bowl - jnp.sum((x @ LOADINGS) * z, -1) - x @ BIASES)


def factor_moments():
    """E[x] and E[z] by a sum over x and a grid over each coordinate of z."""
    x = np.indices((2,) * 4).reshape(4, -1).T
    grid = np.linspace(-8, 8, 4_001)
    log_weight = (x @ LOADINGS)[..., None] * grid - 0.5 * grid**2 - 0.05 * grid**4
    weight = np.exp(log_weight)  # (16, 2, grid)
    integrals = weight.sum(-1)
    p = np.exp(x @ BIASES) * integrals.prod(-1)
    p /= p.sum()
    return p @ x, p @ ((weight * grid).sum(-1) / integrals)


@pytest.mark.parametrize(
    "first, second",
    [
        ("MALA", "DiscreteLangevin"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("MALA", "BlockGibbs"), ("NUTS", "BlockGibbs"), ("NUTS", "DiscreteGibbs"))
        ),
    ],
)
def test_discrete_visible_and_real_latent_units_take_turns(first, second):
    draws = run(compose(ebm.fixed(factors, {}), first, ["z"], second, ["x"]), num_rows=4)
    mean_x, mean_z = factor_moments()
    assert_mean(draws["x"].swapaxes(0, 1), mean_x)
    assert_mean(draws["z"].swapaxes(0, 1), mean_z)


@pytest.mark.parametrize(
    "name", ["DiscreteLangevin", pytest.param("BlockGibbs", marks=pytest.mark.slow)]
)
def test_geweke_data_and_hidden_units_have_their_joint_law(grbm, name):
    """v | h drawn by its formula, h | v by a step of the kernel: the joint law is kept."""
    num_rows, oracle = 10_000, grbm.oracle

    def conditional(v):
        model = ebm.fixed(ebm.models.grbm, grbm.params)
        return handlers.condition(model, {"v": v})(num_hidden=3, num_rows=num_rows)

    kernel = {"DiscreteLangevin": lambda m: ebm.DiscreteLangevin(m, 2.0)}.get(name, ebm.BlockGibbs)
    kernel = kernel(conditional)
    W, b, scale = (jnp.asarray(grbm.params[k]) for k in ("W", "b", "scale"))

    def both(_, carry):
        key, v, state = carry
        key, key_v = jax.random.split(key)
        noise = jax.random.normal(key_v, v.shape)
        v = (b + scale**2 * (state.z["h"] @ W.T) + scale * noise).astype(v.dtype)
        state = kernel.sample(kernel.refresh(state, (), {"v": v}), (), {"v": v})
        return key, v, state

    v = jnp.zeros((num_rows, 2))
    state = kernel.init(jax.random.key(0), 0, None, (), {"v": v})
    _, v, state = jax.jit(lambda c: lax.fori_loop(0, 60, both, c))((jax.random.key(1), v, state))
    v, h = np.asarray(v), np.asarray(state.z["h"])
    expected = num_rows * oracle.state_probabilities()
    counts = np.bincount(h @ [1, 2, 4], minlength=8)
    assert np.sum((counts - expected) ** 2 / expected) < 7 + 4.5 * 14**0.5
    mean, second, _ = oracle.moments()
    for x, moment in ((v, mean), (v[:, :, None] * v[:, None], second)):
        assert np.all(np.abs(x.mean(0) - moment) < 4.5 * x.std(0) / num_rows**0.5)
    # h belongs to its v: E[v h] = E[v E[h | v]].
    product = v[:, :, None] * (h - oracle.posterior_mean(v))[:, None]
    assert np.all(np.abs(product.mean(0)) < 4.5 * product.std(0) / num_rows**0.5)


# Drawing in one call ------------------------------------------------------------------------------


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
    from numpyro_ebm.mcmc.sampling import _describe

    if expected is None:
        assert kernel is None
    else:
        import re

        assert re.fullmatch(expected, _describe(kernel)), _describe(kernel)


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


PRECISION = np.array([[1.5, 0.6, -0.3], [0.6, 1.2, 0.4], [-0.3, 0.4, 1.0]])
MASK = np.array([[True, False], [False, True], [False, False]])  # (pixels, rows)
SEEN = np.array([[1.0, 9.0], [9.0, -0.5], [9.0, 9.0]])  # 9 where nothing is seen


def pixels():
    rows = numpyro.plate("data", 2, dim=-1)
    with rows, numpyro.plate("pixels", 3, dim=-2):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=jnp.asarray(SEEN), obs_mask=MASK)
    with rows:
        ebm.energy("E", 0.5 * jnp.einsum("in,ij,jn->n", v, PRECISION, v))


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


# Bad input ----------------------------------------------------------------------------------------


def poisson():
    with numpyro.plate("data", 2):
        n = numpyro.sample("n", dist.Poisson(2.0))
        ebm.energy("E", 0.1 * n)


def broken():
    with numpyro.plate("data", 2):
        s = numpyro.sample("s", ebm.Counting(2, (3,)))
        ebm.energy("E", jnp.log(jnp.sum(s, -1) - 10.0))


def one_site(energy):
    def model():
        with numpyro.plate("data", 2):
            s = numpyro.sample("s", ebm.Counting(3, (3,)))
            ebm.energy("E", energy(s))

    return ebm.fixed(model, {})


def step(kernel):
    return MCMC(kernel, num_warmup=2, num_samples=2, progress_bar=False).run(jax.random.key(0))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ebm.DiscreteLangevin(broken, 0.0), "step_size.*positive"),
        (lambda: ebm.DiscreteLangevin(broken, float("nan")), "step_size.*positive"),
        (lambda: ebm.DiscreteLangevin(broken, target_accept_prob=1.0), "target_accept_prob"),
        (lambda: ebm.DiscreteLangevin(broken, differences="none"), "differences.*'none'"),
        (lambda: ebm.DiscreteLangevin(broken, adjusted=False), "pass a `step_size`"),
        (
            lambda: step(ebm.DiscreteLangevin(LAWS["dense"].model, adapt_step_size=False)),
            "pass a `step_size`",
        ),
        (lambda: step(ebm.DiscreteLangevin(ebm.fixed(poisson, {}))), "'n'.*Poisson.*finite"),
        (lambda: ebm.sample(jax.random.key(0), ebm.fixed(poisson, {}), 2), "'n'.*Poisson.*finite"),
        (
            lambda: step(ebm.DiscreteLangevin(ebm.fixed(broken, {}))),
            r"not finite at the initial.*'E'.*init_params",
        ),
        (
            lambda: step(ebm.BlockGibbs(ebm.fixed(broken, {}))),
            r"not finite at the initial.*'E'.*init_params",
        ),
        (
            lambda: step(ebm.DiscreteLangevin(ebm.fixed(factors, {}))),
            r"Gibbs\(\[\(MALA\(model\), \['z'\]\), \(DiscreteLangevin\(model\), \['x'\]\)",
        ),
        (lambda: step(ebm.DiscreteLangevin(ebm.fixed(pixels, {}))), "continuous.*MALA"),
        (lambda: step(ebm.MALA(LAWS["dense"].model)), "DiscreteLangevin"),
        (lambda: step(ebm.DiscreteLangevin(ebm.models.grbm)), "'W', 'b', 'c', 'scale'.*fixed"),
        (
            lambda: step(ebm.DiscreteLangevin(one_site(lambda s: jnp.arange(3.0)[s].sum(-1)))),
            r"no gradient in \['s'\].*BlockGibbs.*exact",
        ),
        (
            lambda: step(ebm.DiscreteLangevin(one_site(lambda s: jax.nn.one_hot(s, 3)[:, 0, 1]))),
            r"no gradient in \['s'\].*DiscreteGibbs",
        ),
        (
            lambda: step(ebm.DiscreteLangevin(one_site(lambda s: 1.0 * jnp.sum(s == 1, -1)))),
            r"no gradient in \['s'\]",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ebm.ModelError, match=message):
        make()


PARALLEL = """
import sys
sys.path.insert(0, {here!r})
import jax, jax.numpy as jnp, numpy as np, numpyro
from numpyro.infer import MCMC
import numpyro_ebm as ebm
assert jax.local_device_count() == 2

def chain(num_rows=3):
    with numpyro.plate("data", num_rows):
        s = numpyro.sample("s", ebm.Counting(2, (6,)))
        ebm.energy("E", -jnp.sum(s[:, 1:] * s[:, :-1], -1))

model = ebm.fixed(chain, {{}})
for kernel in (ebm.DiscreteLangevin(model), ebm.BlockGibbs(model)):
    mcmc = MCMC(kernel, num_warmup=8, num_samples=10, num_chains=2, chain_method="parallel",
                progress_bar=False)
    mcmc.run(jax.random.key(0))
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["s"])
    assert draws.shape == (2, 10, 3, 6), draws.shape
    assert np.any(draws[0] != draws[1])
"""


@pytest.mark.slow
def test_chains_in_parallel():
    """On two host devices, which have to be asked for before JAX starts."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    script = PARALLEL.format(here=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
