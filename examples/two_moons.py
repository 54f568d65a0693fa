# SPDX-License-Identifier: Apache-2.0
"""Simulation-based inference on two moons: a posterior from pairs of parameters and simulations.

    p(θ | x) = π(θ) exp(-E(θ, x)) / Z(x)

The simulator has no likelihood that the method may see. An energy tilts the prior, and ranking
noise contrast tells the θ that made x from others of the prior. The likelihood of this simulator is
known after all, and so is the posterior, two crescents.

    python examples/two_moons.py --num-steps 4000 --out two_moons.png
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax

import numpyro_ebm as ebm

PRIOR = dist.Uniform(-1.0, 1.0).expand([2]).to_event(1)
OBSERVED = jnp.zeros(2)


def simulate(rng_key, theta):
    """Two moons as in Greenberg et al. (2019) and the benchmark of Lueckmann et al. (2021)."""
    key_angle, key_radius = jax.random.split(rng_key)
    angle = jax.random.uniform(key_angle, theta.shape[:-1], minval=-0.5, maxval=0.5) * jnp.pi
    radius = 0.1 + 0.01 * jax.random.normal(key_radius, theta.shape[:-1])
    moon = jnp.stack([radius * jnp.cos(angle) + 0.25, radius * jnp.sin(angle)], -1)
    return moon + _shift(theta)


def _shift(theta):
    a, b = theta[..., 0], theta[..., 1]
    return jnp.stack([-jnp.abs(a + b), b - a], -1) / jnp.sqrt(2.0)


def true_log_likelihood(x, theta):
    """The density of the moon at x, in its polar coordinates."""
    at = x - _shift(theta) - jnp.array([0.25, 0.0])
    radius = jnp.linalg.norm(at, axis=-1)
    log_p = dist.Normal(0.1, 0.01).log_prob(radius) - jnp.log(jnp.pi * radius)
    return jnp.where(at[..., 0] > 0, log_p, -jnp.inf)


def network(layers, x, theta):
    z = jnp.concatenate([theta, x], -1)
    for W, b in layers[:-1]:
        z = jax.nn.silu(z @ W + b)
    return (z @ layers[-1][0] + layers[-1][1])[..., 0]


def posterior(x, theta=None, *, width=64):
    sizes = [4, width, width, width, 1]

    def init(key):
        keys = jax.random.split(key, 4)
        pairs = zip(keys, sizes, sizes[1:], strict=False)
        return [(jax.random.normal(k, (m, n)) * (2 / m) ** 0.5, jnp.zeros(n)) for k, m, n in pairs]

    layers = numpyro.param("layers", init)
    with numpyro.plate("data", len(x)):
        theta = numpyro.sample("theta", PRIOR, obs=theta)
        ebm.energy("E", network(layers, x, theta))


def main(num_steps=4_000, num_rows=20_000, seed=0, out="two_moons.png"):
    keys = jax.random.split(jax.random.key(seed), 4)
    theta = PRIOR.sample(keys[0], (num_rows,))
    x = simulate(keys[1], theta)
    optim = optax.adam(optax.cosine_decay_schedule(3e-3, num_steps))
    svi = ebm.EnergySVI(posterior, None, optim, ebm.RankingNCE(PRIOR, noise_ratio=24))
    fit = svi.run(keys[2], num_steps, x, theta, batch_size=128, progress_bar=False)

    side = jnp.linspace(-1, 1, 402)[1:-1]
    grid = jnp.stack(jnp.meshgrid(side, side), -1)
    log_p = {
        "true": true_log_likelihood(OBSERVED, grid),
        "learned": -network(fit.params["layers"], jnp.broadcast_to(OBSERVED, grid.shape), grid),
    }
    cells = {
        name: np.asarray(jax.nn.softmax(x.ravel())).reshape(x.shape) for name, x in log_p.items()
    }
    upper = {name: p[np.add.outer(side, side) > 0].sum() for name, p in cells.items()}
    apart = 0.5 * np.abs(cells["true"] - cells["learned"]).sum()
    inside = cells["learned"][np.asarray(log_p["true"] > log_p["true"].max() - 8)].sum()
    print(f"mass of the upper crescent: {upper['learned']:.3f} (true {upper['true']:.3f})")
    print(f"learned mass within the true crescents {inside:.3f}; total variation {apart:.3f}")

    model = ebm.fixed(posterior, fit.params)
    draws = ebm.sample(keys[3], model, 2_000, OBSERVED[None], num_chains=200, num_warmup=1_000)
    draws = np.asarray(draws["theta"][:, 0])
    share = np.mean(draws.sum(-1) > 0)
    print(f"draws: {share:.3f} in the upper crescent")
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.7), layout="constrained")
    for ax, (name, p) in zip(axes, cells.items(), strict=False):
        ax.pcolormesh(side, side, p, vmax=np.quantile(cells["true"], 0.999), rasterized=True)
        ax.set_title(f"{name} posterior")
    axes[2].plot(*draws.T, ".", ms=2)
    axes[2].set_title("draws")
    for ax in axes:
        ax.set(xlim=(-0.6, 0.6), ylim=(-0.6, 0.6), aspect="equal", xlabel="$θ_1$", ylabel="$θ_2$")
    fig.savefig(out, dpi=120)
    plt.close(fig)
    return upper, apart, share


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-steps", type=int, default=4_000)
    parser.add_argument("--num-rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="two_moons.png")
    main(**vars(parser.parse_args()))
