# SPDX-License-Identifier: Apache-2.0
"""One posterior by every route: the precision of Gaussian rows whose normalizer was left out.

The README's model, θ ~ Gamma(2, 1) and the energy ½ θ x². Its posterior is a Gamma in closed form;
plain NumPyro with `numpyro.factor` is off by a factor of fifty, and every route of the library is
right: exactly where it promises that, in its centre where it is a generalised posterior.

    python examples/posterior_routes.py --num-samples 5000 --out posterior_routes.png
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


def gaussian(data):
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * v**2)


def with_factor(data):
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data)):
        numpyro.factor("E", -0.5 * theta * data**2)


def routes(num_rows):
    """Name -> kernel."""

    def simulate(rng_key, params):
        return {"v": jax.random.normal(rng_key, (num_rows,)) / jnp.sqrt(params["theta"])}

    noise = dist.Normal(0.0, 1.2)
    return {
        "plain NumPyro": NUTS(with_factor),
        "normalized, enumerate": NUTS(ebm.normalized(gaussian, "enumerate")),
        "normalized, quadrature": NUTS(ebm.normalized(gaussian, "quadrature")),
        "exchange, exact draws": ebm.Exchange(gaussian, simulate),
        "exchange, 30 MALA steps": ebm.Exchange(
            gaussian, lambda model: ebm.MALA(model, step_size=1.0), 30
        ),
        "generalized, score matching": NUTS(
            ebm.generalized(gaussian, ebm.ScoreMatching(), "calibrate")
        ),
        "generalized, KSD": NUTS(
            ebm.generalized(
                gaussian, ebm.KernelSteinDiscrepancy(kernel="imq", pairs="square"), "calibrate"
            )
        ),
        "generalized, NCE": NUTS(ebm.generalized(gaussian, ebm.NCE(noise, noise_ratio=10))),
    }


def main(num_samples=5_000, seed=0, out="posterior_routes.png"):
    data = jax.random.normal(jax.random.key(seed), (200,))
    exact = dist.Gamma(2.0 + len(data) / 2, 1.0 + jnp.sum(data**2) / 2)
    print(f"{'exact':28} {float(exact.mean):.3f} ± {float(exact.variance) ** 0.5:.3f}")
    draws = {}
    for name, kernel in routes(len(data)).items():
        mcmc = MCMC(kernel, num_warmup=1_000, num_samples=num_samples, progress_bar=False)
        mcmc.run(jax.random.key(seed + 1), data)
        draws[name] = np.asarray(mcmc.get_samples()["theta"])
        print(f"{name:28} {draws[name].mean():.3f} ± {draws[name].std():.3f}")

    fig, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    grid = np.linspace(0.0, 1.8, 500)
    density = np.exp(np.asarray(exact.log_prob(jnp.asarray(grid[1:]))))
    for i, (name, theta) in enumerate(draws.items()):
        heights, edges = np.histogram(theta, bins=60, range=(0.0, 1.8), density=True)
        base = len(draws) - 1 - i
        heights = np.minimum(heights / density.max(), 1.0)
        ax.stairs(base + 0.85 * heights, edges, baseline=base, fill=True, color=f"C{i}", alpha=0.6)
        ax.plot(grid[1:], base + 0.85 * density / density.max(), "k", lw=1)
        ax.text(1.8, base + 0.3, name, ha="right")
    ax.set(yticks=[], xlabel="θ", xlim=(0.0, 1.8), title="Posteriors of θ; black: the exact one")
    fig.savefig(out, dpi=150)
    plt.close(fig)
    return exact, draws


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-samples", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="posterior_routes.png")
    main(**vars(parser.parse_args()))
