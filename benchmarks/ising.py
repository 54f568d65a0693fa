# SPDX-License-Identifier: Apache-2.0
"""Recover the couplings of a 4 x 4 Ising model on a torus, by every objective for discrete data.

32 couplings drawn from N(0, 0.5²), 2,000 exact draws (all 2^16 states are weighed), and for each
objective the root mean square error of what it finds, beside that of exact maximum likelihood.

    python benchmarks/ising.py --num-data-sets 3
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax

import numpyro_ebm as ebm

SITES = np.arange(16).reshape(4, 4)
EDGES = np.concatenate(
    [
        np.stack([SITES.ravel(), np.roll(SITES, -1, axis).ravel()], -1)  # the torus
        for axis in (0, 1)
    ]
)


def ising(data=None):
    J = numpyro.param("J", jnp.zeros(len(EDGES)))
    with numpyro.plate("data", 1 if data is None else len(data)):
        x = numpyro.sample("x", ebm.Counting(event_shape=(16,)), obs=data)
        spins = 2.0 * x - 1.0
        ebm.energy("E", -(spins[:, EDGES[:, 0]] * spins[:, EDGES[:, 1]]) @ J)


def draws(couplings, num, rng):
    """Exact draws, by weighing all states."""
    states = (np.arange(2**16)[:, None] >> np.arange(16)) & 1
    spins = 2.0 * states - 1.0
    log_weights = (spins[:, EDGES[:, 0]] * spins[:, EDGES[:, 1]]) @ couplings
    weights = np.exp(log_weights - log_weights.max())
    return states[rng.choice(len(states), size=num, p=weights / weights.sum())]


OBJECTIVES = {
    "maximum likelihood": ebm.MaximumLikelihood,
    "pseudo-likelihood": ebm.PseudoLikelihood,
    "ratio matching": ebm.RatioMatching,
    "energy discrepancy": ebm.EnergyDiscrepancy,
    "CD-1": lambda: ebm.ContrastiveDivergence(ebm.BlockGibbs),
    "CD-5": lambda: ebm.ContrastiveDivergence(ebm.BlockGibbs, num_steps=5),
    "PCD-1": lambda: ebm.ContrastiveDivergence(ebm.BlockGibbs, persistent=True),
}


def main(num_data_sets, num_steps):
    errors = {name: [] for name in OBJECTIVES}
    seconds = {}
    for seed in range(num_data_sets):
        rng = np.random.default_rng(seed)
        truth = 0.5 * rng.normal(size=len(EDGES))
        data = jnp.asarray(draws(truth, 2_000, rng))
        for name, make in OBJECTIVES.items():
            schedule = optax.cosine_decay_schedule(0.05, num_steps)
            svi = ebm.EnergySVI(ising, None, optax.adam(schedule), make())
            start = time.perf_counter()
            fit = svi.run(jax.random.key(seed), num_steps, data, progress_bar=False)
            seconds[name] = time.perf_counter() - start
            errors[name].append(float(np.sqrt(np.mean((fit.params["J"] - truth) ** 2))))
            print(f"{name}, data set {seed}: {errors[name][-1]:.4f}", flush=True)
    best = np.mean(errors["maximum likelihood"])
    print(f"\n{num_steps} steps on all 2,000 rows, {num_data_sets} data sets")
    for name, found in errors.items():
        print(
            f"{name:<20} RMSE {np.mean(found):.4f} ({np.mean(found) / best:.2f} of maximum "
            f"likelihood's), {seconds[name]:.0f} s with compilation"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-data-sets", type=int, default=3)
    parser.add_argument("--num-steps", type=int, default=300)
    arguments = parser.parse_args()
    main(arguments.num_data_sets, arguments.num_steps)
