# SPDX-License-Identifier: Apache-2.0
"""Networks with convolutions on a CPU: in a step, in a loop, and in the library's loops.

A convolutional energy of 8 x 8 images, 128 rows a batch, by denoising score matching and by
contrastive divergence with ten steps. Written by hand as a step that is compiled for itself and as
one `lax.scan`, and by `EnergySVI.run` with and without the axes of its convolutions put in order.
The ways take turns in one process, and the least milliseconds a step of the wall and of the
processor are printed: on a busy machine the latter are to be believed.

    python benchmarks/convolutions.py [--steps 20] [--repeats 5]
"""

import argparse
import time
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpyro
import optax
from jax import lax

import numpyro_ebm as ebm
from numpyro_ebm.program import on_cpu

SIDE, BATCH, SIGMA, CHAIN_STEPS, STEP_SIZE = 8, 128, 0.2, 10, 1e-3
OPTIM = optax.adam(1e-3)


def initial(key):
    shapes = {"a": (3, 3, 1, 8), "b": (3, 3, 8, 16), "c": (3, 3, 16, 16), "d": (64,)}
    keys = jax.random.split(key, len(shapes))
    return {k: 0.2 * jax.random.normal(x, shapes[k]) for k, x in zip(shapes, keys, strict=True)}


def energy(params, v):
    y = v.reshape(-1, SIDE, SIDE, 1)
    for name, stride in (("a", 1), ("b", 2), ("c", 2)):
        numbers = ("NHWC", "HWIO", "NHWC")
        strides = (stride, stride)
        y = lax.conv_general_dilated(y, params[name], strides, "SAME", dimension_numbers=numbers)
        y = jax.nn.silu(y)
    return y.reshape(len(y), -1) @ params["d"] + 0.5 * jnp.sum((v - 0.3) ** 2, -1)


def model(data, start):
    params = {name: numpyro.param(name, x) for name, x in start.items()}
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((SIDE**2,)), obs=data)
        ebm.energy("E", energy(params, v))


def score(params, v):
    return -jax.grad(lambda v: energy(params, v).sum())(v)


def denoising(params, key, v):
    noise = jax.random.normal(key, v.shape)
    return 0.5 * jnp.sum((score(params, v + SIGMA * noise) + noise / SIGMA) ** 2, -1).mean()


def divergence(params, key, v):
    def move(x, key):
        noise = jax.random.normal(key, x.shape)
        step = STEP_SIZE * score(lax.stop_gradient(params), x)
        return x + step + (2 * STEP_SIZE) ** 0.5 * noise, None

    x, _ = lax.scan(move, v, jax.random.split(key, CHAIN_STEPS))
    return energy(params, v).mean() - energy(params, lax.stop_gradient(x)).mean()


OBJECTIVES = {
    "denoising": (denoising, ebm.DenoisingScoreMatching(SIGMA, variance_reduction=False)),
    "CD-10": (
        divergence,
        ebm.ContrastiveDivergence(partial(ebm.ULA, step_size=STEP_SIZE), CHAIN_STEPS),
    ),
}


def by_hand(loss, data, start, num_steps):
    """Functions that take so many steps: each compiled for itself, and in one loop."""

    def step(carry, i):
        params, optim_state = carry
        key = jax.random.fold_in(jax.random.key(0), i)
        batch = data[jax.random.randint(key, (BATCH,), 0, len(data))]
        value, gradient = jax.value_and_grad(loss)(params, key, batch)
        updates, optim_state = OPTIM.update(gradient, optim_state)
        return (optax.apply_updates(params, updates), optim_state), value

    jitted, loop = jax.jit(step), jax.jit(lambda x: lax.scan(step, x, jnp.arange(num_steps)))
    first = start, OPTIM.init(start)

    def steps():
        carry = first
        for i in range(num_steps):
            carry, _ = jitted(carry, i)
        return carry

    return {"by hand, step by step": steps, "by hand, one loop": lambda: loop(first)[0]}


def by_library(objective, data, start, num_steps):
    """A function that takes so many steps of a run."""
    svi = ebm.EnergySVI(partial(model, start=start), None, OPTIM, objective)
    run = partial(svi.run, batch_size=BATCH, progress_bar=False)
    state = run(jax.random.key(1), 1, data).state
    return lambda: run(jax.random.key(1), num_steps, data, init_state=state).params


def main(num_steps, repeats):
    key_data, key_start = jax.random.split(jax.random.key(2))
    data, start = jax.random.uniform(key_data, (1_024, SIDE**2)), initial(key_start)
    for name, (loss, objective) in OBJECTIVES.items():
        ways = by_hand(loss, data, start, num_steps)
        with mock.patch.object(on_cpu, "is_slow", lambda eqn: False):
            ways["library, as written"] = by_library(objective, data, start, num_steps)
            ways["library, as written"]()  # compiled while it is so
        ways["library"] = by_library(objective, data, start, num_steps)
        best = {}
        for turn in range(repeats + 1):
            for way, take in ways.items():
                began = time.perf_counter(), time.process_time()
                jax.block_until_ready(take())
                ended = time.perf_counter(), time.process_time()
                took = [1e3 * (b - a) / num_steps for a, b in zip(began, ended, strict=True)]
                if turn:
                    best[way] = list(map(min, best.get(way, took), took))
        for way, (wall, processor) in best.items():
            print(f"{name:10} {way:22} {wall:7.1f} ms a step, {processor:7.1f} of the processor")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    main(arguments.steps, arguments.repeats)
