# SPDX-License-Identifier: Apache-2.0
"""Lattices with temperatures of their own, drawn from a common law: a hierarchical Ising model.

Exchange moves every lattice's temperature, each on its own; NUTS the mean and the spread that they
share, as another block of NumPyro's `Gibbs`. Lattices lend each other strength.

    python examples/many_lattices.py --num-samples 2000 --out many_lattices.png
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS, Gibbs

import numpyro_ebm as ebm

SIZE = 8


def lattices(data):
    mu = numpyro.sample("mu", dist.Normal(0.25, 0.15))
    tau = numpyro.sample("tau", dist.HalfNormal(0.1))
    with numpyro.plate("lattices", len(data)):
        beta = numpyro.sample("beta", dist.Normal(mu, tau))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Counting(2, event_shape=(SIZE, SIZE)), obs=data)
        ebm.energy("E", -beta * _bonds(v))


def one_lattice(data=None, *, beta=None, num_rows=1):
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Counting(2, event_shape=(SIZE, SIZE)), obs=data)
        ebm.energy("E", -beta * _bonds(v))


def _bonds(v):
    s = 2.0 * v - 1.0
    return jnp.sum(s * jnp.roll(s, 1, -1) + s * jnp.roll(s, 1, -2), (-1, -2))


def main(num_samples=2_000, num_lattices=12, seed=0, out="many_lattices.png"):
    key_beta, key_data, key_run = jax.random.split(jax.random.key(seed), 3)
    truth = 0.28 + 0.05 * jax.random.normal(key_beta, (num_lattices,))
    data = ebm.sample(key_data, ebm.fixed(one_lattice, {}), 1, beta=truth, num_rows=num_lattices)[
        "v"
    ][0]

    model = ebm.given(lattices, ["beta"])
    exchange = ebm.Exchange(model, ebm.BlockGibbs, 50, by_row=True)
    kernel = Gibbs([(exchange, ["beta"]), (NUTS(model), ["mu", "tau"])])
    mcmc = MCMC(kernel, num_warmup=num_samples // 2, num_samples=num_samples, progress_bar=False)
    mcmc.run(key_run, data)
    draws = {name: np.asarray(x) for name, x in mcmc.get_samples().items()}
    for name in ("mu", "tau"):
        print(f"{name:4} {draws[name].mean():.3f} ± {draws[name].std():.3f}")

    order = np.argsort(np.asarray(truth))
    low, mid, high = np.quantile(draws["beta"], [0.05, 0.5, 0.95], axis=0)[:, order]
    inside = (low < np.asarray(truth)[order]) & (np.asarray(truth)[order] < high)
    print(f"90% intervals that hold the truth: {inside.sum()} of {num_lattices}")
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    at = np.arange(num_lattices)
    ax.errorbar(at, mid, yerr=[mid - low, high - mid], fmt="o", label="90% of the posterior")
    ax.plot(at, np.asarray(truth)[order], "k_", ms=12, label="truth")
    ax.axhspan(*np.quantile(draws["mu"], [0.05, 0.95]), alpha=0.2, label="their mean, 90%")
    ax.set(xlabel="lattice", ylabel="inverse temperature", title=f"{SIZE} x {SIZE} Ising lattices")
    ax.set_ylim(top=0.5)
    ax.legend(fontsize=8, loc="upper left")
    fig.savefig(out, dpi=150)
    plt.close(fig)
    return np.asarray(truth), draws


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-samples", type=int, default=2_000)
    parser.add_argument("--num-lattices", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="many_lattices.png")
    main(**vars(parser.parse_args()))
