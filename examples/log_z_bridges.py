# SPDX-License-Identifier: Apache-2.0
"""Bridges to log Z of an Ising lattice at its critical point, and how fine they have to be.

Annealed importance sampling and tempered sequential Monte Carlo walk from the uniform law to the
model. Z of a torus is known in closed form (Kaufman, 1949), so that errors can be told from error
bars.

    python examples/log_z_bridges.py --size 8 --out log_z_bridges.png
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro

import numpyro_ebm as ebm

CRITICAL = 0.5 * np.log(1 + 2**0.5)
TEMPERATURES = (5, 20, 80, 320)


def ising(data=None, *, size):
    beta = numpyro.param("beta", CRITICAL)
    with numpyro.plate("data", 1 if data is None else len(data)):
        v = numpyro.sample("v", ebm.Counting(2, (size, size)), obs=data)
        s = 2.0 * v - 1.0
        ebm.energy("E", -beta * jnp.sum(s * (jnp.roll(s, 1, -1) + jnp.roll(s, 1, -2)), (-1, -2)))


def kaufman(beta, n):
    """log Z of the n x n torus."""
    k = np.arange(2 * n)
    cosh = np.cosh(2 * beta) ** 2 / np.sinh(2 * beta) - np.cos(np.pi * k / n)
    gamma = np.arccosh(np.maximum(cosh, 1.0))
    gamma[0] = 2 * beta + np.log(np.tanh(beta))
    odd, even = n * gamma[1::2] / 2, n * gamma[::2] / 2
    signs = np.sign(even)
    terms = [
        np.logaddexp(odd, -odd).sum(),
        (odd + np.log1p(-np.exp(-2 * odd))).sum(),
        np.logaddexp(even, -even).sum(),
        (np.abs(even) + np.log1p(-np.exp(-2 * np.abs(even)))).sum() if signs.all() else -np.inf,
    ]
    top = max(terms)
    total = np.exp(np.array(terms) - top) @ np.array([1.0, 1.0, 1.0, np.prod(signs)])
    return n * n / 2 * np.log(2 * np.sinh(2 * beta)) - np.log(2) + top + np.log(total)


def main(size=8, temperatures=TEMPERATURES, num_repeats=4, seed=0, out="log_z_bridges.png"):
    model = ebm.fixed(ising, {"beta": CRITICAL})
    exact = kaufman(CRITICAL, size)
    print(f"exact (Kaufman) {exact:.4f}")
    keys = jax.random.split(jax.random.key(seed), num_repeats)

    def repeats(**options):
        one = jax.jit(lambda key: ebm.log_normalizer(key, model, size=size, **options)[:2])
        value, mcse = zip(*map(one, keys), strict=True)
        return np.asarray(value), np.asarray(mcse)

    runs = {
        f"AIS, {n} temperatures": repeats(method="ais", num_particles=256, num_temperatures=n)
        for n in temperatures
    }
    runs["SMC"] = repeats(method="smc", num_particles=64)
    found = {}
    for name, (value, mcse) in runs.items():
        found[name] = z = (value - exact) / mcse
        print(
            f"{name:24} error {np.mean(value - exact):8.3f}, reported {np.mean(mcse):.3f}, "
            f"largest |z| {np.abs(z).max():.1f}"
        )
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, (value, mcse) in enumerate(runs.values()):
        at = i + np.linspace(-0.2, 0.2, num_repeats)
        ax.errorbar(at, value - exact, 2 * mcse, fmt="o", ms=4, capsize=3)
    ax.axhline(0, color="k", lw=1)
    ax.set_xticks(range(len(runs)), [name.replace(", ", "\n") for name in runs])
    ax.set(ylabel="estimate − exact, nats", title=f"log Z of Ising {size} × {size}, ± 2 mcse")
    fig.savefig(out, dpi=120)
    plt.close(fig)
    return exact, found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="log_z_bridges.png")
    main(**vars(parser.parse_args()))
