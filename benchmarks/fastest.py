# SPDX-License-Identifier: Apache-2.0
"""The fewest steps and seconds to an exact test log-likelihood of 0.32 on the checkerboard.

Exact score matching (nothing estimated: 4 hidden units are summed out), batches of 1,000 and Adam
with a learning rate a hundred times the paper's, falling by a cosine.

    python benchmarks/fastest.py --seeds 0 1 2 3 4
"""

import argparse
import time

import jax
import jax.numpy as jnp
import optax

import numpyro_ebm as ebm
from numpyro_ebm.models import grbm, grbm_log_likelihood


def learn(seed, num_steps, learning_rate, batch_size, look=10):
    train = ebm.datasets.checkerboard(jax.random.key(100 + seed), 50_000)
    test = ebm.datasets.checkerboard(jax.random.key(200 + seed), 10_000)
    adam = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps), b1=0.9, b2=0.95)
    svi = ebm.EnergySVI(grbm, None, adam, ebm.ScoreMatching())
    evaluate = jax.jit(lambda params: jnp.mean(grbm_log_likelihood(params, test)))
    start = time.perf_counter()
    options = {"batch_size": batch_size, "progress_bar": False}
    fit = svi.run(jax.random.key(seed), look, train, **options)
    compiled = time.perf_counter()
    values = [float(evaluate(fit.params))]
    for _ in range(num_steps // look - 1):
        fit = svi.run(jax.random.key(seed), look, train, init_state=fit.state, **options)
        values.append(float(evaluate(fit.params)))
    first = next((look * (i + 1) for i, x in enumerate(values) if x >= 0.32), None)
    begin = time.perf_counter()
    whole = svi.run(jax.random.key(seed), num_steps, train, **options)
    jax.block_until_ready(whole.losses)
    seconds = time.perf_counter() - begin
    print(
        f"seed {seed}: 0.32 after {first} steps; after all {num_steps}: {values[-1]:.4f}, "
        f"{seconds:.2f} s warm, {compiled - start:.1f} s to compile and begin",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--num-steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=1_000)
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        learn(seed, arguments.num_steps, arguments.learning_rate, arguments.batch_size)
