# SPDX-License-Identifier: Apache-2.0
"""What a GRBM with four hidden units reaches on the checkerboard, with and without estimates.

Exact test log-likelihood (nats per point, by enumeration) after the same number of steps of the
same optimiser, for maximum likelihood with the exact log Z, denoising score matching with the exact
score, and VaGES-DSM. The example and the manual quote these figures.

    python benchmarks/checkerboard_optima.py --num-steps 100000 --num-seeds 3
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import numpyro_ebm as ebm
from numpyro_ebm.models import grbm, grbm_guide, grbm_log_likelihood

ADAM = optax.adam(1e-3, b1=0.9, b2=0.95)
BATCH_SIZE = 100


def maximum_likelihood(rng_key, num_steps, data):
    """Adam on the exact negative log-likelihood of minibatches, log Z by enumeration."""
    svi = ebm.EnergySVI(grbm, None, ADAM, ebm.DenoisingScoreMatching(0.05))
    state = svi.init(rng_key, data)  # the same initial values as the others
    unconstrained = svi.optim.get_params(state.optim_state)

    def loss(unconstrained, batch):
        params = {**unconstrained, "scale": jnp.exp(unconstrained["scale"])}
        return -jnp.mean(grbm_log_likelihood(params, batch))

    def step(carry, key):
        unconstrained, opt_state = carry
        batch = data[jax.random.randint(key, (BATCH_SIZE,), 0, len(data))]
        updates, opt_state = ADAM.update(jax.grad(loss)(unconstrained, batch), opt_state)
        return (optax.apply_updates(unconstrained, updates), opt_state), None

    keys = jax.random.split(rng_key, num_steps)
    (unconstrained, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))(
        (unconstrained, ADAM.init(unconstrained))
    )
    return {**unconstrained, "scale": jnp.exp(unconstrained["scale"])}


def exact_denoising(rng_key, num_steps, data):
    svi = ebm.EnergySVI(grbm, None, ADAM, ebm.DenoisingScoreMatching(0.05))
    return svi.run(rng_key, num_steps, data, batch_size=BATCH_SIZE, progress_bar=False).params


def vages_denoising(rng_key, num_steps, data):
    objective = ebm.DenoisingScoreMatching(0.05, marginal=ebm.VaGES(num_particles=2))
    svi = ebm.EnergySVI(grbm, grbm_guide, ADAM, objective, guide_optim=ADAM, num_guide_steps=5)
    return svi.run(rng_key, num_steps, data, batch_size=BATCH_SIZE, progress_bar=False).params


METHODS = {
    "maximum likelihood": maximum_likelihood,
    "denoising score matching, exact score": exact_denoising,
    "VaGES-DSM, L = 2, K = 5": vages_denoising,
}


def main(num_steps, num_seeds):
    print(f"{num_steps:,} steps, {num_seeds} seeds; seconds include compilation")
    for name, learn in METHODS.items():
        values, seconds = [], []
        for seed in range(num_seeds):
            train = ebm.datasets.checkerboard(jax.random.key(100 + seed), 50_000)
            test = ebm.datasets.checkerboard(jax.random.key(200 + seed), 10_000)
            start = time.perf_counter()
            params = learn(jax.random.key(seed), num_steps, train)
            values.append(float(jnp.mean(grbm_log_likelihood(params, test))))
            seconds.append(time.perf_counter() - start)
        each = ", ".join(f"{v:.4f}" for v in values)
        print(
            f"{name:<40}{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}  ({each})"
            f"  {np.mean(seconds):.0f} s a run",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=100_000)
    parser.add_argument("--num-seeds", type=int, default=3)
    arguments = parser.parse_args()
    main(arguments.num_steps, arguments.num_seeds)
