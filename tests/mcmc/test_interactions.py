# SPDX-License-Identifier: Apache-2.0
"""Interaction graphs and their colourings."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from discrete_cases import ADJACENT, SIDE, TORUS, ends
from jax import lax

from numpyro_ebm.program.coloring import greedy_colors
from numpyro_ebm.program.interactions import interactions

UPPER = 0.3 * np.triu(ADJACENT)
TABLE = np.random.default_rng(0).normal(size=(3, 3))


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


RNG = np.random.default_rng(5)
SIGNED = RNG.normal(size=(2, 5, 5)) * (RNG.random((2, 5, 5)) < 0.3)
FORMS = {
    "rows by a matrix": lambda s: jnp.sum((s @ SIGNED[0]) * s, -1),
    "a matrix by rows": lambda s: jnp.sum((SIGNED[0] @ s.T).T * s, -1),
    "einsum": lambda s: jnp.einsum("ni,ij,nj->n", s, SIGNED[0], s),
    "mask": lambda s: jnp.sum(SIGNED[0] * s[:, :, None] * s[:, None], (1, 2)),
    "powers": lambda s: jnp.sum((s @ SIGNED[0]) ** 2, -1),
    "a matrix for each row": lambda s: jnp.einsum("ni,nij,nj->n", s, SIGNED, s),
    "a mask for each row": lambda s: jnp.sum(SIGNED * s[:, :, None] * s[:, None], (1, 2)),
}


@pytest.mark.parametrize("name", FORMS)
def test_interactions_are_those_of_differences(name):
    """Constants of both signs, and zeros, which may be elsewhere in every row."""
    zero, fn = jnp.zeros((2, 5), int), FORMS[name]
    found = interactions(lambda x: fn(x["s"]), {"s": zero}).toarray()
    unit = jnp.eye(5, dtype=int)
    for i, j in itertools.permutations(range(5), 2):
        both = fn(zero + unit[i] + unit[j]) - fn(zero + unit[i]) - fn(zero + unit[j]) + fn(zero)
        assert found[i, j] == np.any(np.abs(both) > 1e-5), (i, j)


@pytest.mark.parametrize(
    "fn",
    [
        lambda s: jnp.sum(s, -1) ** 2,
        lambda s: jnp.sum(jnp.cumsum(s, -1) ** 2, -1),
        lambda s: jnp.max(jnp.sort(s, -1), -1),
        lambda s: lax.fori_loop(0, 3, lambda i, t: t + s[:, 0] * s[:, 1], s.sum(-1)),
        lambda s: jnp.exp(jnp.sum(s * 0.1, -1)),
        lambda s: jnp.max(s, -1),
        lambda s: jnp.sum(0.3 * s, -1).astype(int),
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
