# SPDX-License-Identifier: Apache-2.0
"""Networks on 8 x 8 images: steps and first calls of `EnergySVI.run` beside hand-written loops.

Denoising score matching and persistent contrastive divergence (ten Langevin steps) of a perceptron,
and VaGES with multiscale denoising of a deep latent variable model, 128 rows a batch, Adam. A loop
is one `lax.scan` over a chunk of steps, its losses differentiated by JAX; it is compiled at XLA's
default level and at level 1, the library's. All take turns in one process, processor seconds. First
of all both have to have the same loss, gradient and chains, where their noise is alike.

    taskset -c 0 python benchmarks/networks.py
"""

import argparse
import os
import time
from functools import partial
from unittest import mock

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import lax

import numpyro_ebm as ebm

NUM_VISIBLE, NUM_HIDDEN, WIDTH, BATCH, CHUNK = 64, 8, 128, 128, 400
SIGMA, LEVELS, STEP_SIZE, CHAIN_STEPS, GUIDE_STEPS = 0.2, (0.05, 1.2), 1e-3, 10, 2
OPTIM = optax.adam(1e-3)


def mlp(key, *sizes):
    keys = jax.random.split(key, len(sizes))
    pairs = enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    weights = {f"W{i}": jax.random.normal(keys[i], (m, n)) / m**0.5 for i, (m, n) in pairs}
    return weights | {f"b{i}": jnp.zeros(n) for i, n in enumerate(sizes[1:])}


def apply(p, x):
    last = len(p) // 2 - 1
    for i in range(last):
        x = jax.nn.silu(x @ p[f"W{i}"] + p[f"b{i}"])
    return x @ p[f"W{last}"] + p[f"b{last}"]


def energy(p, v):
    return apply(p["net"], v)[..., 0] + 0.5 * jnp.sum((v - 0.3) ** 2, -1)


def latent_energy(p, v, h):
    """-log p̃(v, h): standard normals times the deep energy g3(g1(v), h + g2(g1(v)))."""
    g = apply(p["g1"], v)
    h = jnp.asarray(h)
    shifted = h + apply(p["g2"], g)
    g = jnp.broadcast_to(g, (*shifted.shape[:-1], g.shape[-1]))
    return apply(p["g3"], jnp.concatenate([g, shifted], -1))[..., 0]


def named(values):
    return {k: {n: numpyro.param(f"{k}.{n}", x) for n, x in v.items()} for k, v in values.items()}


def model(data, start):
    p = named(start)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((NUM_VISIBLE,)), obs=data)
        ebm.energy("E", energy(p, v))


def latent_model(data, start):
    p = named(start)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", dist.Normal(0, 1).expand([NUM_VISIBLE]).to_event(1), obs=data)
        h = numpyro.sample("h", dist.Normal(0, 1).expand([NUM_HIDDEN]).to_event(1))
        ebm.energy("E", latent_energy(p, v, h))


def guide(data, start):
    p = named(start)
    with numpyro.plate("data", len(data)):
        mean, log_scale = jnp.split(apply(p["q"], ebm.visible("v", data)), 2, -1)
        numpyro.sample("h", dist.Normal(mean, jnp.exp(log_scale)).to_event(1))


# The same by hand: functions (parameters, of the guide, key, rows, chains) -> (loss, chains)


def denoising(p, _, key, v, chains):
    noise = jax.random.normal(key, v.shape)
    score = -jax.grad(lambda v: energy(p, v).sum())(v + SIGMA * noise)
    return 0.5 * jnp.sum((score + noise / SIGMA) ** 2, -1).mean(), chains


def persistent(p, _, key, v, chains):
    def move(x, key):
        force = -jax.grad(lambda x: energy(lax.stop_gradient(p), x).sum())(x)
        noise = jax.random.normal(key, x.shape)
        return x + STEP_SIZE * force + (2 * STEP_SIZE) ** 0.5 * noise, None

    chains, _ = lax.scan(move, chains, jax.random.split(key, CHAIN_STEPS))
    chains = lax.stop_gradient(chains)
    return energy(p, v).mean() - energy(p, chains).mean(), chains


def log_joint(p, v, h):
    return -latent_energy(p, v, h) - 0.5 * jnp.sum(v**2, -1) - 0.5 * jnp.sum(h**2, -1)


def draw_hidden(q, v, noise):
    mean, log_scale = jnp.split(apply(q["q"], v), 2, -1)
    return mean + jnp.exp(log_scale) * noise, log_scale


def noised(key, v):
    key_order, key_within, key_noise = jax.random.split(key, 3)
    strata = jax.random.permutation(key_order, len(v))
    fraction = (strata + jax.random.uniform(key_within, (len(v),))) / len(v)
    level = LEVELS[0] + (LEVELS[1] - LEVELS[0]) * fraction
    noise = jax.random.normal(key_noise, v.shape)
    return level[:, None], noise, v + level[:, None] * noise


def guide_loss(q, p, level, v, noise):
    h, log_scale = draw_hidden(q, v, noise)
    log_q = -jnp.sum(log_scale, -1) - 0.5 * jnp.sum(noise**2, -1)
    return jnp.mean((log_q - log_joint(p, v, h)) / level[:, 0])


def vages(p, q, key, level, noise, v):
    particles = jax.random.normal(key, (4, len(v), NUM_HIDDEN))
    first, second = jnp.split(lax.stop_gradient(draw_hidden(q, v, particles)[0]), 2)
    fixed = lax.stop_gradient(p)
    score = jax.grad(lambda v: jnp.sum(log_joint(fixed, v, first)) / 2)(v)

    def surrogate(v):
        values = log_joint(p, v, second)
        delta = values - lax.stop_gradient(values)
        return jnp.mean(delta, 0) + 0.5 * jnp.var(delta, 0, ddof=1)

    offset = noise / 0.1**2
    z = score / level + offset
    along = jax.jvp(surrogate, (v,), (z / level,))[1] + jnp.sum(z * offset, -1)
    return jnp.mean(along - 0.5 * lax.stop_gradient(along))


class Loop:
    """One `lax.scan` over a chunk of steps; ``loss`` is `None` for VaGES, which has a guide."""

    def __init__(self, loss, data, start, start_guide, level):
        self.loss, self.data = loss, data
        chains = data[:BATCH]
        self.state = start, OPTIM.init(start), start_guide, OPTIM.init(start_guide), chains, 0
        options = {} if level is None else {"xla_backend_optimization_level": level}
        self.chunk = jax.jit(
            lambda state: lax.scan(self.step, state, None, CHUNK), compiler_options=options
        )

    def step(self, state, _):
        p, optim, q, optim_q, chains, i = state
        key = jax.random.fold_in(jax.random.key(0), i)
        key_rows, key_noise, key_guide, key = jax.random.split(key, 4)
        v = self.data[jax.random.randint(key_rows, (BATCH,), 0, len(self.data))]
        if self.loss is None:
            seen = noised(key_noise, v)
            for draw in jax.random.normal(key_guide, (GUIDE_STEPS, BATCH, NUM_HIDDEN)):
                update, optim_q = OPTIM.update(
                    jax.grad(guide_loss)(q, p, seen[0], seen[2], draw), optim_q
                )
                q = optax.apply_updates(q, update)
            value, gradient = jax.value_and_grad(vages)(p, q, key, *seen)
        else:
            loss = jax.value_and_grad(self.loss, has_aux=True)
            (value, chains), gradient = loss(p, q, key, v, chains)
        update, optim = OPTIM.update(gradient, optim)
        return (optax.apply_updates(p, update), optim, q, optim_q, chains, i + 1), value

    def take(self):
        self.state, losses = self.chunk(self.state)
        return losses


class Library:
    def __init__(self, make, data, objective):
        self.data, self.state = data, None
        of_guide = {} if make[1] is None else {"num_guide_steps": GUIDE_STEPS}
        self.svi = ebm.EnergySVI(*make, OPTIM, objective, **of_guide)

    def take(self):
        fit = self.svi.run(
            jax.random.key(0),
            CHUNK,
            self.data,
            batch_size=BATCH,
            progress_bar=False,
            init_state=self.state,
        )
        self.state = fit.state
        return fit.losses


def flat(values):
    return {f"{k}.{n}": x for k, v in values.items() for n, x in v.items()}


def by_library(make, objective, p, q, v):
    """Loss of the first round, its gradient in the energy's parameters, and the chains."""
    key, params = jax.random.key(0), flat(p | q)
    problem = objective.prepare(key, params, *make, (v,), {})
    state = objective.init_state(key, params, problem)
    problem, state = objective.advance(key, params, problem, state)
    loss = jax.value_and_grad(lambda p: objective.energy_loss(key, params | p, problem))
    return *loss(flat(p)), v if state is None else state.position["v"]


def by_loop(loss, p, q, v):
    key = jax.random.key(0)
    if loss is None:
        return *jax.value_and_grad(vages)(p, q, key, *noised(key, v)), v
    (value, chains), gradient = jax.value_and_grad(loss, has_aux=True)(p, q, key, v, v)
    return value, gradient, chains


def check_same(make, objective, loss, p, q, v):
    """Raise unless both compute the same, where all draws of noise are the same by any key."""

    def normal(key, shape=(), dtype=float, **_):
        return jnp.broadcast_to(jnp.sin(1.0 + jnp.arange((1, *shape)[-1])), shape)

    draws = {
        "normal": normal,
        "uniform": lambda key, shape=(), *_, **__: jnp.full(shape, 0.5),
        "permutation": lambda key, n, *_, **__: jnp.arange(n),
    }
    alike = mock.patch.multiple(jax.random, **draws)
    with alike, mock.patch("blackjax.util.normal", normal):  # which it imported by name
        ours = jax.jit(partial(by_library, make, objective))(p, q, v)
        value, gradient, chains = jax.jit(partial(by_loop, loss))(p, q, v)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4),
        ours,
        (value, flat(gradient), chains),
    )


def timed(take):
    start = time.process_time()
    jax.block_until_ready(take())
    return time.process_time() - start


def main(rounds, names):
    data = jax.random.uniform(jax.random.key(1), (1_024, NUM_VISIBLE))
    keys = jax.random.split(jax.random.key(2), 5)
    net = {"net": mlp(keys[0], NUM_VISIBLE, WIDTH, WIDTH, 1)}
    deep = {
        "g1": mlp(keys[1], NUM_VISIBLE, WIDTH, WIDTH),
        "g2": mlp(keys[2], WIDTH, WIDTH, NUM_HIDDEN),
        "g3": mlp(keys[3], WIDTH + NUM_HIDDEN, WIDTH, 1),
    }
    q = {"q": mlp(keys[4], NUM_VISIBLE, WIDTH, 2 * NUM_HIDDEN)}
    plain = partial(model, start=net), None
    both = partial(latent_model, start=deep), partial(guide, start=q)
    dsm = ebm.DenoisingScoreMatching(SIGMA, variance_reduction=False)
    ula = partial(ebm.ULA, step_size=STEP_SIZE)
    pcd = ebm.ContrastiveDivergence(ula, CHAIN_STEPS, persistent=True)
    mdsm = ebm.MultiscaleDenoisingScoreMatching(
        0.1,
        ebm.VaGES(2),
        min_noise_scale=LEVELS[0],
        max_noise_scale=LEVELS[1],
        spacing="linear",
        variance_reduction=False,
    )
    cases = {
        "DSM": (plain, dsm, denoising, net, {}),
        "PCD-10": (plain, pcd, persistent, net, {}),
        "VaGES-MDSM": (both, mdsm, None, deep, q),
    }
    print(
        f"{'':12}{'steps/s: library':>17}{'loop':>8}{'ratio':>7}{'first call, s':>15}{'loops':>12}"
    )
    for name in names or cases:
        make, objective, loss, start, start_guide = cases[name]
        ways = {
            "library": Library(make, data, objective),
            "default": Loop(loss, data, start, start_guide, None),
            "level 1": Loop(loss, data, start, start_guide, 1),
        }
        first = {way: timed(x.take) for way, x in ways.items()}
        check_same(make, objective, loss, start, start_guide, data[:BATCH])  # warm from here on
        for way in ways.values():
            way.take()
        seconds = {way: [] for way in ways}
        for _ in range(rounds):
            for way, x in ways.items():
                seconds[way].append(timed(x.take))
        rate = {way: CHUNK / np.median(x) for way, x in seconds.items()}
        pairs = [min(seconds[w][i] for w in ways if w != "library") for i in range(rounds)]
        ratio = np.median(np.array(pairs) / np.array(seconds["library"]))
        print(
            f"{name:12}{rate['library']:>17.0f}{max(rate['default'], rate['level 1']):>8.0f}"
            f"{ratio:>7.2f}{first['library']:>15.1f}"
            f"{first['default']:>9.1f}{first['level 1']:>9.1f}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", help="DSM, PCD-10 or VaGES-MDSM; all by default")
    options = parser.parse_args()
    main(options.rounds, options.cases)
