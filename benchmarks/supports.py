# SPDX-License-Identifier: Apache-2.0
r"""Draws with every default, for every support, kernel and number of rows, beside closed forms.

    python benchmarks/supports.py                  # 12 supports x 4 kernels x 3 numbers of rows
    python benchmarks/supports.py --kernels MALA --rows 50 --supports ordered_vector

One line a run: the mean of a statistic over what ``ebm.sample`` returns, its right value, and the
difference in standard errors, z. A row of a chain is one independent unit: the errors are those of
the means of the units. ``--json`` writes the figures.
"""

import argparse
import json
import math
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.distributions import constraints

import numpyro_ebm as ebm

NUM_CHAINS = 100


class Support(NamedTuple):
    """A base measure and an energy on it, a statistic of a row, and its mean in closed form."""

    constraint: constraints.Constraint
    event_shape: tuple[int, ...]
    energy: object  # of a value (..., *event_shape) -> (...)
    statistic: object
    expected: float


def total(function):
    return lambda v: jnp.sum(function(v), -1)


def mean(function):
    return lambda v: jnp.mean(function(v), -1)


def each(constraint, energy, expected, function=lambda v: v):
    """Two independent coordinates of a support of scalars."""
    return Support(constraint, (2,), total(energy), mean(function), expected)


SUPPORTS = {
    "real": each(
        constraints.real,
        lambda v: 5 * v**4,
        5**-0.5 * math.gamma(0.75) / math.gamma(0.25),
        lambda v: v**2,
    ),
    "real_vector": Support(
        constraints.real_vector,
        (3,),
        lambda v: jnp.sum(v[..., :2] ** 2, -1) + v[..., 2] + jnp.exp(-v[..., 2]),
        lambda v: v[..., 2],
        float(np.euler_gamma),
    ),
    "positive": each(constraints.positive, lambda v: 2 * v, 0.5),
    "softplus_positive": each(constraints.softplus_positive, lambda v: 2 * v, 0.5),
    "greater_than": each(constraints.greater_than(3.0), lambda v: 2 * (v - 3), 3.5),
    "less_than": each(
        constraints.less_than(-1.0), lambda v: 0.5 * (v + 1) ** 2, -1 - (2 / math.pi) ** 0.5
    ),
    "unit_interval": each(
        constraints.unit_interval, lambda v: -jnp.log(v) - 2 * jnp.log1p(-v), 0.4
    ),
    "interval": each(constraints.interval(-1.0, 2.0), lambda v: v, -3 / math.expm1(3)),
    "ordered_vector": Support(
        constraints.ordered_vector,
        (2,),
        lambda v: 0.5 * jnp.sum(v**2, -1),
        lambda v: v[..., 1] - v[..., 0],
        2 / math.pi**0.5,
    ),
    "positive_ordered_vector": Support(
        constraints.positive_ordered_vector, (2,), total(lambda v: v), lambda v: v[..., 0], 0.5
    ),
    "simplex": Support(
        constraints.simplex,
        (3,),
        lambda v: -jnp.log(v) @ jnp.array([1.0, 2.0, 3.0]),
        lambda v: v[..., 0],
        2 / 9,
    ),
    "lower_cholesky": Support(
        constraints.lower_cholesky,
        (2, 2),
        lambda v: 2 * v[..., 0, 0] + 0.5 * v[..., 1, 0] ** 2 + 0.5 * v[..., 1, 1] ** 2,
        lambda v: v[..., 0, 0],
        0.5,
    ),
}
KERNELS = {
    "MALA": ebm.MALA,
    "UnderdampedLangevin": ebm.UnderdampedLangevin,
    "MCLMC": ebm.MCLMC,
    "ReplicaExchange": ebm.ReplicaExchange,
}
ROWS = (1, 50, 400)


def model_of(support, num_rows):
    def model():
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", ebm.Lebesgue(support.event_shape, support=support.constraint))
            ebm.energy("E", support.energy(v))

    return ebm.fixed(model, {})


def measure(support, kernel, num_rows, seed=0, num_samples=1_000):
    """The mean, its standard error over rows of chains, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draws = ebm.sample(
            jax.random.key(seed), model_of(support, num_rows), num_samples, kernel=kernel
        )
    values = np.asarray(support.statistic(draws["v"]), float)
    units = values.reshape(NUM_CHAINS, -1, num_rows).mean(1).ravel()
    said = [str(x.message) for x in caught if issubclass(x.category, ebm.ConvergenceWarning)]
    return units.mean(), units.std() / len(units) ** 0.5, said


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--supports", nargs="+", choices=SUPPORTS, default=list(SUPPORTS))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    figures, missed = [], 0
    for name in options.supports:
        support = SUPPORTS[name]
        for kernel in options.kernels:
            for rows in options.rows:
                start = time.perf_counter()
                found, error, said = measure(support, KERNELS[kernel], rows, options.seed)
                z = (found - support.expected) / error
                missed += abs(z) >= 4 and not said
                print(
                    f"{name:24s} {kernel:20s} {rows:4d} rows: {found:8.4f} for "
                    f"{support.expected:8.4f}, z {z:6.2f}{', warned' * bool(said)} "
                    f"({time.perf_counter() - start:.0f} s)",
                    flush=True,
                )
                figures.append([name, kernel, rows, found, error, float(z), said])
    print(f"{len(figures)} runs; silent with |z| of 4 or more: {missed}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
