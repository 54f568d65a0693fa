# SPDX-License-Identifier: Apache-2.0
"""A density in the plane, learned by every objective for real-valued data.

One energy (a network of 2 x 32 units that tilts a Gaussian), one optimiser, one number of steps.
Only the loss differs. The density is known, so that the mean log-likelihood of fresh rows can be
held against that of the truth: the difference is a Kullback-Leibler divergence.

    python examples/toys.py --num-steps 1000 --toys eight_gaussians --out toys.png
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

SIDE = np.linspace(-3.0, 3.0, 160)  # of the frame, in standard deviations
GRID = jnp.asarray(np.stack(np.meshgrid(SIDE, SIDE), -1).reshape(-1, 2))
WIDE = dist.Normal(0.0, 1.5).expand([2]).to_event(1)


def energy_of_network(data=None, *, width=32):
    sizes = [2, width, width, 1]

    def init(key):
        keys = jax.random.split(key, len(sizes))
        pairs = zip(keys, sizes, sizes[1:], strict=False)
        return [(jax.random.normal(k, (m, n)) / m**0.5, jnp.zeros(n)) for k, m, n in pairs]

    layers = numpyro.param("layers", init)
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", WIDE, obs=data)  # the Gaussian that the energy tilts
        x = v
        for W, b in layers[:-1]:
            x = jax.nn.silu(x @ W + b)
        ebm.energy("E", (x @ layers[-1][0] + layers[-1][1])[..., 0])


def gaussian_flow():
    loc = numpyro.param("flow_loc", jnp.zeros(2))
    scale = numpyro.param("flow_scale", jnp.eye(2), constraint=dist.constraints.lower_cholesky)
    return dist.MultivariateNormal(loc, scale_tril=scale)


MALA = partial(ebm.MALA, step_size=0.02)
OBJECTIVES = {
    "maximum likelihood": lambda: ebm.MaximumLikelihood(num_nodes=64),
    "score matching": ebm.ScoreMatching,
    "sliced s. m.": ebm.SlicedScoreMatching,
    "denoising s. m.": lambda: ebm.DenoisingScoreMatching(0.1),
    "multiscale d. s. m.": lambda: ebm.MultiscaleDenoisingScoreMatching(
        None, min_noise_scale=0.05, max_noise_scale=1.0
    ),
    "kernel Stein": ebm.KernelSteinDiscrepancy,
    "Fisher divergence": ebm.FisherDivergence,
    "energy discrepancy": lambda: ebm.EnergyDiscrepancy(0.3),
    "NCE": lambda: ebm.NCE(WIDE, noise_ratio=4),
    "ranking NCE": lambda: ebm.RankingNCE(WIDE, noise_ratio=10),
    "conditional NCE": lambda: ebm.ConditionalNCE(0.5, noise_ratio=4),
    "kernel ratio": lambda: ebm.KernelRatioMatching(0.5),
    "flow contrastive": lambda: ebm.FlowContrastive(gaussian_flow, noise_ratio=4),
    "self-normalised": lambda: ebm.SelfNormalized(WIDE, noise_ratio=10),
    "CD-10": lambda: ebm.ContrastiveDivergence(MALA, 10),
    "PCD-10": lambda: ebm.ContrastiveDivergence(MALA, 10, persistent=True),
}


def standardised(name, rng_key, num_rows):
    """Rows of a toy in units of its standard deviation, and the log-density in these units."""
    toy = ebm.datasets.TOYS[name]
    many = toy.sample(jax.random.key(99), 100_000)
    loc, scale = many.mean(0), many.std(0)
    rows = (toy.sample(rng_key, num_rows) - loc) / scale
    return rows, lambda x: toy.log_density(x * scale + loc) + jnp.sum(jnp.log(scale))


def learn(svi, rng_key, rows, test, num_steps):
    """Mean log-likelihood of the test rows, by quadrature, and the density on the grid."""
    fit = svi.run(rng_key, num_steps, rows, batch_size=128, progress_bar=False)
    model = ebm.fixed(energy_of_network, fit.params)
    log_p = np.asarray(ebm.log_likelihood(rng_key, model, jnp.concatenate([test, GRID])))
    return log_p[: len(test)].mean(), np.exp(log_p[len(test) :])


def main(
    num_steps=1_000,
    toys=("eight_gaussians",),
    objectives=tuple(OBJECTIVES),
    seed=0,
    out="toys.png",
):
    key_train, key_test, key_run = jax.random.split(jax.random.key(seed), 3)
    train, test, truth, best = {}, {}, {}, {}
    for name in toys:
        train[name], log_density = standardised(name, key_train, 20_000)
        test[name], _ = standardised(name, key_test, 5_000)
        best[name] = float(log_density(test[name]).mean())
        truth[name] = np.exp(log_density(GRID))
    print("nats a row below the truth:" + "".join(f"{name:>20}" for name in toys))
    gap, density = {}, {}
    for loss in objectives:
        optim = optax.adam(optax.cosine_decay_schedule(5e-3, num_steps))
        svi = ebm.EnergySVI(energy_of_network, None, optim, OBJECTIVES[loss]())
        for name in toys:
            mean, density[loss, name] = learn(svi, key_run, train[name], test[name], num_steps)
            gap[loss, name] = best[name] - mean
        gaps = "".join(f"{gap[loss, name]:20.3f}" for name in toys)
        print(f"  {loss:25}{gaps}", flush=True)
    draw(out, train, truth, density, gap, toys, objectives)
    return gap


def draw(out, train, truth, density, gap, toys, objectives):
    """Two bands of panels: the data and half of the objectives, the truth and the other half."""
    half = (len(objectives) + 1) // 2
    bands = [("data", objectives[:half]), ("truth", objectives[half:])]
    rows, columns = 2 * len(toys), 1 + half
    size = (1.45 * columns, 1.65 * rows)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
        ax.set_facecolor(plt.get_cmap()(0.0))
    for ax in axes[len(toys) :, 1 + len(bands[1][1]) :].flat:
        ax.set_axis_off()
    for i, (first, losses) in enumerate(bands):
        for ax, title in zip(axes[i * len(toys)], [first, *losses], strict=False):
            ax.set_title(title, fontsize=8)
        for name, row in zip(toys, axes[i * len(toys) :], strict=False):
            scale = {"vmin": 0, "vmax": np.quantile(truth[name], 0.99), "rasterized": True}
            row[0].set_ylabel(name.replace("_", " "), fontsize=8)
            if first == "data":
                row[0].plot(*np.asarray(train[name][:2_000]).T, ".", ms=0.8, color="w")
            else:
                row[0].pcolormesh(SIDE, SIDE, truth[name].reshape(160, 160), **scale)
            for ax, loss in zip(row[1:], losses, strict=False):
                ax.pcolormesh(SIDE, SIDE, density[loss, name].reshape(160, 160), **scale)
                ax.text(-2.85, -2.75, f"{gap[loss, name]:.2f}", color="w", fontsize=8)
    fig.savefig(out, dpi=110)
    plt.close(fig)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-steps", type=int, default=1_000)
    parser.add_argument("--toys", nargs="+", default=["eight_gaussians"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="toys.png")
    main(**vars(parser.parse_args()))
