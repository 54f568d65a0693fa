# SPDX-License-Identifier: Apache-2.0
"""log Z by every method that applies, against the truth.

A GRBM with 16 hidden units, the Ising model on 4 x 4 and 10 x 10 tori, Gaussian mixtures in two and
ten dimensions, Laplace and Cauchy densities. For each method: the estimate, its standard error, how
many of them it is off by, and the seconds of a first call (compilation included) and of a second.

    python benchmarks/log_normalizer.py
"""

import argparse
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.scipy.special import logsumexp

import numpyro_ebm as ebm

METHODS = ("enumerate", "quadrature", "ais", "smc")


def ising(size):
    def model(beta):
        with numpyro.plate("data", 1):
            x = numpyro.sample("x", ebm.Counting(2, (size, size)))
            s = 2.0 * x - 1.0
            neighbours = jnp.roll(s, 1, -1) + jnp.roll(s, 1, -2)
            ebm.energy("E", -beta * jnp.sum(s * neighbours, (-1, -2)))

    return ebm.fixed(model, {})


def of_energy(energy, size):
    def model():
        with numpyro.plate("data", 1):
            v = numpyro.sample("v", ebm.Lebesgue((size,)))
            ebm.energy("E", energy(v))

    return ebm.fixed(model, {})


def mixture(size, spread, scales, seed=0):
    """A normalised mixture with equal weights."""
    rng = np.random.default_rng(seed)
    centers = jnp.asarray(spread * rng.normal(size=(len(scales), size)), float)
    scales = jnp.asarray(scales)
    constant = 0.5 * size * math.log(2 * math.pi) + math.log(len(scales))

    def energy(v):
        square = jnp.sum(((v[:, None] - centers) / scales[:, None]) ** 2, -1)
        return constant - logsumexp(-0.5 * square - size * jnp.log(scales), -1)

    return of_energy(energy, size)


def grbm(num_visible=20, num_hidden=16, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "W": 0.3 * rng.normal(size=(num_visible, num_hidden)),
        "b": rng.normal(size=num_visible),
        "c": rng.normal(size=num_hidden),
        "scale": np.exp(0.2 * rng.normal(size=num_visible)),
    }
    states = (np.arange(2**num_hidden)[:, None] >> np.arange(num_hidden)) & 1
    shift = states @ params["W"].T
    terms = states @ params["c"] + shift @ params["b"]
    terms += 0.5 * np.sum((shift * params["scale"]) ** 2, -1)
    truth = 0.5 * num_visible * np.log(2 * np.pi) + np.log(params["scale"]).sum()
    params = {name: jnp.asarray(x, float) for name, x in params.items()}
    kwargs = {"num_visible": num_visible, "num_hidden": num_hidden}
    return ebm.fixed(ebm.models.grbm, params), kwargs, truth + np.logaddexp.reduce(terms)


def problems():
    model, kwargs, truth = grbm()
    critical = 0.5 * math.log(1 + math.sqrt(2))
    return {
        "GRBM, 20 + 16 units": (model, kwargs, truth),
        "Ising 4 x 4, critical": (ising(4), {"beta": critical}, 15.521916),
        "Ising 10 x 10, beta 0.1": (ising(10), {"beta": 0.1}, 70.3231),
        "Ising 10 x 10, beta 0.25": (ising(10), {"beta": 0.25}, 75.9110),
        "Ising 10 x 10, critical": (ising(10), {"beta": critical}, 93.6103),
        "mixture, 2-D, 8 modes": (mixture(2, 4.0, [0.5] * 8), {}, 0.0),
        "mixture, 10-D, 4 modes": (mixture(10, 2.0, [1.0] * 4), {}, 0.0),
        "Laplace, 5-D": (of_energy(lambda v: jnp.sum(jnp.abs(v), -1), 5), {}, 5 * math.log(2)),
        "Cauchy, 3-D": (
            of_energy(lambda v: jnp.sum(jnp.log1p(v**2), -1), 3),
            {},
            3 * math.log(math.pi),
        ),
    }


def main(methods, pattern):
    print(
        f"{'problem':26s} {'method':11s} {'value':>10s} {'mcse':>9s} {'z':>6s} {'s':>6s} {'s':>6s}"
    )
    for name, (model, kwargs, truth) in problems().items():
        if pattern not in name:
            continue
        for method in methods:
            seconds, found = [], None

            def run(key, model=model, kwargs=kwargs, method=method):
                return ebm.log_normalizer(key, model, method=method, **kwargs)[:2]

            try:
                run = jax.jit(run)
                for key in jax.random.split(jax.random.key(0)):
                    start = time.perf_counter()
                    found = [float(x) for x in run(key)]
                    seconds.append(time.perf_counter() - start)
            except ebm.ModelError:
                continue  # the method does not apply
            value, mcse = found
            z = (value - truth) / mcse if mcse else math.nan
            print(
                f"{name:26s} {method:11s} {value:10.5f} {mcse:9.2g} {z:6.2f} "
                f"{seconds[0]:6.1f} {seconds[1]:6.2f}",
                flush=True,
            )
        print(f"{name:26s} {'truth':11s} {truth:10.5f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--problem", default="", help="part of the name of a problem")
    arguments = parser.parse_args()
    main(arguments.methods, arguments.problem)
