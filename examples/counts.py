# SPDX-License-Identifier: Apache-2.0
"""Conway-Maxwell-Poisson counts: a normalizer that is a series, and three routes around it.

    p(v) = exp(v log λ - ν log v!) / Z(λ, ν),  v = 0, 1, 2, ...

Counts that are less (ν > 1) or more (ν < 1) dispersed than Poisson ones. Z is a fast series, so the
posterior is known; exchange and noise contrast never look at it.

    python examples/counts.py --num-samples 4000 --out counts.png
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import gammaln, logsumexp
from numpyro.infer import MCMC, NUTS

import numpyro_ebm as ebm

MOST = 60
"""Counts from here on have no mass: at λ = 4, ν = 0.75 it is e^-80."""


def conway_maxwell_poisson(data=None):
    log_rate = numpyro.sample("log_rate", dist.Normal(1.0, 1.0))
    nu = numpyro.sample("nu", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Counting(MOST), obs=data)
        ebm.energy("E", nu * gammaln(v + 1.0) - log_rate * v)


def log_normalizer(params):
    v = jnp.arange(MOST)
    return logsumexp(params["log_rate"] * v - params["nu"] * gammaln(v + 1.0))


def main(num_samples=4_000, num_rows=500, seed=0, out="counts.png"):
    key_data, key_run = jax.random.split(jax.random.key(seed))
    truth = {"log_rate": np.log(4.0), "nu": 0.75}
    v = jnp.arange(MOST)
    logits = truth["log_rate"] * v - truth["nu"] * gammaln(v + 1.0)
    data = dist.Categorical(logits=logits).sample(key_data, (num_rows,))

    model = conway_maxwell_poisson
    noise = dist.Categorical(logits=dist.Poisson(jnp.mean(data)).log_prob(v))
    kernels = {
        "exact (series)": NUTS(ebm.normalized(model, log_normalizer)),
        "exchange, exact draws": ebm.Exchange(model, "enumerate", proposal="langevin"),
        "noise contrast": NUTS(ebm.generalized(model, ebm.NCE(noise, noise_ratio=20))),
    }
    found = {}
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, (name, kernel) in enumerate(kernels.items()):
        mcmc = MCMC(kernel, num_warmup=1_000, num_samples=num_samples, progress_bar=False)
        mcmc.run(key_run, data)
        draws = found[name] = {k: np.asarray(mcmc.get_samples()[k]) for k in truth}
        text = ", ".join(f"{k} {x.mean():.3f} ± {x.std():.3f}" for k, x in draws.items())
        print(f"{name:28} {text}")
        axes[0].plot(
            draws["log_rate"][::10], draws["nu"][::10], ".", ms=3, color=f"C{i}", label=name
        )
    axes[0].plot(*truth.values(), "k+", ms=14, label="truth")
    axes[0].set(xlabel="log λ", ylabel="ν", title="Posterior draws")
    axes[0].legend(fontsize=8)

    counts = np.bincount(np.asarray(data), minlength=25)[:25] / num_rows
    axes[1].bar(np.arange(25), counts, color="0.8", label="data")
    exact = found["exact (series)"]
    rows = [
        jax.nn.softmax(rate * v - nu * gammaln(v + 1.0))[:25]
        for rate, nu in zip(exact["log_rate"][::200], exact["nu"][::200], strict=True)
    ]
    low, high = np.quantile(np.stack(rows), [0.05, 0.95], axis=0)
    axes[1].fill_between(np.arange(25), low, high, alpha=0.5, label="90% of the posterior")
    poisson = np.exp(dist.Poisson(jnp.mean(data)).log_prob(np.arange(25)))
    axes[1].plot(np.arange(25), poisson, "k:", label="Poisson of the same mean")
    axes[1].set(xlabel="count", title="Fit")
    axes[1].legend(fontsize=8)
    fig.savefig(out, dpi=150)
    plt.close(fig)
    return truth, found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-samples", type=int, default=4_000)
    parser.add_argument("--num-rows", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="counts.png")
    main(**vars(parser.parse_args()))
