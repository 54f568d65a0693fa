# SPDX-License-Identifier: Apache-2.0
"""Kernels that draw discrete sites from the energy in their indicators, against enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro.infer import MCMC
from scipy.stats import chisquare

import numpyro_ebm as ebm
from numpyro_ebm.samplers.indicator_gibbs import conditional_logits

RNG = np.random.default_rng(11)
FIELD = RNG.normal(size=(3, 3)).astype("float32")
COUPLING = RNG.normal(size=(3, 3, 3, 3)).astype("float32")
TRIPLE = RNG.normal(size=(3, 3, 3)).astype("float32")


def complete(x):
    """Every pair of sites interacts, by products of one-hot codes."""
    o = jax.nn.one_hot(x, 3).reshape(len(x), 9)
    upper = jnp.asarray(np.triu(np.ones((3, 3)), 1)[:, :, None, None] * COUPLING)
    return jnp.sum((o @ upper.transpose(0, 2, 1, 3).reshape(9, 9)) * o, -1) + o @ FIELD.ravel()


def chain(x):
    """The ends do not interact, by lookups."""
    pairs = jnp.asarray(COUPLING[0])[jnp.arange(2), x[:, :-1], x[:, 1:]]
    return jnp.sum(pairs, -1) + jnp.sum(jnp.asarray(FIELD)[jnp.arange(3), x], -1)


def mapped(x):
    """Triples of sites interact."""
    o = jax.nn.one_hot(x, 3)
    return jnp.einsum("na,nb,nc,abc->n", o[:, 0], o[:, 1], o[:, 2], jnp.asarray(TRIPLE))


ENERGIES = {"complete": (complete, "sequential"), "chain": (chain, "coloured")}
ENERGIES["mapped"] = (mapped, "sequential")


def model_of(log_density):
    def model(num_rows=1):
        with numpyro.plate("data", num_rows):
            x = numpyro.sample("x", ebm.Counting(3, (3,)))
            ebm.energy("E", -log_density(x))

    return ebm.fixed(model, {})


def counts_of(kernel, num_rows, num_sweeps):
    mcmc = MCMC(kernel, num_warmup=num_sweeps, num_samples=1, progress_bar=False)
    mcmc.run(jax.random.key(3), num_rows=num_rows)
    x = mcmc.get_samples()["x"][0]
    return np.bincount(np.asarray(x @ jnp.array([9, 3, 1])), minlength=27)


STATES = np.array(list(itertools.product(range(3), repeat=3)))


@pytest.mark.parametrize("name", ENERGIES)
def test_conditionals_are_those_of_the_table(name):
    log_density, kind = ENERGIES[name]
    [block] = ebm.BlockGibbs(model_of(log_density)).plan(num_rows=27)
    assert block.kind == kind and block.form is not None
    logits = np.asarray(conditional_logits(block.form, {"x": jnp.asarray(STATES)}))
    table = np.asarray(log_density(jnp.asarray(STATES))).reshape(3, 3, 3)
    for row, state in enumerate(STATES):
        for site in range(3):  # the others as they are
            at = tuple(slice(None) if i == site else k for i, k in enumerate(state))
            found = logits[row, site] - logits[row, site, 0]
            np.testing.assert_allclose(found, table[at] - table[at][0], atol=1e-5)


@pytest.mark.parametrize(
    "name, reversible",
    [(name, False) for name in ENERGIES]
    + [pytest.param(name, True, marks=pytest.mark.slow) for name in ENERGIES],
)
def test_block_gibbs_has_the_stationary_law(name, reversible):
    log_density, _ = ENERGIES[name]
    counts = counts_of(ebm.BlockGibbs(model_of(log_density), reversible=reversible), 5_000, 25)
    p = np.exp(np.asarray(log_density(jnp.asarray(STATES)), float))
    assert chisquare(counts, p / p.sum() * counts.sum()).pvalue > 1e-3


@pytest.mark.parametrize("name", ["complete", pytest.param("mapped", marks=pytest.mark.slow)])
def test_exact_differences_from_a_gradient_have_the_stationary_law(name):
    log_density, _ = ENERGIES[name]
    kernel = ebm.DiscreteLangevin(model_of(log_density), differences="exact")
    counts = counts_of(kernel, 5_000, 150)
    p = np.exp(np.asarray(log_density(jnp.asarray(STATES)), float))
    assert chisquare(counts, p / p.sum() * counts.sum()).pvalue > 1e-3


@pytest.mark.slow
def test_sites_of_unequal_states_beside_a_real_one():
    """E = ½v² - v a(x, b) - f(x, b): p(x, b) ∝ exp(f + ½a²)."""
    a, f = jnp.asarray(RNG.normal(size=(3, 2))), jnp.asarray(RNG.normal(size=(3, 2)))

    def model(num_rows=1):
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", ebm.Lebesgue())
            x = numpyro.sample("x", ebm.Counting(3))
            b = numpyro.sample("b", ebm.Counting(2))
            ebm.energy("E", 0.5 * v**2 - v * a[x, b] - f[x, b])

    kernel = ebm.BlockGibbs(ebm.fixed(model, {}))
    assert [block.kind for block in kernel.plan(num_rows=5)] == ["gaussian"] + ["sequential"] * 2
    mcmc = MCMC(kernel, num_warmup=30, num_samples=1, progress_bar=False)
    mcmc.run(jax.random.key(1), num_rows=5_000)
    draws = mcmc.get_samples()
    counts = np.bincount(np.asarray(2 * draws["x"][0] + draws["b"][0]), minlength=6)
    p = np.exp(np.asarray(f + 0.5 * a**2, float)).ravel()
    assert chisquare(counts, p / p.sum() * counts.sum()).pvalue > 1e-3
