# SPDX-License-Identifier: Apache-2.0
"""A graph of non-negative quantities: a Gaussian graphical model cut off at zero.

    p(v) ∝ exp(-½ vᵀ Λ v + bᵀ v),  v ≥ 0

The orthant makes log Z(Λ) an integral nobody has, in any dimension above a few. In logarithmic
coordinates (NumPyro's `biject_to`, its log-Jacobian included) score matching is quadratic in Λ, and
with normal priors its generalised posterior is Gaussian in closed form.

    python examples/nonnegative_graph.py --num-rows 2000 --out nonnegative_graph.png
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS

import numpyro_ebm as ebm

SIZE = 6
ROWS, COLUMNS = np.triu_indices(SIZE, 1)
EDGES = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (0, 5)]  # a ring


def graph(data=None, *, num_rows=1):
    diagonal = numpyro.sample("diagonal", dist.Normal(2.0, 1.0).expand([SIZE]).to_event(1))
    pairs = numpyro.sample("pairs", dist.Normal(0.0, 1.0).expand([len(ROWS)]).to_event(1))
    positive = constraints.independent(constraints.positive, 1)
    with numpyro.plate("data", num_rows if data is None else len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(SIZE,), support=positive), obs=data)
        own = 0.5 * jnp.sum(diagonal * v**2, -1) - jnp.sum(v, -1)
        ebm.energy("E", own + jnp.sum(pairs * v[..., ROWS] * v[..., COLUMNS], -1))


def exact_rows(rng_key, params, num_rows):
    """Draws of the Gaussian that fall into the orthant."""
    pairs = jnp.zeros((SIZE, SIZE)).at[ROWS, COLUMNS].set(params["pairs"])
    precision = jnp.diag(params["diagonal"]) + pairs + pairs.T
    mean = jnp.linalg.solve(precision, jnp.ones(SIZE))
    gaussian = dist.MultivariateNormal(mean, precision_matrix=precision)
    draws = gaussian.sample(rng_key, (20 * num_rows,))
    return draws[jnp.all(draws > 0, -1)][:num_rows]


def main(num_rows=2_000, num_samples=2_000, seed=0, out="nonnegative_graph.png"):
    key_data, key_run = jax.random.split(jax.random.key(seed))
    pairs = np.array([-0.6 if pair in EDGES else 0.0 for pair in zip(ROWS, COLUMNS, strict=True)])
    truth = {"diagonal": jnp.full(SIZE, 2.0), "pairs": jnp.asarray(pairs)}
    data = exact_rows(key_data, truth, num_rows)

    model = ebm.generalized(graph, ebm.ScoreMatching(), "calibrate")
    model.calibrate(data)
    exact = model.closed_form(data)
    mcmc = MCMC(NUTS(model), num_warmup=500, num_samples=num_samples, progress_bar=False)
    mcmc.run(key_run, data)
    draws = {name: np.asarray(x) for name, x in mcmc.get_samples().items()}
    gap = np.abs(draws["pairs"].mean(0) - exact.mean["pairs"]) / exact.standard_deviation["pairs"]
    print(f"learning rate {model.learning_rate:.3f}")
    print(f"NUTS and the closed form: means within {gap.max():.2f} posterior deviations")
    error = np.abs(exact.mean["pairs"] - pairs) / exact.standard_deviation["pairs"]
    print(f"pairs whose 90% interval holds the truth: {np.sum(error < 1.645)} of {len(pairs)}")

    fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = [f"{i}-{j}" for i, j in zip(ROWS, COLUMNS, strict=True)]
    at = np.arange(len(names))
    widths = {
        "90% of the generalised posterior": (np.asarray(exact.standard_deviation["pairs"]), 2),
        "90% by the sandwich, one by one": (model.calibration.standard_error[SIZE:], 1),
    }
    for i, (name, (deviation, width)) in enumerate(widths.items()):
        style = dict(fmt="o", ms=4, lw=width, color=f"C{i}", label=name)
        axes[0].errorbar(at + 0.25 * i, exact.mean["pairs"], yerr=1.645 * deviation, **style)
    axes[0].plot(at, pairs, "k_", ms=12, label="truth")
    axes[0].set_xticks(at, names, fontsize=7)
    axes[0].set(xlabel="pair", ylabel="Λ of the pair", title="Edges of a ring of six")
    below = dict(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    axes[0].legend(ncols=3, **below)
    axes[1].plot(data[:, 0], data[:, 1], ".", ms=2, label="along an edge, 0-1")
    axes[1].plot(data[:, 0], data[:, 3], ".", ms=2, label="no edge, 0-3")
    axes[1].set(xlabel="v₀", title="Rows")
    axes[1].legend(ncols=2, markerscale=4, **below)
    fig.savefig(out, dpi=150)
    plt.close(fig)
    return truth, exact, draws


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-rows", type=int, default=2_000)
    parser.add_argument("--num-samples", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="nonnegative_graph.png")
    main(**vars(parser.parse_args()))
