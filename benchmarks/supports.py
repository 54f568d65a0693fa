# SPDX-License-Identifier: Apache-2.0
r"""Draws with every default, for every support, kernel and number of rows, beside closed forms.

    python benchmarks/supports.py                  # 12 supports x 4 kernels x 3 numbers of rows
    python benchmarks/supports.py --kernels MALA --rows 50 --supports ordered_vector
    python benchmarks/supports.py --starved --rows 50   # steps and warm-ups that are wrong

One line a run: the mean of a statistic over what ``ebm.sample`` returns, its right value, and the
difference in standard errors, z. A row of a chain is one independent unit: the errors are those of
the means of the units. ``--json`` adds a line of figures to a file after every run, with what
``ConvergenceWarning`` looked at, and leaves out the runs that are in it; ``--table`` prints the
file as a table instead.
"""

import argparse
import itertools
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
from numpyro_ebm.mcmc import sampling

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


def held(step_size):
    """MALA of a step size that stays, after a short warm-up, and options of ``sample``."""
    return lambda model: ebm.MALA(model, step_size, adapt_step_size=False), {"num_warmup": 100}


STEPS = (0.001, 0.005, 0.02, 0.05, 1.0, 2.0, 5.0, 50.0)
STARVED = {f"step {step:g}": held(step) for step in STEPS} | {
    f"warm-up {num}": (ebm.MALA, {"num_warmup": num}) for num in (10, 20, 40)
}
"""What :class:`~numpyro_ebm.ConvergenceWarning` is to find; not all of them are wrong."""


def model_of(support, num_rows):
    def model():
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", ebm.Lebesgue(support.event_shape, support=support.constraint))
            ebm.energy("E", support.energy(v))

    return ebm.fixed(model, {})


def measure(support, kernel, num_rows, seed=0, num_samples=1_000, **options):
    """The mean, its standard error over rows of chains, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draws = ebm.sample(
            jax.random.key(seed), model_of(support, num_rows), num_samples, kernel=kernel, **options
        )
    values = np.asarray(support.statistic(draws["v"]), float)
    units = values.reshape(NUM_CHAINS, -1, num_rows).mean(1).ravel()
    said = [str(x.message) for x in caught if issubclass(x.category, ebm.ConvergenceWarning)]
    return units.mean(), units.std() / len(units) ** 0.5, said


def looked_at(*args, **options):
    """As :func:`measure`, and the worst figures of a row that a warning is made of."""
    found, assess = [], sampling.assess_draws

    def watched(*args):
        found.append(assess(*args))
        return found[-1]

    sampling.assess_draws = watched
    try:
        *values, said = measure(*args, **options)
    finally:
        sampling.assess_draws = assess
    (look,) = found
    return {
        "mean": float(values[0]),
        "error": float(values[1]),
        "said": said,
        "r_hat": float(look.r_hat.max()),
        "frozen": float(look.frozen.max() / look.num_chains),
        "acceptance": None if look.acceptance is None else float(look.acceptance.min()),
        "not_finite": int(look.not_finite.sum()),
    }


def read(path):
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
    cells = [json.loads(line) for line in lines]
    return {(x["support"], x["kernel"], x["rows"]): x for x in cells}


def print_table(cells):
    rows = sorted({key[2] for key in cells})
    print("| support | " + " | ".join(KERNELS) + " |")
    print("|---" * (1 + len(KERNELS)) + "|")
    for name in SUPPORTS:
        entries = []
        for kernel in KERNELS:
            here = [cells.get((name, kernel, n)) for n in rows]
            entries.append(", ".join("—" if x is None else verdict(x) for x in here))
        print(f"| `{name}` | " + " | ".join(entries) + " |")


def verdict(cell):
    return f"{cell['z']:.1f}" + " (warned)" * bool(cell["said"])


def main():
    parser = argparse.ArgumentParser(description="Draws with every default")
    parser.add_argument("--supports", nargs="+", choices=SUPPORTS, default=list(SUPPORTS))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--starved", action="store_true", help="runs that may be wrong instead")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file of figures, one line a run")
    parser.add_argument("--table", action="store_true", help="print the file as a table")
    options = parser.parse_args()
    done = read(options.json) if options.json else {}
    if options.table:
        print_table(done)
        return
    missed = 0
    kernels = list(STARVED) if options.starved else options.kernels
    for rows, kernel, name in itertools.product(options.rows, kernels, options.supports):
        cell = done.get((name, kernel, rows))
        if cell is None:
            cell = run_cell(name, kernel, rows, options.seed)
            if options.json:
                with open(options.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps(cell) + "\n")
        missed += abs(cell["z"]) >= 4 and not cell["said"]
    print(f"silent with |z| of 4 or more: {missed}")


def run_cell(name, kernel, rows, seed):
    start, support = time.perf_counter(), SUPPORTS[name]
    jax.clear_caches()
    move, settings = STARVED[kernel] if kernel in STARVED else (KERNELS[kernel], {})
    figures = looked_at(support, move, rows, seed, **settings)
    z = (figures["mean"] - support.expected) / figures["error"]
    seconds = time.perf_counter() - start
    print(
        f"{name:24s} {kernel:20s} {rows:4d} rows: {figures['mean']:8.4f} for "
        f"{support.expected:8.4f}, z {z:6.2f}{', warned' * bool(figures['said'])} "
        f"({seconds:.0f} s)",
        flush=True,
    )
    cell = {"support": name, "kernel": kernel, "rows": rows, "seed": seed, "z": float(z)}
    return {**cell, **figures, "seconds": round(seconds)}


if __name__ == "__main__":
    main()
