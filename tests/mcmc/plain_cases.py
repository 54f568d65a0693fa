# SPDX-License-Identifier: Apache-2.0
"""Ten ordinary NumPyro models, and moments of their posteriors in closed form or by quadrature."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy import stats
from scipy.special import expit, logsumexp

__all__ = ["MODELS", "Plain"]


class Plain(NamedTuple):
    """A model, its arguments, and exact posterior moments of its sites.

    - **exact** - by site: E x and E x², arrays of the shape of the site, or of a part of it that
      ``of`` takes.
    - **step_size** - of ULA.
    """

    model: Any
    args: tuple
    kwargs: dict
    exact: dict
    step_size: float
    of: dict = {}


def moments(mean, variance):
    return np.asarray(mean), np.asarray(variance) + np.asarray(mean) ** 2


def weighted(log_weights, *values):
    """E x and E x² of values on a grid."""
    p = np.exp(log_weights - logsumexp(log_weights))
    return [np.stack([np.sum(p * v**k) for v in values]) for k in (1, 2)]


def normal():
    y, sd = np.array([[0.3, 2.0], [1.1, 1.4], [0.2, 1.9]]), np.array([1.0, 0.5])

    def model(y):
        mu = numpyro.sample("mu", dist.Normal(jnp.zeros(2), 3.0).to_event(1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(mu, sd).to_event(1), obs=y)

    variance = 1 / (1 / 9 + len(y) / sd**2)
    exact = {"mu": moments(variance * y.sum(0) / sd**2, variance)}
    return Plain(model, (y,), {}, exact, 0.02)


def beta_binomial():
    n, y = np.array([5, 10, 20]), np.array([1, 7, 11])

    def model(y):
        with numpyro.plate("groups", 3):
            p = numpyro.sample("p", dist.Beta(2.0, 3.0))
            numpyro.sample("y", dist.Binomial(n, p), obs=y)

    law = stats.beta(2 + y, 3 + n - y)
    return Plain(model, (y,), {}, {"p": moments(law.mean(), law.var())}, 0.05)


def gamma_poisson():
    y, exposure = np.array([0, 3, 9]), np.array([0.5, 1.0, 2.0])

    def model(y, exposure):
        with numpyro.plate("groups", 3):
            rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
            numpyro.sample("y", dist.Poisson(rate * exposure), obs=y)

    law = stats.gamma(2 + y, scale=1 / (1 + exposure))
    return Plain(model, (y, exposure), {}, {"rate": moments(law.mean(), law.var())}, 0.02)


def eight_schools():
    y = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])

    def model(sigma, y=None):
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfNormal(5.0))
        with numpyro.plate("schools", len(sigma)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            theta = numpyro.deterministic("theta", mu + tau * z)
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)

    tau = np.linspace(0, 40, 4001)[1:]  # given tau all else is Gaussian
    variance = sigma**2 + tau[:, None] ** 2
    precision = 1 / 25 + np.sum(1 / variance, 1)
    mean = np.sum(y / variance, 1) / precision
    log_weights = stats.norm.logpdf(tau, 0, 5) + 0.5 * mean**2 * precision
    log_weights -= 0.5 * np.log(precision) + 0.5 * np.sum(np.log(variance) + y**2 / variance, 1)
    p = np.exp(log_weights - logsumexp(log_weights))
    shrink = tau[:, None] ** 2 / variance
    theta = mean[:, None] + shrink * (y - mean[:, None])
    spread = shrink * sigma**2 + (1 - shrink) ** 2 / precision[:, None]
    exact = {
        "mu": (p @ mean, p @ (mean**2 + 1 / precision)),
        "tau": (p @ tau, p @ tau**2),
        "theta": (p @ theta, p @ (theta**2 + spread)),
    }
    return Plain(model, (sigma,), {"y": y}, exact, 0.05)


def logistic():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2))
    y = (rng.random(60) < expit(x @ np.array([1.0, -0.5]))).astype(int)

    def model(x, *, y=None):
        w = numpyro.sample("w", dist.Normal(jnp.zeros(2), 2.0).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    grid = np.linspace(-3, 5, 201)
    w = np.stack(np.meshgrid(grid, grid - 2, indexing="ij"), -1)
    logits = w @ x.T
    log_weights = -0.125 * np.sum(w**2, -1) + np.sum(logits * y - np.logaddexp(0, logits), -1)
    exact = {"w": weighted(log_weights, w[..., 0], w[..., 1])}
    return Plain(model, (x,), {"y": y}, exact, 0.01)


def dirichlet_multinomial():
    y = np.array([3, 0, 9])

    def model(y):
        p = numpyro.sample("p", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
        numpyro.sample("y", dist.Multinomial(12, p), obs=y)

    law = stats.dirichlet(y + np.array([1.0, 2.0, 3.0]))
    return Plain(model, (y,), {}, {"p": moments(law.mean(), law.var())}, 0.03)


def correlation():
    y = np.random.default_rng(1).multivariate_normal([0.5, 0.0], [[1, 0.7], [0.7, 1]], 20)

    def model(y):
        mu = numpyro.sample("mu", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        chol = numpyro.sample("chol", dist.LKJCholesky(2, 1.5))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.MultivariateNormal(mu, scale_tril=chol), obs=y)

    r = np.linspace(-1, 1, 4003)[1:-1]  # given r, mu is Gaussian
    log_weights, means, squares = [], [], []
    for rho in r:
        precision = np.linalg.inv([[1, rho], [rho, 1]])
        posterior = np.linalg.inv(np.eye(2) + len(y) * precision)
        mean = posterior @ precision @ y.sum(0)
        quadratic = np.sum((y @ precision) * y) - mean @ np.linalg.solve(posterior, mean)
        log_weights.append(
            0.5 * np.log(1 - rho**2)  # LKJ with a concentration of 1.5
            + 0.5 * (len(y) * np.log(np.linalg.det(precision)) + np.log(np.linalg.det(posterior)))
            - 0.5 * quadratic
        )
        means.append(mean)
        squares.append(mean**2 + np.diag(posterior))
    p = np.exp(log_weights - logsumexp(log_weights))
    exact = {"mu": (p @ np.array(means), p @ np.array(squares)), "chol": (p @ r, p @ r**2)}
    return Plain(model, (y,), {}, exact, 0.005, {"chol": lambda x: x[..., 1, 0]})


def by_group():
    rng = np.random.default_rng(2)
    group = np.repeat(np.arange(4), [1, 3, 6, 10])
    y = np.array([-1.0, 0.0, 0.5, 2.0])[group] + 0.5 * rng.normal(size=20)

    def model(group, y):
        m = numpyro.sample("m", dist.Normal(0.0, 2.0))
        with numpyro.plate("groups", 4):
            a = numpyro.sample("a", dist.Normal(m, 1.0))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(a[group], 0.5), obs=y)

    precision = np.diag([1 / 4 + 4, *(1 + np.bincount(group) / 0.25)])
    precision[0, 1:] = precision[1:, 0] = -1
    covariance = np.linalg.inv(precision)
    mean = covariance @ np.array([0, *(np.bincount(group, y) / 0.25)])
    m, a = moments(mean, np.diag(covariance))[0], moments(mean, np.diag(covariance))[1]
    return Plain(model, (group, y), {}, {"m": (m[0], a[0]), "a": (m[1:], a[1:])}, 0.005)


def regression():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(30, 2))
    y = x @ np.array([1.0, -1.0]) + 0.7 * rng.normal(size=30)

    def model(x, y):
        variance = numpyro.sample("variance", dist.InverseGamma(3.0, 2.0))
        sd = jnp.sqrt(variance)
        w = numpyro.sample("w", dist.Normal(jnp.zeros(2), 2 * sd).to_event(1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(x @ w, sd), obs=y)

    precision = np.eye(2) / 4 + x.T @ x
    mean = np.linalg.solve(precision, x.T @ y)
    law = stats.invgamma(3 + 15, scale=2 + 0.5 * (y @ y - mean @ precision @ mean))
    exact = {
        "variance": moments(law.mean(), law.var()),
        "w": moments(mean, law.mean() * np.diag(np.linalg.inv(precision))),
    }
    return Plain(model, (x, y), {}, exact, 0.002)


def mixture():
    y = np.array([-2.2, -1.6, -1.9, 0.4, 1.0, 1.4, 0.8, 2.1])

    def model(y):
        mu = numpyro.sample("mu", dist.Normal(jnp.array([-1.5, 1.2]), 0.4).to_event(1))
        with numpyro.plate("data", len(y)):
            c = numpyro.sample(
                "c", dist.Categorical(jnp.array([0.4, 0.6])), infer={"enumerate": "parallel"}
            )
            numpyro.sample("y", dist.Normal(mu[c], 0.8), obs=y)

    grid = np.linspace(-4, 4, 201)
    mu = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1)
    parts = np.log([0.4, 0.6]) + stats.norm.logpdf(y[:, None], mu[..., None, :], 0.8)
    log_weights = np.sum(logsumexp(parts, -1), -1)
    log_weights += np.sum(stats.norm.logpdf(mu, [-1.5, 1.2], 0.4), -1)
    exact = {"mu": weighted(log_weights, mu[..., 0], mu[..., 1])}
    return Plain(model, (y,), {}, exact, 0.02)


MODELS = {
    make.__name__: make
    for make in (
        normal,
        beta_binomial,
        gamma_poisson,
        eight_schools,
        logistic,
        dirichlet_multinomial,
        correlation,
        by_group,
        regression,
        mixture,
    )
}
