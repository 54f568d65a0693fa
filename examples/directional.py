# SPDX-License-Identifier: Apache-2.0
"""Two angles that go together: a bivariate von Mises law on the torus.

    p(φ, ψ) ∝ exp(κ₁ cos(φ - μ₁) + κ₂ cos(ψ - μ₂) + λ sin(φ - μ₁) sin(ψ - μ₂))

(the sine model of Singh, Hnizdo and Demchuk, 2002). Angles are numbers in (-π, π) here, and the
means are put near the cut, where an average of angles goes wrong. The rows are drawn from known
parameters by NumPyro's own implementation of that law.

    python examples/directional.py --num-rows 2000 --out directional.png
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.distributions import constraints

import numpyro_ebm as ebm

ANGLES = constraints.independent(constraints.interval(-np.pi, np.pi), 1)
TRUTH = {"mu": (2.9, -2.6), "kappa": (4.0, 2.5), "lam": 2.0}


def torus(data=None):
    # Means as directions in the plane, so that no cut stands in the optimiser's way.
    c = numpyro.param("c", jnp.array([[-1.0, 0.1], [-1.0, 0.1]]))
    mu = numpyro.deterministic("mu", jnp.arctan2(c[:, 1], c[:, 0]))
    kappa = numpyro.param("kappa", jnp.ones(2), constraint=constraints.positive)
    lam = numpyro.param("lam", 0.0)
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((2,), support=ANGLES), obs=data)
        cos, sin = jnp.cos(v - mu), jnp.sin(v - mu)
        ebm.energy("E", -cos @ kappa - lam * sin[..., 0] * sin[..., 1])


OBJECTIVES = {
    "maximum likelihood": ebm.MaximumLikelihood,
    "conditional NCE": lambda: ebm.ConditionalNCE(1.0, noise_ratio=10),
    "score matching": ebm.ScoreMatching,
}


def main(num_rows=2_000, num_steps=600, seed=0, out="directional.png"):
    (m1, m2), (k1, k2) = TRUTH["mu"], TRUTH["kappa"]
    law = dist.SineBivariateVonMises(m1, m2, k1, k2, TRUTH["lam"])
    data = law.sample(jax.random.key(seed), (num_rows,))
    data = (data + np.pi) % (2 * np.pi) - np.pi
    mean = np.asarray(data).mean(0)
    print(f"{'':22}{'μ₁':>8}{'μ₂':>8}{'κ₁':>8}{'κ₂':>8}{'λ':>8}")
    print(f"{'truth':22}{m1:8.2f}{m2:8.2f}{k1:8.2f}{k2:8.2f}{TRUTH['lam']:8.2f}")
    print(f"{'plain average':22}{mean[0]:8.2f}{mean[1]:8.2f}")
    found, params = {}, {}
    for name, make in OBJECTIVES.items():
        optim = optax.adam(optax.cosine_decay_schedule(0.1, num_steps))
        svi = ebm.EnergySVI(torus, None, optim, make())
        params[name] = p = svi.run(jax.random.key(1), num_steps, data, progress_bar=False).params
        mu = np.arctan2(p["c"][:, 1], p["c"][:, 0])
        found[name] = np.array([*mu, *p["kappa"], p["lam"]])
        print(f"{name:22}" + "".join(f"{x:8.2f}" for x in found[name]))
    draw(out, data, params)
    return found


def draw(out, data, params):
    fig, axes = plt.subplots(1, 3, figsize=(11, 4.1), layout="constrained")
    axes[0].plot(*np.asarray(data).T, ".", ms=2)
    axes[0].plot(*np.asarray(data).mean(0), "kx", ms=10, label="plain average")
    axes[0].plot(*TRUTH["mu"], "k+", ms=12, label="true mean")
    axes[0].legend(fontsize=8)
    axes[0].set(title="rows")
    edge = 3.14
    for ax, name in zip(axes[1:], ("maximum likelihood", "conditional NCE"), strict=True):
        model = ebm.fixed(torus, params[name])
        ebm.plots.density(model, xlim=(-edge, edge), ylim=(-edge, edge), colorbar=False, ax=ax)
        ax.set(title=name)
    for ax in axes:
        ax.set(xlim=(-edge, edge), ylim=(-edge, edge), aspect="equal", xlabel="φ", ylabel="ψ")
    fig.savefig(out, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-rows", type=int, default=2_000)
    parser.add_argument("--num-steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="directional.png")
    main(**vars(parser.parse_args()))
