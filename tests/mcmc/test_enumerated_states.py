# SPDX-License-Identifier: Apache-2.0
"""Every sampler of discrete sites on energies of every kind: all states by enumeration."""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import lax
from oracles.values import Values
from registry.kernels import kernels, nothing

import numpyro_ebm as ebm

NUM_ROWS, NUM_STEPS = 8_000, 40


class Sites(NamedTuple):
    """An energy of some sites, with the values of a unit and the number of units of each."""

    energy: object
    units: dict

    def model(self, num_rows=1):
        with numpyro.plate("data", num_rows):
            sites = {
                name: numpyro.sample(name, Values(*values).expand([size]).to_event(1))
                for name, (values, size) in self.units.items()
            }
            ebm.energy("E", self.energy(sites))

    def states(self):
        columns = [values for values, size in self.units.values() for _ in range(size)]
        return np.array(list(itertools.product(*columns)))

    def energies(self, states):
        starts = np.cumsum([size for _, size in self.units.values()])[:-1]
        parts = np.split(states, starts, axis=1)
        return np.asarray(self.energy(dict(zip(self.units, map(jnp.asarray, parts), strict=True))))

    def z_score(self, z):
        """Of chi-square of independent rows; states of less than ten draws are put together."""
        drawn = np.concatenate([np.asarray(z[name]) for name in self.units], 1)
        return z_score(self.states(), self.energies(self.states()), drawn)


def z_score(states, energies, drawn):
    number = {tuple(x): i for i, x in enumerate(states.tolist())}
    weights = np.exp(energies.min() - np.asarray(energies, float))
    expected = len(drawn) * weights / weights.sum()
    counts = np.bincount([number[x] for x in map(tuple, drawn.tolist())], minlength=len(states))
    order = np.argsort(expected)
    group = (np.cumsum(expected[order]) // 10).astype(int)
    counts, expected = (np.bincount(group, x[order]) for x in (counts, expected))
    counts, expected = counts[expected > 2], expected[expected > 2]
    statistic, freedom = np.sum((counts - expected) ** 2 / expected), len(counts) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


RNG = np.random.default_rng(15)
GLASS = np.triu(RNG.normal(size=(6, 6)), 1) * 0.35
GLASS[:, 3] = GLASS[3] = 0.0  # a unit without neighbours
FIELD = RNG.normal(size=6) * 0.5
TABLE = RNG.normal(size=(3, 3))


def uneven(x):
    """Units of two and of three values; one of them has no neighbours."""
    a, b = x["a"], x["b"]
    pairs = 0.9 * (a[:, 0] == b[:, 0]) + 1.3 * (b[:, 0] == b[:, 1]) + 0.4 * (a[:, 1] == b[:, 1])
    return -pairs - jnp.sum(jnp.asarray(TABLE)[jnp.arange(3), b], -1) + 0.3 * a[:, 0]


def spins(x):
    """Couplings of either sign."""
    s = x["s"]
    return -jnp.sum((s @ GLASS) * s, -1) - s @ FIELD


def triples(x):
    s = x["s"]
    return -1.2 * s[:, 0] * s[:, 1] * s[:, 2] - 0.6 * s[:, 2] * s[:, 3] + s @ FIELD[:4]


def largest(x):
    """No polynomial in tables of single units."""
    s = x["s"]
    return 0.8 * jnp.max(s, -1) - 0.1 * s[:, 0] * s[:, 1] + 0.4 * s[:, 3]


def magnet(x):
    """Every unit meets itself in the square."""
    s = x["s"]
    return -0.08 * jnp.sum(s, -1) ** 2 + 0.2 * jnp.sum(s, -1)


def separate(x):
    """No unit has a neighbour."""
    return jnp.sum(jnp.asarray(TABLE)[jnp.arange(3), x["s"]], -1)


ENERGIES = {
    "uneven": Sites(uneven, {"a": ((0, 1), 2), "b": ((0, 1, 2), 3)}),
    "spins": Sites(spins, {"s": ((-1, 1), 6)}),
    "triples": Sites(triples, {"s": ((-1, 1), 4)}),
    "largest": Sites(largest, {"s": ((0, 1, 4), 4)}),
    "magnet": Sites(magnet, {"s": ((-1, 1), 6)}),
    "separate": Sites(separate, {"s": ((0, 1, 2), 3)}),
}

SAMPLERS = {
    "BlockGibbs": ebm.BlockGibbs,
    "BlockGibbs there and back": partial(ebm.BlockGibbs, reversible=True),
    "DiscreteLangevin": partial(ebm.DiscreteLangevin, step_size=3.0),
    "exact differences": partial(ebm.DiscreteLangevin, step_size=1.0, differences="exact"),
    "SwendsenWang": ebm.SwendsenWang,
    "replicas of BlockGibbs": partial(ebm.ReplicaExchange, kernel=ebm.BlockGibbs, num_replicas=3),
    "replicas of SwendsenWang": partial(
        ebm.ReplicaExchange, kernel=ebm.SwendsenWang, num_replicas=3
    ),
    "replicas of DiscreteLangevin": partial(
        ebm.ReplicaExchange,
        kernel=partial(ebm.DiscreteLangevin, step_size=1.0, differences="exact"),
        num_replicas=3,
    ),
}

REFUSED = {
    ("DiscreteLangevin", "uneven"): "no gradient in",
    ("DiscreteLangevin", "separate"): "no gradient in",
    ("SwendsenWang", "triples"): r"up to 3 units of \['s'\], .* Use `BlockGibbs`",
    ("SwendsenWang", "largest"): "is not seen to be a sum .* Use `BlockGibbs`",
}

REPLICAS = {"BlockGibbs": "magnet", "SwendsenWang": "spins", "DiscreteLangevin": "triples"}
PAIRS = [
    *itertools.product([name for name in SAMPLERS if "replicas" not in name], ENERGIES),
    *((f"replicas of {name}", energy) for name, energy in REPLICAS.items()),
]

QUICK = {("SwendsenWang", "spins")}


def last(kernel, num_rows=NUM_ROWS, num_steps=NUM_STEPS, args=()):
    """The state after some steps: rows are independent draws."""
    kwargs = {"num_rows": num_rows} if not args else {}
    state = kernel.init(jax.random.key(0), 0, None, args, kwargs)
    step = lambda _, s: kernel.sample(s, args, kwargs)  # noqa: E731
    return jax.jit(lambda s: lax.fori_loop(0, num_steps, step, s))(state)


@pytest.mark.parametrize(
    "sampler, energy",
    [
        pytest.param(*pair, marks=[] if pair in QUICK | set(REFUSED) else pytest.mark.slow)
        for pair in PAIRS
    ],
)
def test_the_law_of_every_sampler_is_that_of_enumeration(sampler, energy):
    law = ENERGIES[energy]
    kernel = SAMPLERS[sampler](ebm.fixed(law.model, {}))
    if (sampler, energy) in REFUSED:
        with pytest.raises(ebm.ModelError, match=REFUSED[sampler, energy]):
            kernel.init(jax.random.key(0), 0, None, (), {})
        return
    steps = 8 * NUM_STEPS if isinstance(kernel, ebm.DiscreteLangevin) else NUM_STEPS
    state = last(kernel, num_steps=steps)
    assert abs(law.z_score(state.z)) < 4.5
    drawn = np.concatenate([np.asarray(state.z[name]) for name in law.units], 1)
    assert np.ptp(state.potential_energy - law.energies(drawn)) < 1e-4  # all weigh alike


def test_every_sampler_of_discrete_sites_is_here():
    registered = kernels(moves_discrete=True, leaves_invariant=True).values()
    classes = {type(make(nothing)) for make in SAMPLERS.values()}
    assert {type(kernel.make(nothing)) for kernel in registered} <= classes
