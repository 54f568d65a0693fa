# SPDX-License-Identifier: Apache-2.0
"""Chains over a landscape: steps that follow the slope, and swaps with hotter replicas.

The density is a mixture of eight Gaussians, each an eighth of the mass. Four chains of MALA and
four of replica exchange start in the same well.

    python examples/chains.py --num-samples 2000 --out chains.gif
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
from matplotlib.animation import FuncAnimation, PillowWriter
from numpyro.infer import MCMC

import numpyro_ebm as ebm

TOY = ebm.datasets.TOYS["eight_gaussians"]
CHAINS, FRAMES, TRAIL = 4, 32, 12


def eight_wells(data=None):
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
        ebm.energy("E", -TOY.log_density(v))


WELLS = ebm.fixed(eight_wells, {})  # no parameters, and so nothing whose normalizer is missing
KERNELS = {
    "MALA": lambda: ebm.MALA(WELLS),
    "replica exchange": lambda: ebm.ReplicaExchange(WELLS, min_inverse_temperature=0.02),
}


def main(num_samples=2_000, seed=0, out="chains.gif"):
    rows = np.asarray(TOY.sample(jax.random.key(9), 4_000))
    centres = np.stack([rows[np.argmax(rows @ d)] for d in directions()])
    start = jnp.asarray(np.broadcast_to(centres[0] * 0.95, (CHAINS, 1, 2)))
    paths, apart = {}, {}
    print(f"{'':18}{'share of each well (true: 0.125)':60}  total variation")
    for name, make in KERNELS.items():
        mcmc = MCMC(
            make(),
            num_warmup=200,
            num_samples=num_samples,
            num_chains=CHAINS,
            chain_method="vectorized",
            progress_bar=False,
        )
        mcmc.run(jax.random.key(seed), init_params={"v": start})
        paths[name] = np.asarray(mcmc.get_samples(group_by_chain=True)["v"])[:, :, 0]
        nearest = np.argmax(paths[name].reshape(-1, 2) @ directions().T, -1)
        share = np.bincount(nearest, minlength=8) / len(nearest)
        apart[name] = 0.5 * np.abs(share - 0.125).sum()
        text = "".join(f"{x:7.3f}" for x in share)
        print(f"{name:18}{text:60}  {apart[name]:.3f}")
    draw(out, paths)
    return apart


def directions():
    """Of the eight wells, from the first one on."""
    angle = np.arange(8) * np.pi / 4
    return np.stack([np.cos(angle), np.sin(angle)], -1)


def draw(out, paths):
    """A few hundred steps of each, four steps a frame."""
    lim = (-1.2 * np.abs(TOY.sample(jax.random.key(8), 500)).max(),) * 2
    lim = (lim[0], -lim[0])
    fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.8), layout="constrained")
    lines = []
    for ax, (name, path) in zip(axes, paths.items(), strict=True):
        ebm.plots.density(WELLS, xlim=lim, ylim=lim, num=100, colorbar=False, ax=ax)
        ax.set(title=name, xticks=[], yticks=[], xlabel="", ylabel="")
        lines.append([ax.plot([], [], "w.-", lw=0.6, ms=3, alpha=0.9)[0] for _ in path])

    def show(frame):
        last = 4 * frame + 1
        for artists, path in zip(lines, paths.values(), strict=True):
            for line, chain in zip(artists, path, strict=True):
                line.set_data(*chain[max(0, last - TRAIL) : last].T)
        return [line for artists in lines for line in artists]

    FuncAnimation(fig, show, FRAMES).save(out, PillowWriter(fps=8), dpi=72)
    plt.close(fig)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-samples", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="chains.gif")
    main(**vars(parser.parse_args()))
