# SPDX-License-Identifier: Apache-2.0
"""Sweeps and clusters on Ising lattices at their critical point: how long they remember.

Periodic lattices, 20 rows, one chain each: the autocorrelation time 1 + 2 Σ ρ of the absolute
magnetisation in steps, and effective draws in a second of processor time, compilation apart.

    python benchmarks/clusters.py --sizes 16 32 --num-samples 4000
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.infer import MCMC

import numpyro_ebm as ebm

CRITICAL = 0.5 * np.log(1 + 2**0.5)
KERNELS = {"BlockGibbs": ebm.BlockGibbs, "SwendsenWang": ebm.SwendsenWang}
NUM_ROWS = 20


def ising(size):
    with numpyro.plate("data", NUM_ROWS):
        x = numpyro.sample("x", ebm.Counting(2, (size, size)))
        s = 2.0 * x - 1.0
        pairs = s * (jnp.roll(s, 1, -1) + jnp.roll(s, 1, -2))
        ebm.energy("E", -CRITICAL * jnp.sum(pairs, (-1, -2)))


def run(kernel, size, num_samples):
    """Magnetisation of every draw and row, and the processor time of the run."""
    mcmc = MCMC(
        kernel(ebm.fixed(ising, {})),
        num_warmup=num_samples // 4,
        num_samples=num_samples,
        progress_bar=False,
    )
    mcmc.warmup(jax.random.key(0), size)
    mcmc.run(jax.random.key(1), size)  # compiles
    began = time.process_time()
    mcmc.run(jax.random.key(2), size)
    draws = jax.block_until_ready(mcmc.get_samples()["x"])
    spent = time.process_time() - began
    return np.abs(np.asarray(2 * draws.sum((-1, -2)) - size**2, float)), spent


def autocorrelation_time(draws):
    """1 + 2 Σ ρ over lags up to five times itself (Sokal), of draws (steps, rows) with one law."""
    centred = draws - draws.mean()
    lags = len(draws) // 2
    covariance = [np.mean(centred[: len(draws) - t] * centred[t:]) for t in range(lags)]
    times = 2 * np.cumsum(covariance) / covariance[0] - 1
    return times[np.argmax(np.arange(lags) >= 5 * times)]


def main(sizes, num_samples):
    print("| lattice | kernel | autocorrelation time, steps | effective draws a second |")
    print("|---|---|---|---|")
    for size in sizes:
        for name, kernel in KERNELS.items():
            magnetisation, spent = run(kernel, size, num_samples)
            steps = autocorrelation_time(magnetisation)
            effective = magnetisation.size / steps / spent
            print(f"| {size} × {size} | {name} | {steps:.1f} | {effective:,.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--num-samples", type=int, default=4_000)
    main(**vars(parser.parse_args()))
