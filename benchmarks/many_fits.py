# SPDX-License-Identifier: Apache-2.0
"""Many fits at once by `jax.vmap`, beside the same ones one after the other.

    taskset -c 0 python benchmarks/many_fits.py

A Gaussian of three coordinates and an RBM (its hidden units summed out) by denoising score
matching, for several seeds and noise scales, 500 rounds on 256 rows each. Both ways are compiled
once, which is not counted; the median of three, in turn.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax

import numpyro_ebm as ebm

NUM_STEPS, NUM_ROWS = 500, 256


def gaussian(data):
    mean = numpyro.param("mean", jnp.zeros(3))
    precision = numpyro.param("precision", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(3,)), obs=data)
        ebm.energy("E", 0.5 * precision * jnp.sum((v - mean) ** 2, -1))


def rbm(data):
    W = numpyro.param("W", lambda key: 0.1 * jax.random.normal(key, (20, 10)))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(20,)), obs=data)
        ebm.energy("E", 0.5 * jnp.sum(v**2, -1) - jnp.sum(jax.nn.softplus(v @ W), -1))


def compare(name, model, num_visible, number, rounds):
    rows = jax.random.normal(jax.random.key(0), (NUM_ROWS, num_visible))

    def fit(rng_key, noise_scale):
        objective = ebm.DenoisingScoreMatching(noise_scale)
        svi = ebm.EnergySVI(model, None, optax.adam(0.01), objective)
        state = svi.init(rng_key, rows)
        return jax.lax.scan(lambda s, _: svi.update(s, rows), state, length=NUM_STEPS)[1]

    keys = jax.random.split(jax.random.key(1), number)
    scales = jnp.linspace(0.1, 0.5, number)
    alone, at_once = jax.jit(fit), jax.jit(jax.vmap(fit))
    ways = {
        "one after the other": lambda: [alone(*x) for x in zip(keys, scales, strict=True)],
        "at once": lambda: at_once(keys, scales),
    }
    seconds = {way: [] for way in ways}
    for i in range(rounds + 1):
        for way, call in ways.items():
            start = time.process_time()
            jax.block_until_ready(call())
            if i:
                seconds[way].append(time.process_time() - start)
    first, second = (statistics.median(x) for x in seconds.values())
    print(
        f"{name:9} {number:4} fits  {first:8.2f} s  at once {second:8.2f} s  {first / second:5.1f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--number", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    for number in chosen.number:
        compare("gaussian", gaussian, 3, number, chosen.rounds)
        compare("rbm", rbm, 20, number, chosen.rounds)
