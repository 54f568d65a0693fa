# SPDX-License-Identifier: Apache-2.0
"""Spikes of twelve neurons: how often do many fire at once? Pairs explain it, single rates do not.

Neurons share an input that nobody records (a Gaussian, cut off at a threshold), so that the law of
the number of spikes in a bin is known. A pairwise Ising model, the maximum entropy law with the
means and pair correlations of the data, is fitted by exact maximum likelihood.

    python examples/spikes.py --num-rows 20000 --out spikes.png
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import optax
from scipy.stats import norm

import numpyro_ebm as ebm

NEURONS, SHARED = 12, 0.4  # the correlation of two inputs
PAIRS = np.triu_indices(NEURONS, 1)


def ising(data=None):
    h = numpyro.param("h", jnp.full(NEURONS, -2.0))
    J = numpyro.param("J", jnp.zeros(len(PAIRS[0])))
    with numpyro.plate("bins", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Counting(2, (NEURONS,)), obs=data).astype(float)
        upper = jnp.zeros((NEURONS, NEURONS)).at[PAIRS].set(J)
        ebm.energy("E", -v @ h - jnp.sum((v @ upper) * v, -1))


def simulate(rng, num_rows, rates):
    """A neuron fires where its input, in part shared, is above its threshold."""
    shared, own = rng.normal(size=(num_rows, 1)), rng.normal(size=(num_rows, NEURONS))
    return (SHARED**0.5 * shared + (1 - SHARED) ** 0.5 * own > norm.isf(rates)).astype(int)


def true_counts(rates):
    """P(k spikes in a bin): a Poisson binomial law, mixed over the shared input."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z = (norm.isf(rates) - SHARED**0.5 * nodes[:, None]) / (1 - SHARED) ** 0.5
    law = np.eye(1, NEURONS + 1).repeat(len(nodes), 0)
    for p in norm.sf(z).T:
        law = law * (1 - p)[:, None] + np.roll(law, 1, -1) * p[:, None]
    return weights / weights.sum() @ law


def count_law(probability, states):
    return np.bincount(states.sum(-1), probability, NEURONS + 1)


def main(num_rows=20_000, num_steps=600, seed=0, out="spikes.png"):
    rng = np.random.default_rng(seed)
    rates = rng.uniform(0.05, 0.2, NEURONS)
    data = simulate(rng, num_rows, rates)
    states = np.indices([2] * NEURONS).reshape(NEURONS, -1).T
    optim = optax.adam(optax.cosine_decay_schedule(0.1, num_steps))
    svi = ebm.EnergySVI(ising, None, optim, ebm.MaximumLikelihood())
    fit = svi.run(jax.random.key(seed), num_steps, jnp.asarray(data), progress_bar=False)

    log_p = ebm.log_likelihood(jax.random.key(1), ebm.fixed(ising, fit.params), states)
    pairwise = np.exp(np.asarray(log_p, float))
    mean = data.mean(0)
    single = np.prod(np.where(states, mean, 1 - mean), -1)
    moments = states[:, PAIRS[0]] * states[:, PAIRS[1]]
    gap = np.abs(pairwise @ moments - (data[:, PAIRS[0]] * data[:, PAIRS[1]]).mean(0)).max()
    laws = {
        "true": true_counts(rates),
        "rates alone": count_law(single, states),
        "pairwise Ising": count_law(pairwise, states),
    }
    print(f"largest gap of a pair's moment between model and data {gap:.1e}")
    print(f"{'P(k spikes in a bin)':22}" + "".join(f"{k:>10}" for k in (0, 2, 4, 6, 8)))
    for name, law in laws.items():
        print(f"{name:22}" + "".join(f"{law[k]:10.2g}" for k in (0, 2, 4, 6, 8)))
    draw(out, data, laws, fit.params)
    return laws, gap


def draw(out, data, laws, params):
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    time, neuron = np.nonzero(data[:150])
    axes[0].plot(time, neuron, "|", color="k", ms=7)
    axes[0].set(xlabel="bin", ylabel="neuron", title="Spikes")
    J = np.zeros((NEURONS, NEURONS))
    J[PAIRS] = np.asarray(params["J"])
    image = axes[1].imshow(J + J.T, cmap="RdBu_r", vmin=-1, vmax=1)
    axes[1].set(title="Couplings of the Ising model", xlabel="neuron", ylabel="neuron")
    fig.colorbar(image, ax=axes[1], shrink=0.8)
    observed = np.bincount(data.sum(-1), minlength=NEURONS + 1) / len(data)
    axes[2].semilogy(np.where(observed > 0, observed, np.nan), "o", color="0.6", label="data")
    for (name, law), style in zip(laws.items(), ("k-", "C1--", "C0-"), strict=True):
        axes[2].semilogy(law, style, label=name)
    axes[2].set(xlabel="spikes in a bin", title="How many at once", ylim=(1e-7, 1))
    axes[2].legend(fontsize=8)
    fig.savefig(out, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-rows", type=int, default=20_000)
    parser.add_argument("--num-steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="spikes.png")
    main(**vars(parser.parse_args()))
