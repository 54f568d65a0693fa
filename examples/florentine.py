# SPDX-License-Identifier: Apache-2.0
"""Marriages between sixteen families of Florence: a random graph with edges and triangles.

    p(y) ∝ exp(θ_edges · edges(y) + θ_triangles · triangles(y))

Z sums over 2^120 graphs. The exchange algorithm draws the posterior of θ from auxiliary
graphs; pseudo-likelihood, which takes the ties for independent given the others, stands beside it.

    python examples/florentine.py --num-samples 1000 --out florentine.png
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS

import numpyro_ebm as ebm

MARRIAGES = {  # Padgett and Ansell (1993): 20 ties; the Pucci married none of the others
    "Acciaiuoli": ["Medici"],
    "Albizzi": ["Ginori", "Guadagni", "Medici"],
    "Barbadori": ["Castellani", "Medici"],
    "Bischeri": ["Guadagni", "Peruzzi", "Strozzi"],
    "Castellani": ["Peruzzi", "Strozzi"],
    "Ginori": [],
    "Guadagni": ["Lamberteschi", "Tornabuoni"],
    "Lamberteschi": [],
    "Medici": ["Ridolfi", "Salviati", "Tornabuoni"],
    "Pazzi": ["Salviati"],
    "Peruzzi": ["Strozzi"],
    "Pucci": [],
    "Ridolfi": ["Strozzi", "Tornabuoni"],
    "Salviati": [],
    "Strozzi": [],
    "Tornabuoni": [],
}
FAMILIES = list(MARRIAGES)
PAIRS = np.triu_indices(len(FAMILIES), 1)
# Monte Carlo maximum likelihood by R's ergm (estimate, error), from github.com/gvegayon/tabulergm.
PUBLISHED = {"edges": (-1.698, 0.346), "triangles": (0.192, 0.560)}


def adjacency(y):
    """Symmetric matrices of ties, of shape (..., 16, 16)."""
    A = jnp.zeros((*y.shape[:-1], len(FAMILIES), len(FAMILIES))).at[..., *PAIRS].set(y)
    return A + jnp.swapaxes(A, -1, -2)


def network(data=None):
    edges = numpyro.sample("edges", dist.Normal(0.0, 5.0))
    triangles = numpyro.sample("triangles", dist.Normal(0.0, 5.0))
    with numpyro.plate("networks", 1 if data is None else len(data)):
        y = numpyro.sample("y", ebm.Counting(2, (len(PAIRS[0]),)), obs=data).astype(float)
        A = adjacency(y)
        closed = jnp.einsum("...ij,...jk,...ki->...", A, A, A) / 6
        ebm.energy("E", -edges * jnp.sum(y, -1) - triangles * closed)


def main(num_samples=1_000, num_sweeps=24, seed=0, out="florentine.png"):
    A = np.zeros((len(FAMILIES), len(FAMILIES)), int)
    for family, others in MARRIAGES.items():
        A[FAMILIES.index(family), [FAMILIES.index(x) for x in others]] = 1
    data = jnp.asarray((A + A.T)[PAIRS])[None]
    kernels = {
        "exchange": ebm.Exchange(network, ebm.BlockGibbs, num_sweeps),
        "pseudo-likelihood": NUTS(ebm.generalized(network, ebm.PseudoLikelihood())),
    }
    found = {}
    for name, kernel in kernels.items():
        mcmc = MCMC(
            kernel,
            num_warmup=num_samples // 2,
            num_samples=num_samples,
            num_chains=4,
            chain_method="vectorized",
            progress_bar=False,
        )
        mcmc.run(jax.random.key(seed), data)
        found[name] = {k: np.asarray(x) for k, x in mcmc.get_samples().items()}
        if name == "exchange":
            adequacy = ebm.auxiliary_adequacy(mcmc)
            print(f"auxiliary graphs mix: {adequacy.is_adequate} (p = {adequacy.p_value:.2f})")
    print(f"{'posterior, N(0, 25) prior':30}" + "".join(f"{k:>18}" for k in PUBLISHED))
    for name, draws in found.items():
        columns = (f"{draws[k].mean():11.2f} ± {draws[k].std():.2f}" for k in PUBLISHED)
        print(f"{name:30}" + "".join(columns))
    row = "".join(f"{estimate:11.2f} ± {error:.2f}" for estimate, error in PUBLISHED.values())
    print(f"{'maximum likelihood, published':30}{row}")
    draw(out, np.asarray(A + A.T), found)
    return found


def draw(out, A, found):
    """The families on a circle, and the posterior beside what was published."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    angle = 2 * np.pi * np.arange(len(FAMILIES)) / len(FAMILIES)
    at = np.stack([np.cos(angle), np.sin(angle)], -1)
    for i, j in np.argwhere(np.triu(A)):
        axes[0].plot(*at[[i, j]].T, color="0.6", lw=1.2, zorder=0)
    axes[0].scatter(*at.T, s=20 + 40 * A.sum(0), color="C0")
    for family, (x, y) in zip(FAMILIES, at, strict=True):
        side = "left" if x > 0.05 else "right" if x < -0.05 else "center"
        axes[0].text(1.12 * x, 1.12 * y, family, ha=side, va="center", fontsize=8)
    axes[0].set(aspect="equal", xlim=(-1.75, 1.75), ylim=(-1.3, 1.3), title="Twenty marriages")
    axes[0].set_axis_off()
    for i, (name, draws) in enumerate(found.items()):
        axes[1].plot(draws["edges"], draws["triangles"], ".", ms=2, color=f"C{i}", alpha=0.4)
        axes[1].plot([], [], "o", color=f"C{i}", label=name)
    (x, dx), (y, dy) = PUBLISHED.values()
    axes[1].errorbar(x, y, dy, dx, fmt="ko", capsize=3, label="maximum likelihood, published")
    axes[1].set(xlabel="θ of edges", ylabel="θ of triangles", title="Posterior")
    axes[1].legend(fontsize=8)
    fig.savefig(out, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-samples", type=int, default=1_000)
    parser.add_argument("--num-sweeps", type=int, default=24, help="of every auxiliary graph")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="florentine.png")
    main(**vars(parser.parse_args()))
