# SPDX-License-Identifier: Apache-2.0
"""Do intervals of generalised posteriors cover? 300 data sets of each of five models.

    python benchmarks/coverage.py --num-data-sets 300 --cases bits lattice

Every data set has an exact posterior, a generalised one at β = 1 and at two calibrated rates, and
the last one's draws adjusted. Posteriors are Gaussian approximations at their modes, so that a case
takes a minute on one core; what is measured is what a calibration does to widths.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from numpyro.distributions import constraints

import numpyro_ebm as ebm
from numpyro_ebm.posteriors.sandwich import sandwich_map

LEVELS = (0.5, 0.8, 0.95)
PRIOR_SCALE = 3.0
NUM_GROUPS = 200
NUM_DRAWS = 2_000
STEP = 1e-5
SIZES = np.array([1.0, 0.5, 0.25, 0.1, 0.03])


class Case(NamedTuple):
    """A model with normal priors N(0, PRIOR_SCALE²), and data sets drawn from its truth.

    - **model, objective** - of the generalised posterior.
    - **truth** - the parameters by name.
    - **data** - data sets, (sets, rows, ...).
    - **log_likelihood** - ``(params, data) -> scalar``, the exact one.
    - **simulate** - ``(rng_key, params, num) -> data``, (num, sets, rows, ...), by parameters of
      every set; J comes from it if it is not ``None``.
    - **counted** - names of the parameters that are counted.
    """

    model: Callable[..., Any]
    objective: Any
    truth: dict
    data: jax.Array
    log_likelihood: Callable[..., jax.Array]
    simulate: Callable[..., jax.Array] | None = None
    counted: tuple = ()


def normal(name, size):
    return numpyro.sample(name, dist.Normal(0.0, PRIOR_SCALE).expand([size]).to_event(1))


def bits(rng_key, num_sets, num_rows=355):
    """Pseudo-likelihood of six bits: 21 parameters."""
    rows, columns = np.triu_indices(6, 1)
    states = jnp.array(list(itertools.product([0, 1], repeat=6)))

    def energy(params, v):
        return -v @ params["field"] - (v[..., rows] * v[..., columns]) @ params["pairs"]

    def model(data):
        params = {"field": normal("field", 6), "pairs": normal("pairs", 15)}
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Counting(2, event_shape=(6,)), obs=data)
            ebm.energy("E", energy(params, v))

    def log_likelihood(params, data):
        log_z = jax.nn.logsumexp(-energy(params, states))
        return -jnp.sum(energy(params, data)) - len(data) * log_z

    pairs = 0.5 + 0.5 * jnp.sin(2.0 * jnp.arange(15)) + jnp.where(columns - rows == 1, 0.7, 0.0)
    truth = {"field": -1.5 - 0.3 * jnp.arange(6) / 5, "pairs": pairs}
    drawn = jax.random.categorical(rng_key, -energy(truth, states), shape=(num_sets, num_rows))
    return Case(
        model, ebm.PseudoLikelihood(), truth, states[drawn], log_likelihood, counted=("pairs",)
    )


def gaussian(rng_key, num_sets, num_rows=200):
    """Score matching of a Gaussian in three dimensions: nine parameters."""
    rows, columns = np.triu_indices(3, 1)

    def precision(params):
        pairs = jnp.zeros((3, 3)).at[rows, columns].set(params["pairs"])
        return jnp.diag(params["diagonal"]) + pairs + pairs.T

    def energy(params, v):
        own = 0.5 * v**2 @ params["diagonal"] - v @ params["linear"]
        return own + (v[..., rows] * v[..., columns]) @ params["pairs"]

    def model(data):
        params = {name: normal(name, 3) for name in ("diagonal", "linear", "pairs")}
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(event_shape=(3,)), obs=data)
            ebm.energy("E", energy(params, v))

    def log_likelihood(params, data):
        of_rows = precision(params)
        mean = jnp.linalg.solve(of_rows, params["linear"])
        return jnp.sum(dist.MultivariateNormal(mean, precision_matrix=of_rows).log_prob(data))

    truth = {
        "diagonal": jnp.array([1.0, 2.0, 1.5]),
        "linear": jnp.array([0.5, -0.5, 0.0]),
        "pairs": jnp.array([0.5, -0.4, 0.3]),
    }
    of_rows = precision(truth)
    law = dist.MultivariateNormal(
        jnp.linalg.solve(of_rows, truth["linear"]), precision_matrix=of_rows
    )
    return Case(
        model, ebm.ScoreMatching(), truth, law.sample(rng_key, (num_sets, num_rows)), log_likelihood
    )


def truncated(rng_key, num_sets, num_rows=400):
    """Score matching of a Gaussian graphical model cut off at zero: six parameters."""
    rows, columns = np.triu_indices(3, 1)
    positive = constraints.independent(constraints.positive, 1)

    def energy(params, v):
        own = 0.5 * v**2 @ params["diagonal"] - jnp.sum(v, -1)
        return own + (v[..., rows] * v[..., columns]) @ params["pairs"]

    def model(data):
        params = {name: normal(name, 3) for name in ("diagonal", "pairs")}
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(event_shape=(3,), support=positive), obs=data)
            ebm.energy("E", energy(params, v))

    nodes, weights = np.polynomial.legendre.leggauss(24)
    nodes, log_weights = 2.75 * (nodes + 1), np.log(2.75 * weights)
    grid = jnp.array(list(itertools.product(nodes, repeat=3)))
    log_weight = jnp.array(list(itertools.product(log_weights, repeat=3))).sum(1)

    def log_likelihood(params, data):
        log_z = jax.nn.logsumexp(log_weight - energy(params, grid))
        return -jnp.sum(energy(params, data)) - len(data) * log_z

    truth = {"diagonal": jnp.full(3, 2.0), "pairs": jnp.array([-0.6, 0.0, -0.6])}
    of_rows = np.diag(truth["diagonal"])
    of_rows[rows, columns] = of_rows[columns, rows] = truth["pairs"]
    law = dist.MultivariateNormal(np.linalg.solve(of_rows, np.ones(3)), precision_matrix=of_rows)
    draws = law.sample(rng_key, (4 * num_sets * num_rows,))
    inside = draws[jnp.all(draws > 0, -1)][: num_sets * num_rows]
    data = inside.reshape(num_sets, num_rows, 3)
    return Case(model, ebm.ScoreMatching(), truth, data, log_likelihood)


def outliers(rng_key, num_sets, num_rows=150, share=0.1):
    """Robust KSD of a Gaussian, 10% of whose rows are elsewhere: two parameters.

    The exact posterior is that of the same model, which takes the outliers for its own.
    """

    def model(data):
        theta = normal("theta", 2)
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            ebm.energy("E", 0.5 * theta[1] * v**2 - theta[0] * v)

    def log_likelihood(params, data):
        linear, precision = params["theta"]
        law = dist.Normal(linear / precision, precision**-0.5)
        return jnp.sum(law.log_prob(data))

    objective = ebm.KernelSteinDiscrepancy(
        kernel="imq", bandwidth=1.0, weight=lambda v: 1 / (1 + v[:, 0] ** 2) ** 2
    )
    key_rows, key_who = jax.random.split(rng_key)
    rows = jax.random.normal(key_rows, (num_sets, num_rows))
    is_out = jax.random.uniform(key_who, rows.shape) < share
    truth = {"theta": jnp.array([0.0, 1.0])}
    return Case(model, objective, truth, jnp.where(is_out, 8.0 + rows, rows), log_likelihood)


def lattice(rng_key, num_sets, size=12):
    """Pseudo-likelihood of one 12 x 12 Ising lattice: two parameters, J by simulation."""

    def statistics(v):
        s = 2.0 * v - 1.0
        bonds = jnp.sum(s[..., 1:, :] * s[..., :-1, :], (-1, -2))
        return bonds + jnp.sum(s[..., 1:] * s[..., :-1], (-1, -2)), jnp.sum(s, (-1, -2))

    def model(data=None, theta=None, num_rows=1):
        theta = normal("theta", 2) if theta is None else theta
        with numpyro.plate("data", num_rows if data is None else len(data)):
            v = numpyro.sample("v", ebm.Counting(2, event_shape=(size, size)), obs=data)
            bonds, total = statistics(v)
            ebm.energy("E", -theta[..., 0] * bonds - theta[..., 1] * total)

    states = jnp.array(list(itertools.product([-1.0, 1.0], repeat=size)))

    def log_normalizer(theta):
        coupling, field = theta
        own = coupling * jnp.sum(states[:, 1:] * states[:, :-1], 1) + field * jnp.sum(states, 1)

        def add_spin(log_weight, _):
            """Every spin of the row before meets the one below it, and goes to the end."""
            part = log_weight.reshape(2, -1)
            met = jnp.logaddexp(part + coupling, part[::-1] - coupling)
            return met.T.reshape(-1), None

        def add_row(log_weight, _):
            return jax.lax.scan(add_spin, log_weight, None, length=size)[0] + own, None

        return jax.nn.logsumexp(jax.lax.scan(add_row, own, None, length=size - 1)[0])

    log_z = interpolated(log_normalizer, np.array([0.2, 0.1]), np.array([0.3, 0.4]))

    def log_likelihood(params, data):
        bonds, total = statistics(data)
        coupling, field = params["theta"]
        return coupling * bonds[0] + field * total[0] - log_z(params["theta"])

    def simulate(rng_key, params, num):
        """Lattices of all sets as the rows of one model, each at parameters of its own."""
        of_rows = partial(model, theta=params["theta"], num_rows=len(params["theta"]))
        draws = ebm.sample(rng_key, ebm.fixed(of_rows, {}), num, num_warmup=100, thinning=10)
        return draws["v"][:, :, None]

    truth = {"theta": jnp.array([0.2, 0.1])}
    data = simulate(rng_key, {"theta": jnp.broadcast_to(truth["theta"], (num_sets, 2))}, 1)[0]
    return Case(model, ebm.PseudoLikelihood(), truth, data, log_likelihood, simulate)


def interpolated(fn, center, width, degree=20):
    """A function of two parameters by Chebyshev polynomials; NaN outside of center ± width."""
    nodes = np.polynomial.chebyshev.chebpts1(degree + 1)
    x = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
    values = jax.jit(lambda at: jax.lax.map(fn, at, batch_size=8))(jnp.asarray(center + width * x))
    design = np.polynomial.chebyshev.chebvander2d(*x.T, [degree, degree])
    weights = jnp.asarray(np.linalg.solve(design, np.asarray(values))).reshape(degree + 1, -1)
    order = jnp.arange(degree + 1)

    def at(theta):
        a, b = jnp.cos(order * jnp.arccos((theta - center) / width)[:, None])
        return a @ weights @ b

    return at


CASES = {f.__name__: f for f in (bits, gaussian, truncated, outliers, lattice)}


class Estimates(NamedTuple):
    """Of every data set: the minimiser, the Hessian there, the covariance of a row's gradient."""

    point: np.ndarray
    hessian: np.ndarray
    score_covariance: np.ndarray
    found: np.ndarray


def minimize(loss, start, num_steps=12):
    """Newton's method with differences of gradients; whether it came to rest."""
    gradient, eye = jax.grad(loss), jnp.eye(len(start))

    def hessian(x):
        return jax.vmap(lambda e: (gradient(x + STEP * e) - gradient(x - STEP * e)) / (2 * STEP))(
            eye
        )

    def step(x, _):
        move = jnp.linalg.solve(hessian(x), gradient(x))
        losses = jax.vmap(lambda size: loss(x - size * move))(SIZES)
        best = jnp.asarray(SIZES)[jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))]
        return x - best * move, jnp.max(jnp.abs(move))

    x, moves = jax.lax.scan(step, start, None, length=num_steps)
    return x, hessian(x), moves[-1] < 0.01


def estimate(case, loss, start):
    """The loss of every data set, and its sandwich."""
    num_rows = case.data.shape[1]
    size = max(1, num_rows // NUM_GROUPS)
    rest = jnp.arange(num_rows - size)

    def covariance(x, data):
        def without(first):
            kept = data[jnp.where(rest < first, rest, rest + size)]
            return jax.grad(loss)(x, kept)

        starts = jnp.arange(num_rows // size) * size
        means = jax.lax.map(without, starts, batch_size=16)
        return (num_rows - size) ** 2 / size * jnp.cov(means.T)

    def one(data):
        x, hessian, found = minimize(lambda x: loss(x, data), start)
        return x, hessian, jnp.eye(len(x)) if case.simulate else covariance(x, data), found

    found = Estimates(*map(np.array, jax.jit(lambda d: jax.lax.map(one, d))(case.data)))
    if case.simulate is None:
        return found
    unravel = ravel_pytree(case.truth)[1]
    params = jax.vmap(unravel)(jnp.asarray(found.point))
    drawn = jnp.swapaxes(case.simulate(jax.random.key(9), params, NUM_GROUPS), 0, 1)

    def of_set(at):
        x, data = at
        return jnp.cov(jax.lax.map(lambda one: jax.grad(loss)(x, one), data).T)

    simulated = jax.jit(lambda at: jax.lax.map(of_set, at))((jnp.asarray(found.point), drawn))
    return found._replace(score_covariance=np.array(simulated))


def intervals(case, num_rows, start):
    """Centres and draws of the posteriors of every data set, by name of the route."""
    model = ebm.generalized(case.model, case.objective)
    unravel, key = ravel_pytree(case.truth)[1], jax.random.key(0)
    found = estimate(case, lambda x, data: model.loss(key, unravel(x), data), start)

    def most_likely(data):
        return minimize(lambda x: -case.log_likelihood(unravel(x), data) / num_rows, start)

    exact = jax.jit(lambda data: jax.lax.map(most_likely, data))(case.data)
    kept = np.flatnonzero(found.found & np.asarray(exact[2]))
    rng, routes = np.random.default_rng(0), {}
    for i in kept:
        x, H, J = found.point[i], found.hessian[i], found.score_covariance[i]
        noise = rng.standard_normal((NUM_DRAWS, len(x)))
        closest = len(x) / np.trace(np.linalg.solve(H, J))
        trace = np.trace(H @ np.linalg.solve(J, H)) / np.trace(H)
        at = partial(posterior, noise, num_rows)
        raw = at(x, H, closest)
        prior = -x / PRIOR_SCALE**2, np.eye(len(x)) / PRIOR_SCALE**2
        move = sandwich_map(H, J, num_rows, closest, *prior)
        for name, draws in {
            "exact": at(np.asarray(exact[0][i]), np.asarray(exact[1][i]), 1.0),
            "β = 1": at(x, H, 1.0),
            "β by traces": at(x, H, trace),
            "raw": raw,
            "adjusted": x + move(raw - x),
        }.items():
            routes.setdefault(name, []).append(draws)
    return {name: np.stack(draws) for name, draws in routes.items()}


def posterior(noise, num_rows, x, hessian, learning_rate):
    """Draws of the Gaussian with the loss's curvature and the prior's."""
    precision = learning_rate * num_rows * hessian + np.eye(len(x)) / PRIOR_SCALE**2
    mean = x - np.linalg.solve(precision, x / PRIOR_SCALE**2)
    return mean + noise @ np.linalg.cholesky(np.linalg.inv(precision)).T


def coverage(name, rng_key, num_sets):
    """Coverage by route and level, mean deviation by route, and how many data sets counted."""
    case = CASES[name](rng_key, num_sets)
    truth, unravel = ravel_pytree(case.truth)
    counted = ravel_pytree(
        {k: jnp.full_like(x, not case.counted or k in case.counted) for k, x in case.truth.items()}
    )[0]
    counted, truth = np.asarray(counted) > 0, np.asarray(truth)
    found = intervals(case, case.data.shape[1], jnp.asarray(truth))
    table, num = {}, 0
    for route, draws in found.items():
        num = len(draws)
        lower, upper = (
            np.quantile(draws[..., counted], [(1 + sign * level) / 2 for level in LEVELS], axis=1)
            for sign in (-1, 1)
        )
        inside = (lower < truth[counted]) & (truth[counted] < upper)  # (levels, sets, parameters)
        error = inside.mean(2).std(1) / np.sqrt(inside.shape[1])
        table[route] = inside.mean((1, 2)), error, draws[..., counted].std(1).mean()
    return table, num


def main(num_data_sets=300, cases=tuple(CASES), seed=0):
    jax.config.update("jax_enable_x64", True)
    results = {}
    print("| model | posterior | 50% | 80% | 95% | mean sd |\n|---|---|---|---|---|---|")
    for name in cases:
        begin = time.perf_counter()
        results[name], num = coverage(name, jax.random.key(seed), num_data_sets)
        for route, (share, error, deviation) in results[name].items():
            shown = (f"{a:.3f} ± {b:.3f}" for a, b in zip(share, error, strict=True))
            print(f"| {name} | {route} | {' | '.join(shown)} | {deviation:.3f} |", flush=True)
        print(f"    {num} data sets, {time.perf_counter() - begin:.0f} s", flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-data-sets", type=int, default=300)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
