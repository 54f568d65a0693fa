# SPDX-License-Identifier: Apache-2.0
"""Deep Boltzmann machines of 6, 4 and 3 units against maximum likelihood by enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.nn import logsumexp, sigmoid

import numpyro_ebm as ebm

V, G, H = (np.array(list(itertools.product([0, 1], repeat=n))) for n in (6, 4, 3))
SHAPES = {"W": (6, 4), "U": (4, 3), "b": (6,), "c": (4,), "d": (3,)}


def parameters():
    return {k: numpyro.param(k, jnp.zeros(shape)) for k, shape in SHAPES.items()}


def machine(v):
    p = parameters()
    with numpyro.plate("data", len(v)):
        v = numpyro.sample("v", ebm.Counting(event_shape=(6,)), obs=v)
        g = numpyro.sample("g", ebm.Counting(event_shape=(4,)))
        h = numpyro.sample("h", ebm.Counting(event_shape=(3,)))
        below = jnp.sum(v @ p["W"] * g, -1) + jnp.sum(g @ p["U"] * h, -1)
        ebm.energy("E", -below - v @ p["b"] - g @ p["c"] - h @ p["d"])


def mean_field(v):
    """The fixed point of the machine's own mean field: a guide without parameters of its own."""
    p = parameters()
    with numpyro.plate("data", len(v)):
        v = ebm.visible("v", v)
        h = jnp.full((len(v), 3), 0.5)
        for _ in range(10):
            g = sigmoid(v @ p["W"] + h @ p["U"].T + p["c"])
            h = sigmoid(g @ p["U"] + p["d"])
        numpyro.sample("g", dist.Bernoulli(g).to_event(1))
        numpyro.sample("h", dist.Bernoulli(h).to_event(1))


def joint_table(p):
    """log p̃ of all states, (64, 16, 8)."""
    below = (V @ p["W"]) @ G.T + (V @ p["b"])[:, None] + G @ p["c"]
    return below[:, :, None] + (G @ p["U"]) @ H.T + H @ p["d"]


def log_likelihood(p, counts):
    table = logsumexp(joint_table(p), (1, 2))
    return counts @ (table - logsumexp(table)) / counts.sum()


def draw_data(num):
    rng = np.random.default_rng(3)
    W, U = 3 * rng.normal(size=(6, 4)), 3 * rng.normal(size=(4, 3))
    p = {"W": W, "b": -W.sum(1) / 2, "c": -(W.sum(0) + U.sum(1)) / 2}
    p |= {"U": U, "d": -U.sum(0) / 2}  # as many ones as zeros, and strong couplings
    table = logsumexp(joint_table(p), (1, 2))
    index = rng.choice(64, num, p=np.exp(table - logsumexp(table)))
    return jnp.asarray(V[index]), jnp.bincount(index, length=64)


def maximise(p, counts, num_steps):
    optim = optax.adam(optax.cosine_decay_schedule(0.02, num_steps, 0.01))

    def step(carry, _):
        p, state = carry
        updates, state = optim.update(jax.grad(lambda p: -log_likelihood(p, counts))(p), state)
        return (optax.apply_updates(p, updates), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, optim.init(p)), length=num_steps)[0][0])(p)


SWEEPS = ebm.KernelRefinement(ebm.BlockGibbs, 3)
MARGINALS = {
    "summed": (None, None),
    "particles": (ebm.PersistentParticles(ebm.BlockGibbs, 4, num_steps=2), None),
    "mean field": (ebm.VaGES(4), mean_field),
    "mean field and sweeps": (ebm.VaGES(4, refine=SWEEPS), mean_field),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MARGINALS)
def test_chains_of_a_deep_machine_arrive_at_maximum_likelihood(name):
    """Independent bits lose 1.2 nats of it; two hundred chains, a hundredth."""
    data, counts = draw_data(2_000)
    rng = np.random.default_rng(1)
    start = {k: jnp.asarray(0.3 * rng.normal(size=s) * (len(s) > 1)) for k, s in SHAPES.items()}
    best = log_likelihood(maximise(start, counts, 10_000), counts)
    mean = np.mean(data, 0)
    alone = np.sum(mean * np.log(mean) + (1 - mean) * np.log(1 - mean))
    assert best > alone + 1.0
    marginal, guide = MARGINALS[name]
    objective = ebm.ContrastiveDivergence(ebm.BlockGibbs, 5, marginal, persistent=True)
    optim = optax.adam(optax.cosine_decay_schedule(0.02, 4_000, 0.01))
    svi = ebm.EnergySVI(machine, guide, optim, objective)
    fit = svi.run(
        jax.random.key(0), 4_000, data, batch_size=200, init_params=start, progress_bar=False
    )
    assert best - 0.03 < log_likelihood(fit.params, counts) <= best + 1e-3


@pytest.mark.slow
def test_the_gradient_of_a_deep_machine_is_that_of_enumeration():
    data, counts = draw_data(300)
    rng = np.random.default_rng(2)
    p = {k: jnp.asarray(rng.normal(size=s)) for k, s in SHAPES.items()}
    loss = ebm.MaximumLikelihood().loss
    found = jax.jit(jax.grad(lambda p: loss(jax.random.key(0), p, machine, None, data)))(p)
    for name, x in jax.grad(log_likelihood)(p, counts).items():
        np.testing.assert_allclose(found[name], -x, atol=2e-5)
