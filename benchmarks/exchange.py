# SPDX-License-Identifier: Apache-2.0
"""Effective draws a second of `Exchange`: the temperature of a 10 x 10 Ising lattice.

    taskset -c 0 python benchmarks/exchange.py --num-samples 1000

One lattice near its critical temperature, an unknown β ~ Uniform(0, 1), a random walk, auxiliary
chains of 100 sweeps of block Gibbs. Chains run beside each other (``chain_method="vectorized"``);
compilation and warm-up are timed apart from the draws. The clock is processor time, so that other
work on the machine does not show; run it on one core.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC

import numpyro_ebm as ebm

SIZE = 10
CRITICAL = 0.4406868


def ising(data):
    beta = numpyro.sample("beta", dist.Uniform(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        x = numpyro.sample("x", ebm.Counting(2, (SIZE, SIZE)), obs=data)
        s = 2.0 * x - 1.0
        bonds = s * (jnp.roll(s, 1, -1) + jnp.roll(s, 1, -2))
        ebm.energy("E", -beta * jnp.sum(bonds, (-1, -2)))


def lattice(num_sweeps=500, seed=9):
    """A state near the critical temperature, from Gibbs sweeps in NumPy."""
    rng = np.random.default_rng(seed)
    s = np.ones((SIZE, SIZE))
    even = np.indices(s.shape).sum(0) % 2 == 0
    for _ in range(num_sweeps):
        for color in (even, ~even):
            field = sum(np.roll(s, step, axis) for step in (1, -1) for axis in (0, 1))
            up = rng.random(s.shape) < 1 / (1 + np.exp(-2 * CRITICAL * field))
            s = np.where(color, np.where(up, 1, -1), s)
    return jnp.asarray((s[None] + 1) / 2).astype(int)


def main(num_samples, num_warmup, num_auxiliary_steps, chains):
    data = lattice()
    print(
        f"{'chains':>6} {'compile + warm-up':>18} {'draws':>8} {'ESS':>7} {'ESS/s':>7} "
        f"{'β':>14} {'accept':>7} {'R-hat':>6} adequate"
    )
    for num_chains in chains:
        kernel = ebm.Exchange(ising, ebm.BlockGibbs, num_auxiliary_steps)
        mcmc = MCMC(
            kernel,
            num_warmup=num_warmup,
            num_samples=num_samples,
            num_chains=num_chains,
            chain_method="vectorized",
            progress_bar=False,
        )
        start = time.process_time()
        mcmc.warmup(jax.random.key(0), data)
        mcmc.run(jax.random.key(1), data)  # compiles the loop of the draws
        jax.block_until_ready(mcmc.get_samples())
        warm = time.process_time()
        mcmc.post_warmup_state = mcmc.last_state
        mcmc.run(jax.random.key(2), data)
        jax.block_until_ready(mcmc.get_samples())
        end = time.process_time()
        draws = np.asarray(mcmc.get_samples(group_by_chain=True)["beta"], float)
        ess = float(effective_sample_size(draws))
        accept = float(mcmc.get_extra_fields()["accept_prob"].mean())
        r_hat = numpyro.diagnostics.split_gelman_rubin(draws)
        verdict = ebm.auxiliary_adequacy(mcmc)
        print(
            f"{num_chains:>6} {warm - start:>16.1f} s {end - warm:>6.1f} s {ess:>7.0f} "
            f"{ess / (end - warm):>7.1f} {draws.mean():>7.3f} ± {draws.std():.3f} {accept:>7.2f} "
            f"{r_hat:>6.3f} {verdict.is_adequate} ({verdict.sds:.3f} sd)",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=1_000)
    parser.add_argument("--num-warmup", type=int, default=300)
    parser.add_argument("--num-auxiliary-steps", type=int, default=100)
    parser.add_argument("--chains", type=int, nargs="+", default=[1, 4, 16, 64])
    options = parser.parse_args()
    main(options.num_samples, options.num_warmup, options.num_auxiliary_steps, options.chains)
