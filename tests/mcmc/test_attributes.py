# SPDX-License-Identifier: Apache-2.0
"""What kernels say of themselves is true."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from registry.kernels import KERNELS, nothing

import numpyro_ebm as ebm

NUM_ROWS = 40_000


def real(num_rows=1):
    with numpyro.plate("data", num_rows):
        x = numpyro.sample("x", ebm.Lebesgue((2,)))
        ebm.energy("E", x[:, 0] + jnp.exp(-x[:, 0]) + 0.5 * (x[:, 1] - x[:, 0]) ** 2)


def discrete(num_rows=1):
    with numpyro.plate("data", num_rows):
        x = numpyro.sample("x", ebm.Counting(3, (3,)))
        ebm.energy("E", 0.4 * x[:, 0] - 0.5 * jnp.sum(x[:, 1:] * x[:, :-1], -1))


def clusters(num_rows=1):
    """The same with pairs for which clusters can be drawn."""
    with numpyro.plate("data", num_rows):
        x = numpyro.sample("x", ebm.Counting(3, (3,)))
        ebm.energy("E", 0.4 * x[:, 0] - 0.5 * jnp.sum(x[:, 1:] == x[:, :-1], -1))


def draws(model, rng):
    """Exact draws: a Gumbel variable and a normal one around it, or states by their weights."""
    if model is real:
        first = rng.gumbel(size=NUM_ROWS)
        return np.stack([first, first + rng.normal(size=NUM_ROWS)], -1)
    states = np.indices((3, 3, 3)).reshape(3, -1).T
    pairs = states[:, 1:], states[:, :-1]
    pairs = np.multiply(*pairs) if model is discrete else np.equal(*pairs)
    weights = np.exp(-0.4 * states[:, 0] + 0.5 * np.sum(pairs, -1))
    return states[rng.choice(len(states), NUM_ROWS, p=weights / weights.sum())]


def asymmetry(make, model):
    """z-scores of E[f(x) g(y) - g(x) f(y)] for a step from x to y: zero in detailed balance."""
    x = draws(model, np.random.default_rng(0))
    kernel, start = make(ebm.fixed(model, {})), jnp.asarray(x, float if model is real else int)
    kwargs = {"num_rows": NUM_ROWS}
    state = kernel.init(jax.random.key(0), 0, {"x": start}, (), kwargs)
    y = np.asarray(jax.jit(lambda s: kernel.sample(s, (), kwargs))(state).z["x"])
    assert 0.05 < np.mean(np.any(x != y, -1)), "it moves"
    scores = []
    for f, g in ((0, 1), (1, -1), (0, -1)):
        for power in (1, 2):
            terms = x[:, f] * y[:, g] ** power - x[:, g] ** power * y[:, f]
            scores.append(terms.mean() / (terms.std() / NUM_ROWS**0.5 + 1e-30))
    return np.abs(scores)


REVERSIBLE = {
    name: kernel.make if name == "SwendsenWang" else partial(kernel.make, step_size=0.7)
    for name, kernel in KERNELS.items()
    if kernel.make(nothing).is_reversible
}
REVERSIBLE["BlockGibbs there and back"] = partial(ebm.BlockGibbs, reversible=True)


def model_of(make):
    kernel = make(nothing)
    if isinstance(kernel, ebm.SwendsenWang):
        return clusters
    return discrete if kernel.moves_discrete else real


@pytest.mark.parametrize("name", REVERSIBLE)
def test_reversible_kernels_are_in_detailed_balance(name):
    make = REVERSIBLE[name]
    assert asymmetry(make, model_of(make)).max() < 4


def test_a_sweep_in_one_order_is_not_in_detailed_balance():
    assert asymmetry(ebm.BlockGibbs, discrete).max() > 6


@pytest.mark.parametrize("name", KERNELS)
def test_only_kernels_that_need_a_warm_up_refuse_to_start_without(name):
    make = KERNELS[name].make
    kernel = make(ebm.fixed(model_of(make), {}))
    args = (jax.random.key(0), 0, None, (), {})
    if kernel.needs_warmup:
        with pytest.raises(ebm.ModelError, match="pass a `step_size`"):
            kernel.init(*args)
    else:
        kernel.init(*args)
