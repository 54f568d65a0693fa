# SPDX-License-Identifier: Apache-2.0
"""Couplings and fields that are read off an energy give it back, at all states."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_ebm.program.multi_affine import multi_affine
from numpyro_ebm.program.potts import read_potts

RNG = np.random.default_rng(8)
J = np.triu(RNG.normal(size=(4, 4)), 1)
FIELDS = RNG.normal(size=(4, 3))
OFFSETS = RNG.normal(size=(2, 4))


def one_hot(x):
    o = jax.nn.one_hot(x["s"], 3)
    return jnp.einsum("nia,ij,nja->n", o, jnp.asarray(abs(J)), o) + jnp.sum(o * FIELDS, (1, 2))


def tables(x):
    """Multiples of [equal values] beside terms of one unit, in a table of codes of pairs."""
    table = jnp.asarray(0.7 * np.eye(3) + FIELDS[0][:, None] + FIELDS[1])
    codes = 3 * x["s"][:, :-1] + x["s"][:, 1:]
    return jnp.sum(jnp.take(table.ravel(), codes), -1)


def square(x):
    """A unit of two values meets itself; in the second row only two of them meet."""
    s = 2 * x["s"] - 1
    all_of_them, two = jnp.array([0.3, 0.0]), jnp.array([0.0, 0.4])
    return all_of_them * jnp.sum(s, -1) ** 2 + two * s[:, 0] * s[:, 1] - s @ J[0]


def spins(x):
    return jnp.sum((x["s"] @ J) * x["s"], -1)


def neighbours(x):
    """A unit times a sum of two others, each a table of its own: pairs, not triples."""
    s = 2.0 * x["s"] - 1.0
    return 0.4 * jnp.sum(s * (jnp.roll(s, 1, -1) + jnp.roll(s, 2, -1)), -1)


def uneven(x):
    pairs = (x["a"][:, :, None] == x["s"][:, None]) * abs(J[:2, :3])
    return jnp.sum(pairs, (1, 2)) + jnp.sum(jnp.asarray(FIELDS)[jnp.arange(3), x["s"]], -1)


def rows(x):
    """Two rows have couplings of their own, each of them pairs that the other has not."""
    own = OFFSETS[:, :3] ** 2 * np.array([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    return jnp.sum(own * (x["s"][:, 1:] == x["s"][:, :-1]), -1)


CASES = {
    "square": (square, {"s": ([0, 1], 4)}, 2),
    "one-hot": (one_hot, {"s": ([0, 1, 2], 4)}, 1),
    "tables": (tables, {"s": ([0, 1, 2], 4)}, 1),
    "spins": (spins, {"s": ([-1, 1], 4)}, 1),
    "neighbours": (neighbours, {"s": ([0, 1], 5)}, 1),
    "uneven": (uneven, {"a": ([0, 1], 2), "s": ([0, 1, 2], 3)}, 1),
    "rows": (rows, {"s": ([0, 1, 2], 4)}, 2),
}
SLOW = ("one-hot", "tables", "spins", "rows")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in CASES]
)
def test_couplings_and_fields_are_the_energy(name):
    fn, units, num_rows = CASES[name]
    like = {k: jnp.zeros((num_rows, size), int) for k, (_, size) in units.items()}
    values = {k: x for k, (x, _) in units.items()}
    potts = read_potts(multi_affine(lambda _, x: fn(x), {}, like, values, in_pairs=True))
    assert potts.is_checked
    columns = [x for x, size in units.values() for _ in range(size)]
    states = np.array(list(itertools.product(*columns)))
    sizes = [size for _, size in units.values()]
    index = np.argmax(states[..., None] == potts.values, -1)
    first, second = potts.pairs.T
    equal = index[:, first] == index[:, second]
    for row in range(num_rows):
        found = equal @ potts.couplings[row]
        found = found + potts.fields[row][np.arange(index.shape[1]), index].sum(-1)
        parts = np.split(states, np.cumsum(sizes)[:-1], axis=1)
        given = dict(zip(units, parts, strict=True))
        given = {k: jnp.stack([jnp.asarray(x)] * num_rows, 1) for k, x in given.items()}
        expected = np.asarray(jax.vmap(fn)(given))[:, row]
        assert np.ptp(found - expected) < 1e-4
        assert np.ptp(found) > 0.5
