# SPDX-License-Identifier: Apache-2.0
"""A Gaussian-Bernoulli RBM with priors on its weights: what 300 points say, and leave open.

The sum over four hidden units and the Gaussian integral are closed forms, so `normalized` gives the
exact posterior of W, and NUTS draws it. The picture shows the posterior mean of the density beside
its uncertainty, which a point estimate hides.

    python examples/bayesian_grbm.py --num-samples 500 --out bayesian_grbm.png
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS
from numpyro.infer import log_likelihood as row_log_likelihood

import numpyro_ebm as ebm


def grbm(data=None, *, num_hidden=4):
    W = numpyro.sample("W", dist.Normal(0.0, 2.0).expand([2, num_hidden]).to_event(2))
    b = numpyro.sample("b", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    c = numpyro.sample("c", dist.Normal(-2.0, 2.0).expand([num_hidden]).to_event(1))
    scale = numpyro.sample("scale", dist.LogNormal(-1.0, 0.5))
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        h = numpyro.sample("h", ebm.Counting(2, event_shape=(num_hidden,)))
        bowl = 0.5 * jnp.sum(((v - b) / scale) ** 2, -1)
        ebm.energy("E", bowl - h @ c - jnp.sum((v @ W) * h, -1) / scale)


def main(num_samples=500, num_rows=300, seed=0, out="bayesian_grbm.png"):
    key_data, key_run = jax.random.split(jax.random.key(seed))
    corners = jnp.array([[-1.5, -1.5], [1.5, -1.5], [0.0, 1.5]])
    which, noise = jax.random.split(key_data)
    rows = corners[jax.random.randint(which, (num_rows + 1_000,), 0, 3)]
    rows = rows + 0.35 * jax.random.normal(noise, rows.shape)
    data, held_out = rows[:num_rows], rows[num_rows:]

    model = ebm.normalized(grbm, "enumerate")
    mcmc = MCMC(
        NUTS(model),
        num_warmup=num_samples,
        num_samples=num_samples,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(key_run, data)
    thinned = {k: x[:: max(1, len(x) // 200)] for k, x in mcmc.get_samples().items()}
    on_test = row_log_likelihood(model, thinned, held_out)["v"]
    score = float(jnp.mean(jax.nn.logsumexp(on_test, 0) - jnp.log(len(on_test))))
    print(f"held-out log predictive density {score:.3f} nats a row")

    side = np.linspace(-3.0, 3.0, 60)
    grid = jnp.asarray(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2))
    density = np.exp(row_log_likelihood(model, thinned, grid)["v"])
    fig, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    axes[0].plot(*data.T, ".", ms=3)
    axes[0].set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", title=f"{num_rows} rows")
    panels = {"Posterior mean of the density": density.mean(0), "Its deviation": density.std(0)}
    for ax, (title, values) in zip(axes[1:], panels.items(), strict=True):
        image = ax.imshow(values.reshape(60, 60), extent=(-3, 3, -3, 3), origin="lower")
        ax.set_title(title)
        fig.colorbar(image, ax=ax, shrink=0.8)
    fig.savefig(out, dpi=150)
    plt.close(fig)
    return score, thinned


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--num-rows", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="bayesian_grbm.png")
    main(**vars(parser.parse_args()))
