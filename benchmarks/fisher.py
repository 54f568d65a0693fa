# SPDX-License-Identifier: Apache-2.0
"""Estimates of the Fisher divergence against the truth, after the VaGES paper.

The model is a GRBM with d visible and d hidden units and standard deviation one, its other
parameters drawn from N(0, perturbation²); the data are 20,000 draws of N(0, I), 16,000 to train on,
2,000 to choose the critic and 2,000 to report on. The truth is half the mean square of the
difference of the exact scores, on the same test rows' law.

    python benchmarks/fisher.py --dimension 200 --perturbation 0.4
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax

import numpyro_ebm as ebm
from numpyro_ebm.models import grbm


def guide(data=None, *, num_visible, num_hidden):
    A = numpyro.param("A", jnp.zeros((num_visible, num_hidden)))
    d = numpyro.param("d", jnp.zeros(num_hidden))
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        numpyro.sample("h", dist.Bernoulli(logits=v @ A + d).to_event(1))


def problem(dimension, perturbation, seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    normal = jax.random.normal
    params = {
        "W": perturbation * normal(keys[0], (dimension, dimension)),
        "b": perturbation * normal(keys[1], (dimension,)),
        "c": perturbation * normal(keys[2], (dimension,)),
        "scale": jnp.ones(dimension),
    }
    data = normal(keys[3], (20_000, dimension))
    difference = params["b"] + jax.nn.sigmoid(params["c"] + data @ params["W"]) @ params["W"].T
    return params, data, 0.5 * jnp.mean(jnp.sum(difference**2, -1))


def estimate(dimension, perturbation, seed, num_steps, residual, learning_rate, guide_rate):
    params, data, truth = problem(dimension, perturbation, seed)
    start = time.perf_counter()
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    found = ebm.fisher_divergence(
        jax.random.key(seed + 1),
        ebm.fixed(grbm, params),
        data,
        guide=guide,
        marginal=ebm.VaGES(2),
        residual=residual,
        optim=optax.adam(schedule),
        guide_optim=optax.adam(optax.cosine_decay_schedule(guide_rate, 5 * num_steps)),
        num_steps=num_steps,
        num_visible=dimension,
        num_hidden=dimension,
        progress_bar=False,
    )
    seconds = time.perf_counter() - start
    print(
        f"d = {dimension}, perturbation {perturbation:g}, {'residual' if residual else 'plain'} "
        f"critic: truth {truth:.4g}, estimate {found.value:.4g} ± {found.standard_error:.2g} "
        f"({found.value / truth:.1%} of it), {num_steps:,} steps (critic of step "
        f"{found.num_steps:,}), {seconds:.0f} s",
        flush=True,
    )
    return found, truth


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dimension", type=int, nargs="+", default=[20, 50, 200])
    parser.add_argument("--perturbation", type=float, nargs="+", default=[0.0, 0.2, 0.4])
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--num-steps", type=int, default=10_000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--guide-learning-rate", type=float, default=2e-3)
    parser.add_argument("--plain", action="store_true", help="the critic of the paper")
    arguments = parser.parse_args()
    for dimension in arguments.dimension:
        for perturbation in arguments.perturbation:
            estimate(
                dimension,
                perturbation,
                arguments.seed,
                arguments.num_steps,
                not arguments.plain,
                arguments.learning_rate,
                arguments.guide_learning_rate,
            )
