# SPDX-License-Identifier: Apache-2.0
"""One sweep of Gibbs from a given state: the transition matrix of its order, by enumeration.

Stationary laws do not tell a sweep from one in another order, nor one that draws too little anew.
"""

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_ebm.program.multi_affine import multi_affine
from numpyro_ebm.samplers import block_gibbs, monomial_gibbs
from numpyro_ebm.samplers.gibbs_blocks import Block

NUM = 2_000
RNG = np.random.default_rng(6)
PAIRS = RNG.normal(size=(4, 3, 4, 3)) * 1.2
TRIPLES = RNG.normal(size=(4, 3, 4, 3, 4, 3)) * 1.2
VALUES = {"a": np.array([0, 1]), "b": np.array([2, 3, 5])}


def codes(x):
    """One-hot codes of the coordinates a₀, a₁, b₀, b₁, side by side."""
    values = jnp.array([[0, 1, 9], [0, 1, 9], [2, 3, 5], [2, 3, 5]])
    x = jnp.concatenate([x["a"], x["b"]], 1)
    return jnp.reshape((x[..., None] == values) * 1.0, (-1, 12))


def pairs(*which):
    """Terms of some pairs of coordinates, by their states."""
    table = np.zeros((4, 3, 4, 3))
    for i, j in which:
        table[i, :, j] = PAIRS[i, :, j]
    table = table.reshape(12, 12)
    return lambda x: jnp.sum((codes(x) @ table) * codes(x), 1)


def triples(x):
    i, j, k = np.indices((4, 4, 4))
    table = TRIPLES * ((i < j) & (j < k))[:, None, :, None, :, None]
    o = codes(x)
    return jnp.einsum("ni,nj,nk,ijk->n", o, o, o, table.reshape(12, 12, 12))


def cubic(x):
    a, b = x["a"] * 1.0, x["b"] * 1.0
    return 0.9 * a[:, 0] * b[:, 0] - 0.1 * b[:, 0] ** 3 * a[:, 1] + 0.3 * b[:, 1] * a[:, 1] ** 2


def opaque(x):
    return jnp.log(jnp.exp(pairs((0, 1), (0, 2), (1, 3))(x)))


ALL = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
AB, BA = ("a", "b"), ("b", "a")
# Log-density, kind, names of the block, colours, degree, whether it has a form, order of drawing
# there; it is back again that a sweep is tried.
SWEEPS = {
    "one by one": (pairs(*ALL), "sequential", BA, None, 2, True, [2, 3, 0, 1]),
    "one by one, without a form": (opaque, "sequential", AB, None, np.inf, False, [0, 1, 2, 3]),
    "colours of a form": (pairs(*ALL[1:5]), "coloured", AB, [1, 1, 0, 0], 2, True, [2, 3, 0, 1]),
    "colours of a cubic": (cubic, "coloured", AB, [1, 1, 0, 0], 4, False, [2, 3, 0, 1]),
    "colours without a form": (opaque, "coloured", AB, [2, 0, 0, 1], np.inf, False, [1, 2, 3, 0]),
    "bits without a form": (opaque, "coloured", ("a",), [1, 0], np.inf, False, [1, 0]),
    "products": (triples, "coloured", BA, [2, 0, 3, 1], 3, True, [3, 1, 2, 0]),
}
STATES = np.array(list(np.ndindex(2, 2, 3, 3)))
STARTS = [7, 20, 33]


def position(states):
    return {
        "a": jnp.asarray(VALUES["a"][states[:, :2]]),
        "b": jnp.asarray(VALUES["b"][states[:, 2:]]),
    }


def transitions(log_density, order):
    """The product of the matrices that draw one coordinate each."""
    log_p = np.asarray(log_density(position(STATES)), float)

    def of_one(i):
        others = np.delete(STATES, i, 1)
        same = np.all(others[:, None] == others, -1)
        p = same * np.exp(log_p - log_p.max())
        return p / p.sum(1, keepdims=True)

    return reduce(np.matmul, map(of_one, order))


def assert_transitions(drawn, expected):
    """Counts of the states that were reached from each start."""
    a = np.asarray(drawn["a"])
    b = np.searchsorted(VALUES["b"], np.asarray(drawn["b"]))
    index = np.ravel_multi_index((a[:, 0], a[:, 1], b[:, 0], b[:, 1]), (2, 2, 3, 3))
    for i, start in enumerate(STARTS):
        p = expected[start]
        found = np.bincount(index[i * NUM : (i + 1) * NUM], minlength=len(STATES))
        error = np.sqrt(NUM * p * (1 - p)) + 0.5
        assert np.abs((found - NUM * p) / error).max() < 4.5


def block_of(log_density, kind, names, colors, degree, has_form):
    colors = None if colors is None else np.array(colors)
    form = multi_affine(lambda _, x: log_density(x), {}, position(STATES[:1]), VALUES)
    assert form is not None or not has_form
    values = {name: VALUES[name] for name in names}
    return Block(names, kind, values, False, colors, degree, form if has_form else None)


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_has_the_transitions_of_its_order(name, monkeypatch):
    monkeypatch.setattr(monomial_gibbs, "OPERATIONS_PER_FACTOR", 0)
    log_density, *made, order = SWEEPS[name]
    block = block_of(log_density, *made)
    assert (monomial_gibbs.plan_monomials(block) is not None) == ("products" in name)
    start = position(STATES[np.repeat(STARTS, NUM)])

    @jax.jit
    def draw(key):
        return block_gibbs.draw_block(key, start, log_density, block, backwards=True)

    drawn = draw(jax.random.key(8))
    assert set(drawn) == set(block.names)
    assert_transitions({**start, **drawn}, transitions(log_density, order[::-1]))


@pytest.mark.parametrize("reversible", [False, True])
def test_a_kernel_draws_its_blocks_in_order_and_back_again(reversible, monkeypatch):
    """Each given what the others have drawn before it, with a key of its own."""
    seen, keys = [], []

    def draw(key, position, logdensity_fn, block, *, backwards=False):
        seen.append((block, backwards))
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return {block: 2 * position["a"] + 3 * position["b"] + 5 * position["c"]}

    monkeypatch.setattr(block_gibbs, "draw_block", draw)
    state = block_gibbs.init({k: jnp.ones(1) for k in "abc"}, lambda x: x["a"] - x["b"] + x["c"])
    new, info = block_gibbs.build_kernel(reversible)(
        jax.random.key(0), state, lambda x: x["a"] - x["b"] + x["c"], ["b", "a", "c"]
    )
    there = [("b", False), ("a", False), ("c", False)]
    assert seen == there + [(k, True) for k in "cab"] * reversible
    assert len(set(keys)) == len(seen)
    at = dict.fromkeys("abc", 1)
    for name, _ in seen:
        at[name] = 2 * at["a"] + 3 * at["b"] + 5 * at["c"]
    assert {k: float(x[0]) for k, x in new.position.items()} == at
    assert new.logdensity == at["a"] - at["b"] + at["c"] and not info.is_divergent
