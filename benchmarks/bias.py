# SPDX-License-Identifier: Apache-2.0
"""The bias of VaES and VaGES against the divergence of the guide from the posterior.

A GRBM with two visible and four hidden units; the guide has the logits of the exact posterior plus
delta times standard normal noise. Expectations over the particles are sums over all pairs of the 16
hidden states, so that there is no Monte Carlo error. The paper bounds both biases by a constant
times the square root of KL(q || p(h | v)).

    python benchmarks/bias.py
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm.marginals.vages import cumulant_surrogate

STATES = ((jnp.arange(16)[:, None] >> jnp.arange(4)) & 1).astype(float)


def log_joint(theta, v):
    """log p̃(v, h) at all hidden states, (16,)."""
    field = STATES @ theta["c"] + STATES @ (theta["W"].T @ v)
    return field - 0.5 * jnp.sum(((v - theta["b"]) / theta["scale"]) ** 2)


def expected_surrogate(theta, v, log_q):
    """The mean over pairs of particles of the surrogate of the library; q held constant."""
    values = log_joint(theta, v)
    pairs = jnp.stack([jnp.repeat(values, 16), jnp.tile(values, 16)])
    weights = jnp.exp(jnp.repeat(log_q, 16) + jnp.tile(log_q, 16))
    return jnp.sum(weights * cumulant_surrogate(pairs, order=2))


def measure(delta, seed, num_rows):
    keys = jax.random.split(jax.random.key(seed), 5)
    theta = {
        "W": jax.random.normal(keys[0], (2, 4)),
        "b": 0.3 * jax.random.normal(keys[1], (2,)),
        "c": 0.5 * jax.random.normal(keys[2], (4,)),
        "scale": jnp.ones(2),
    }
    rows = 1.5 * jax.random.normal(keys[3], (num_rows, 2))
    noise = delta * jax.random.normal(keys[4], (num_rows, 4))

    def one(v, noise):
        logits = theta["c"] + v @ theta["W"] + noise
        log_q = jnp.sum(STATES * logits - jax.nn.softplus(logits), -1)
        log_p = jax.nn.log_softmax(log_joint(theta, v))
        score = jax.grad(expected_surrogate, 1)
        exact_score = jax.grad(lambda theta, v: jax.nn.logsumexp(log_joint(theta, v)), 1)
        difference = score(theta, v, log_q) - exact_score(theta, v)
        gradient = jax.jacrev(score)(theta, v, log_q)
        exact_gradient = jax.jacrev(exact_score)(theta, v)
        squares = jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2), gradient, exact_gradient)
        return (
            jnp.sum(jnp.exp(log_q) * (log_q - log_p)),
            jnp.sqrt(jnp.sum(difference**2)),
            jnp.sqrt(sum(jax.tree.leaves(squares))),
        )

    return jax.tree.map(lambda x: float(jnp.mean(x)), jax.jit(jax.vmap(one))(rows, noise))


def main(out, num_rows=400):
    deltas = np.geomspace(0.01, 0.5, 12)
    with jax.enable_x64(True):
        found = np.array([measure(delta, 0, num_rows) for delta in deltas])
    divergence, value, gradient = found.T
    slopes = [np.polyfit(np.log(divergence), np.log(bias), 1)[0] for bias in (value, gradient)]
    print("delta   KL        bias of VaES  bias of VaGES")
    for delta, row in zip(deltas, found, strict=True):
        print(f"{delta:.3f}  {row[0]:.2e}  {row[1]:.2e}      {row[2]:.2e}")
    print(f"slopes on log-log axes: VaES {slopes[0]:.3f}, VaGES {slopes[1]:.3f}")
    if out is None:
        return
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
    axes.loglog(divergence, gradient, "s-", label=f"VaGES, slope {slopes[1]:.2f}")
    axes.loglog(divergence, value, "o-", label=f"VaES, slope {slopes[0]:.2f}")
    reference = 3 * np.sqrt(divergence)
    axes.loglog(divergence, reference, ":", color="0.5", label=r"$\propto\sqrt{\mathrm{KL}}$")
    axes.set_xlabel("mean KL(q ‖ p(h | v)), nats")
    axes.set_ylabel("mean norm of the bias")
    axes.legend(frameon=False)
    plt.savefig(out, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help="where to draw the picture")
    main(parser.parse_args().out)
