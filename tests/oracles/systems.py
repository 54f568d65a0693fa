# SPDX-License-Identifier: Apache-2.0
"""Models with closed forms, with latents of every kind and without."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.nn import sigmoid, softplus
from numpyro.distributions import constraints

import numpyro_ebm as ebm


class System(NamedTuple):
    """A model with everything known about it in closed form.

    - **model, guide** - as a user writes them; the guide is the exact posterior at ``params``.
    - **params** - numpy parameter values.
    - **data** - numpy data, the model's argument.
    - **log_density, score, trace** - of one row in unconstrained coordinates ``(params, u)``:
      log p̃ up to a constant free of u (``log_density`` itself: exactly), ∇_u log p̃, and the trace
      of its Hessian.
    - **unconstrain** - v -> u.
    """

    model: Callable
    guide: Callable | None
    params: dict
    data: np.ndarray
    log_density: Callable
    score: Callable
    trace: Callable
    unconstrain: Callable = lambda v: v


def count_rows(data):
    return 1 if data is None else len(data)


# Gaussian: no latents.

GAUSSIAN = {
    "mean": np.array([0.3, -0.5]),
    "precision": np.array([[1.5, 0.4], [0.4, 0.8]]),
}


def gaussian(data=None):
    mean = numpyro.param("mean", jnp.zeros(2))
    precision = numpyro.param("precision", jnp.eye(2))
    with numpyro.plate("data", count_rows(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        x = v - mean
        ebm.energy("E", 0.5 * jnp.sum((x @ precision) * x, -1))


def precision(data):
    """One real coordinate, and how far it spreads."""
    precision = numpyro.param("precision", 1.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * precision * v**2)


def gaussian_score(p, v):
    return -0.5 * (p["precision"] + p["precision"].T) @ (v - p["mean"])


def gaussian_system(num_rows=4, seed=0):
    data = np.random.default_rng(seed).normal(size=(num_rows, 2))
    return System(
        gaussian,
        None,
        GAUSSIAN,
        data,
        lambda p, v: -0.5 * (v - p["mean"]) @ p["precision"] @ (v - p["mean"]),
        gaussian_score,
        lambda p, v: -jnp.trace(p["precision"]),
    )


# Gaussian-Bernoulli RBM: the latents factorise given v.

GRBM = {
    "W": np.array([[1.2, -0.7, 0.5], [-0.4, 0.9, 1.1]]),
    "b": np.array([0.1, -0.2]),
    "c": np.array([-0.3, 0.2, 0.1]),
    "scale": np.array([0.8, 1.2]),
}

grbm = partial(ebm.models.grbm, num_hidden=3)


def grbm_plated(data=None, *, num_hidden=3):
    """The same model with its hidden units in a plate, and their energies inside it."""
    W = numpyro.param("W", jnp.zeros((2, num_hidden)))
    b = numpyro.param("b", jnp.zeros(2))
    c = numpyro.param("c", jnp.zeros(num_hidden))
    scale = numpyro.param("scale", jnp.ones(2), constraint=constraints.positive)
    with numpyro.plate("data", count_rows(data), dim=-1):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        ebm.energy("bowl", 0.5 * jnp.sum(((v - b) / scale) ** 2, -1))
        with numpyro.plate("hidden", num_hidden, dim=-2):
            h = numpyro.sample("h", ebm.Counting())
            ebm.energy("E", -(v @ W + c).T * h)


def grbm_log_density(p, v):
    return jnp.sum(softplus(p["c"] + v @ p["W"])) - 0.5 * jnp.sum(((v - p["b"]) / p["scale"]) ** 2)


def grbm_score(p, v):
    return p["W"] @ sigmoid(p["c"] + v @ p["W"]) - (v - p["b"]) / p["scale"] ** 2


def grbm_trace(p, v):
    m = sigmoid(p["c"] + v @ p["W"])
    return jnp.sum(p["W"] ** 2 @ (m * (1 - m))) - jnp.sum(1 / p["scale"] ** 2)


def grbm_guide(logits_shift=0.0, params=GRBM, hidden_plate=False):
    """Bernoulli guide with the exact posterior logits, moved by ``logits_shift``.

    It has no parameters of its own, and does not follow the model's.
    """
    W, c = params["W"], params["c"] + logits_shift

    def guide(data=None, **kwargs):
        with numpyro.plate("data", len(data), dim=-1):
            v = ebm.visible("v", data)
            logits = v @ W + c
            if not hidden_plate:
                numpyro.sample("h", dist.Bernoulli(logits=logits).to_event(1))
                return
            with numpyro.plate("hidden", W.shape[1], dim=-2):
                numpyro.sample("h", dist.Bernoulli(logits=logits.T))

    return guide


def learned_grbm_guide(data=None, *, num_hidden=3):
    """Bernoulli guide with parameters of its own; exact at A = W, d = c."""
    A = numpyro.param("A", jnp.zeros((2, num_hidden)))
    d = numpyro.param("d", jnp.zeros(num_hidden))
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        numpyro.sample("h", dist.Bernoulli(logits=v @ A + d).to_event(1))


def grbm_system(num_rows=4, seed=0, params=GRBM, model=grbm, hidden_plate=False):
    data = np.random.default_rng(seed).normal(size=(num_rows, 2))
    guide = grbm_guide(params=params, hidden_plate=hidden_plate)
    return System(model, guide, params, data, grbm_log_density, grbm_score, grbm_trace)


def grbm_draws(params, num_rows, rng, num_hidden=None):
    """Exact draws of v from a GRBM: a mixture of 2^H Gaussians."""
    W, b, c, scale = (np.asarray(params[k]) for k in ("W", "b", "c", "scale"))
    states = np.array(list(itertools.product([0, 1], repeat=W.shape[1])))
    shift = states @ W.T
    log_weight = states @ c + shift @ b + 0.5 * np.sum((shift * scale) ** 2, -1)
    weight = np.exp(log_weight - np.logaddexp.reduce(log_weight))
    h = states[rng.choice(len(states), size=num_rows, p=weight)]
    return b + scale**2 * (h @ W.T) + scale * rng.normal(size=(num_rows, len(b)))


# Linear-Gaussian latent model: continuous latents.

LINEAR = {
    "A": np.array([[0.9, -0.4], [0.4, 0.9], [0.5, 0.0]]) @ np.diag([1.0, 0.6]),
    "b": np.array([0.2, -0.1, 0.3]),
    "scale": np.array(0.7),
}
# Orthogonal columns, so that the posterior is a product of Normals.
LINEAR["A"][:, 1] -= LINEAR["A"][:, 0] * (
    LINEAR["A"][:, 0] @ LINEAR["A"][:, 1] / (LINEAR["A"][:, 0] @ LINEAR["A"][:, 0])
)


def linear_gaussian(data=None):
    """h ~ N(0, I), a proper base measure, tilted by the energy of v given h."""
    A = numpyro.param("A", jnp.ones((3, 2)))
    b = numpyro.param("b", jnp.zeros(3))
    scale = numpyro.param("scale", jnp.array(1.0), constraint=constraints.positive)
    with numpyro.plate("data", count_rows(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(3,)), obs=data)
        h = numpyro.sample("h", dist.Normal(0, 1).expand([2]).to_event(1))
        ebm.energy("E", 0.5 * jnp.sum((v - b - h @ A.T) ** 2, -1) / scale**2)


def linear_opaque(data=None):
    """The same density, in operations that do not tell that it is quadratic in h."""
    A = numpyro.param("A", jnp.ones((3, 2)))
    b = numpyro.param("b", jnp.zeros(3))
    scale = numpyro.param("scale", jnp.array(1.0), constraint=constraints.positive)
    with numpyro.plate("data", count_rows(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(3,)), obs=data)
        h = numpyro.sample("h", dist.Normal(0, 1).expand([2]).to_event(1))
        residual = 0.5 * jnp.sum((v - b - h @ A.T) ** 2, -1) / scale**2
        ebm.energy("E", residual + 0.0 * jnp.sum(h**4, -1))


def linear_posterior(p, v):
    """Mean and precision of h given v."""
    precision = jnp.eye(2) + p["A"].T @ p["A"] / p["scale"] ** 2
    return jnp.linalg.solve(precision, p["A"].T @ (v - p["b"])) / p["scale"] ** 2, precision


def linear_log_density(p, v):
    x = v - p["b"]
    mean, precision = linear_posterior(p, v)
    return 0.5 * (
        mean @ precision @ mean - x @ x / p["scale"] ** 2 - jnp.linalg.slogdet(precision)[1]
    )


def linear_precision(p):
    """Precision of v, (A Aᵀ + s² I)⁻¹."""
    return jnp.linalg.inv(p["A"] @ p["A"].T + p["scale"] ** 2 * jnp.eye(3))


def linear_guide(params=LINEAR, noise=1.0, shift=0.0):
    """Reparameterised Normal guide: the exact posterior where ``noise`` is 1 and ``shift`` 0."""
    exact = exact_linear_guide(params)

    def guide(data=None):
        with numpyro.plate("data", len(data)):
            v = ebm.visible("v", data)
            mean = v @ exact["B"].T + exact["d"] + shift
            numpyro.sample("h", dist.Normal(mean, noise * exact["std"]).to_event(1))

    return guide


def learned_linear_guide(data=None):
    """Normal guide with parameters of its own."""
    B = numpyro.param("B", jnp.zeros((2, 3)))
    d = numpyro.param("d", jnp.zeros(2))
    std = numpyro.param("std", jnp.ones(2), constraint=constraints.positive)
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        numpyro.sample("h", dist.Normal(v @ B.T + d, std).to_event(1))


def exact_linear_guide(params=LINEAR):
    """The parameters at which the learned guide is the posterior."""
    precision = np.eye(2) + params["A"].T @ params["A"] / params["scale"] ** 2
    B = np.linalg.solve(precision, params["A"].T) / params["scale"] ** 2
    return {"B": B, "d": -B @ params["b"], "std": 1 / np.sqrt(np.diag(precision))}


def with_learned_guide(system):
    """The system with a guide that has parameters, at the exact posterior."""
    if system.model is linear_gaussian:
        own, guide = exact_linear_guide(system.params), learned_linear_guide
    else:
        own, guide = {"A": system.params["W"], "d": system.params["c"]}, learned_grbm_guide
    return system._replace(guide=guide, params={**system.params, **own})


def linear_system(num_rows=4, seed=0):
    data = np.random.default_rng(seed).normal(size=(num_rows, 3))
    return System(
        linear_gaussian,
        linear_guide(),
        LINEAR,
        data,
        linear_log_density,
        lambda p, v: -linear_precision(p) @ (v - p["b"]),
        lambda p, v: -jnp.trace(linear_precision(p)),
    )


# Supports other than the reals: closed forms in u = T⁻¹(v).


def gamma(data=None):
    a = numpyro.param("a", jnp.array(1.0))
    rate = numpyro.param("rate", jnp.array(1.0))
    with numpyro.plate("data", count_rows(data)):
        v = numpyro.sample("v", ebm.Lebesgue(support=constraints.positive), obs=data)
        ebm.energy("E", rate * v - (a - 1) * jnp.log(v))


def log_normal(data=None):
    mean = numpyro.param("mean", jnp.array(0.0))
    scale = numpyro.param("scale", jnp.array(1.0), constraint=constraints.positive)
    with numpyro.plate("data", count_rows(data)):
        v = numpyro.sample("v", ebm.Lebesgue(support=constraints.positive), obs=data)
        ebm.energy("E", 0.5 * ((jnp.log(v) - mean) / scale) ** 2 + jnp.log(v))


def beta(data=None):
    """Two independent coordinates on the unit interval."""
    a = numpyro.param("a", jnp.ones(2))
    b = numpyro.param("b", jnp.ones(2))
    with numpyro.plate("data", count_rows(data)):
        unit = ebm.Lebesgue(event_shape=(2,), support=constraints.unit_interval)
        v = numpyro.sample("v", unit, obs=data)
        ebm.energy("E", -jnp.sum((a - 1) * jnp.log(v) + (b - 1) * jnp.log1p(-v), -1))


def gamma_system():
    return System(
        gamma,
        None,
        {"a": np.array(2.5), "rate": np.array(1.3)},
        np.random.default_rng(0).gamma(2.0, size=4),
        lambda p, u: p["a"] * u - p["rate"] * jnp.exp(u),
        lambda p, u: p["a"] - p["rate"] * jnp.exp(u),
        lambda p, u: -p["rate"] * jnp.exp(u),
        np.log,
    )


def log_normal_system():
    return System(
        log_normal,
        None,
        {"mean": np.array(0.4), "scale": np.array(0.8)},
        np.random.default_rng(0).lognormal(size=4),
        lambda p, u: -0.5 * ((u - p["mean"]) / p["scale"]) ** 2,
        lambda p, u: -(u - p["mean"]) / p["scale"] ** 2,
        lambda p, u: -1 / p["scale"] ** 2,
        np.log,
    )


def beta_system():
    return System(
        beta,
        None,
        {"a": np.array([2.0, 0.7]), "b": np.array([1.5, 3.0])},
        np.random.default_rng(0).uniform(0.05, 0.95, size=(4, 2)),
        lambda p, u: jnp.sum(-p["a"] * softplus(-u) - p["b"] * softplus(u)),
        lambda p, u: p["a"] * sigmoid(-u) - p["b"] * sigmoid(u),
        lambda p, u: -jnp.sum((p["a"] + p["b"]) * sigmoid(u) * sigmoid(-u)),
        lambda v: np.log(v) - np.log1p(-v),
    )
