# SPDX-License-Identifier: Apache-2.0
"""Regression where the answer has two branches: an energy of (x, y) beside least squares.

    p(y | x) = exp(-E(x, y)) / Z(x)

Every row has a normalizer of its own, which ranking noise contrast, energy discrepancy and score
matching never look at. The law of the rows is known, so that the log-likelihood of fresh rows can
be held against its own; Z(x) is summed on a grid, which owes nothing to the library.

    python examples/regression.py --num-steps 1500 --out regression.png
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax

import numpyro_ebm as ebm

Y = jnp.linspace(-6.0, 6.0, 1_201)


def branches(x):
    """Seven of ten rows are about 1 + x/2, the others about its negative."""
    of = dist.Normal(jnp.stack([1 + 0.5 * x, -1 - 0.5 * x], -1), 0.2)
    return dist.MixtureSameFamily(dist.Categorical(jnp.array([0.7, 0.3])), of)


def energy_of_pairs(x, y=None, *, width=64):
    sizes = [2, width, width, 1]

    def init(key):
        keys = jax.random.split(key, 3)
        pairs = zip(keys, sizes, sizes[1:], strict=False)
        return [(jax.random.normal(k, (m, n)) / m**0.5, jnp.zeros(n)) for k, m, n in pairs]

    layers = numpyro.param("layers", init)
    with numpyro.plate("data", len(x)):
        y = numpyro.sample("y", ebm.Lebesgue(), obs=y)
        ebm.energy("E", network(layers, x, y) + 0.02 * y**2)


def network(layers, x, y):
    z = jnp.stack([x, y], -1)
    for W, b in layers[:-1]:
        z = jax.nn.silu(z @ W + b)
    return (z @ layers[-1][0] + layers[-1][1])[..., 0]


@jax.jit
def log_densities(layers, x):
    """log p(y | x) at every y of the grid, of shape (rows, grid)."""
    log_p = -network(layers, *jnp.broadcast_arrays(x[:, None], Y)) - 0.02 * Y**2
    return log_p - jax.nn.logsumexp(log_p, -1, keepdims=True) - jnp.log(Y[1] - Y[0])


MALA = partial(ebm.MALA, step_size=0.02)
PersistentCD = partial(ebm.ContrastiveDivergence, MALA, 20, persistent=True)
OBJECTIVES = {
    "maximum likelihood": ebm.MaximumLikelihood,
    "ranking NCE": lambda: ebm.RankingNCE(dist.Normal(0.0, 2.0), 32),
    "energy discrepancy": lambda: ebm.EnergyDiscrepancy(1.0, 32),
    "denoising s. m.": lambda: ebm.DenoisingScoreMatching(0.1),
    "CD-20": lambda: ebm.ContrastiveDivergence(MALA, 20),
    "PCD-20, no resets": PersistentCD,
    "PCD-20, resets": lambda: PersistentCD(reset_probability=0.1),
    "PCD-20, adjusted": lambda: PersistentCD(
        initial=dist.Normal(0.0, 2.0), reset_probability=1.0, adjusted_resets=True
    ),
}


def main(
    num_steps=1_500,
    learning_rate=1e-3,
    objectives=None,
    num_test=2_000,
    seed=0,
    out="regression.png",
):
    keys = jax.random.split(jax.random.key(seed), 4)
    x = jax.random.uniform(keys[0], (4_000,), minval=-2.0, maxval=2.0)
    x_test = jax.random.uniform(keys[1], (num_test,), minval=-2.0, maxval=2.0)
    y, y_test = branches(x).sample(keys[2]), branches(x_test).sample(keys[3])
    design = jnp.stack([jnp.ones_like(x), x], -1)
    line = jnp.linalg.lstsq(design, y)[0]
    residual = dist.Normal(0.0, jnp.std(y - design @ line))
    found = {
        "truth": float(branches(x_test).log_prob(y_test).mean()),
        "least squares": float(residual.log_prob(y_test - line[0] - line[1] * x_test).mean()),
    }
    print(f"log-likelihood of {num_test:,} fresh rows, nats a row")
    densities = {}
    for name in objectives or OBJECTIVES:
        optim = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))
        svi = ebm.EnergySVI(energy_of_pairs, None, optim, OBJECTIVES[name]())
        fit = svi.run(keys[3], num_steps, x, y, batch_size=128, progress_bar=False)
        layers = fit.params["layers"]
        at_test = jax.vmap(lambda row, y: jnp.interp(y, Y, row))
        found[name] = float(at_test(log_densities(layers, x_test), y_test).mean())
        densities[name] = np.exp(log_densities(layers, jnp.linspace(-2.0, 2.0, 80)))
    for name, value in found.items():
        print(f"  {name:20}{value:7.3f}")
    draw(out, x, y, line, densities, found)
    return found


def draw(out, x, y, line, densities, found):
    columns = (len(densities) + 2) // 2
    size = (2.6 * columns, 5.2)
    fig, axes = plt.subplots(
        2, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    first, *others = axes.flat
    first.plot(x, y, ".", ms=1.5, color="0.6")
    first.plot([-2, 2], [line[0] - 2 * line[1], line[0] + 2 * line[1]], label="least squares")
    first.set_title("rows")
    first.legend(fontsize=8, loc="upper left")
    for ax, (name, density) in zip(others, densities.items(), strict=False):
        ax.pcolormesh(np.linspace(-2, 2, 80), Y, density.T, vmax=1.4, rasterized=True)
        ax.set_title(f"{name}: {found[name]:.3f}", fontsize=10)
    for ax in axes.flat[len(densities) + 1 :]:
        ax.set_axis_off()
    first.set(xlim=(-2, 2), ylim=(-3, 3))
    fig.supxlabel("x", fontsize=10)
    fig.supylabel("y", fontsize=10)
    fig.savefig(out, dpi=110)
    plt.close(fig)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-steps", type=int, default=1_500)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, metavar="NAME")
    parser.add_argument("--out", default="regression.png")
    main(**vars(parser.parse_args()))
