# SPDX-License-Identifier: Apache-2.0
"""What the tests of mcmc share."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import lax
from numpyro.infer import MCMC
from registry.kernels import kernels

import numpyro_ebm as ebm

SIDE = 4


TORUS = np.array(
    [
        (SIDE * i + j, SIDE * ((i + k) % SIDE) + (j + 1 - k) % SIDE)
        for i, j, k in itertools.product(range(SIDE), range(SIDE), range(2))
    ]
)


ADJACENT = np.zeros((SIDE**2, SIDE**2))
ADJACENT[TORUS[:, 0], TORUS[:, 1]] = ADJACENT[TORUS[:, 1], TORUS[:, 0]] = 1.0


def ends(s):
    """Values at the two ends of every bond."""
    return s[:, TORUS[:, 0]], s[:, TORUS[:, 1]]


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


def law_of(name):
    """One of the laws of six units that a kernel is tried on."""
    return LAWS[(KERNELS[name].laws or ("ordinal",))[-1]]


def last(kernel, num_rows, num_warmup, num_steps, seed=0, **kwargs):
    """The state after some steps: rows are independent draws."""
    kwargs = {"num_rows": num_rows, **kwargs}
    state = kernel.init(jax.random.key(seed), num_warmup, None, (), kwargs)
    step = lambda _, s: kernel.sample(s, (), kwargs)  # noqa: E731
    return jax.jit(lambda s: lax.fori_loop(0, num_warmup + num_steps, step, s))(state)


LOADINGS = np.array([[0.8, -0.3], [0.5, 0.6], [-0.7, 0.4], [0.2, 0.9]])
BIASES = np.array([0.2, -0.4, 0.5, -0.8])


def factors(num_rows=1):
    """Discrete visible units x with real latents z: z | x ~ N(xᵀ L, 1), softened by a quartic."""
    with numpyro.plate("data", num_rows):
        x = numpyro.sample("x", ebm.Counting(2, (4,)))
        z = numpyro.sample("z", ebm.Lebesgue((2,)))
        bowl = 0.5 * jnp.sum(z**2, -1) + 0.05 * jnp.sum(z**4, -1)
        ebm.energy("E", bowl - jnp.sum((x @ LOADINGS) * z, -1) - x @ BIASES)


PRECISION = np.array([[1.5, 0.6, -0.3], [0.6, 1.2, 0.4], [-0.3, 0.4, 1.0]])
MASK = np.array([[True, False], [False, True], [False, False]])  # (pixels, rows)
SEEN = np.array([[1.0, 9.0], [9.0, -0.5], [9.0, 9.0]])  # 9 where nothing is seen


def pixels():
    rows = numpyro.plate("data", 2, dim=-1)
    with rows, numpyro.plate("pixels", 3, dim=-2):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=jnp.asarray(SEEN), obs_mask=MASK)
    with rows:
        ebm.energy("E", 0.5 * jnp.einsum("in,ij,jn->n", v, PRECISION, v))


def step(kernel):
    return MCMC(kernel, num_warmup=2, num_samples=2, progress_bar=False).run(jax.random.key(0))
