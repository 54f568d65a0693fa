# SPDX-License-Identifier: Apache-2.0
"""Two layers of latents under real rows: the gradient of the likelihood in closed form.

A deep Boltzmann machine whose rows are real: v is a mixture of Gaussians, one for every state of
both layers, and log Z a sum over these. And two real layers z2 -> z1 -> x under an energy of z2:
all of it is Gaussian. Each estimate of the gradient at fixed parameters is a mean over rounds.
"""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.nn import logsumexp, sigmoid
from numpyro.handlers import block

import numpyro_ebm as ebm

G, H = (np.array(list(itertools.product([0, 1], repeat=n))) for n in (3, 2))
NOISE, BETWEEN, ALONG = 0.5, 0.6, np.array([1.0, -0.5])

# A deep Boltzmann machine of four real and of three and two binary units.


def units():
    rng = np.random.default_rng(3)
    shapes = {"W": (4, 3), "U": (3, 2), "b": (4,), "c": (3,), "d": (2,)}
    return {k: jnp.asarray(0.6 * rng.normal(size=shape)) for k, shape in shapes.items()}


def parameters():
    return {k: numpyro.param(k, x) for k, x in units().items()}


def machine(v):
    p = parameters()
    with numpyro.plate("data", len(v)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(4,)), obs=v)
        g = numpyro.sample("g", ebm.Counting(event_shape=(3,)))
        h = numpyro.sample("h", ebm.Counting(event_shape=(2,)))
        below = jnp.sum(v @ p["W"] * g, -1) + jnp.sum(g @ p["U"] * h, -1)
        ebm.energy("E", 0.5 * jnp.sum(v**2, -1) - below - v @ p["b"] - g @ p["c"] - h @ p["d"])


def mean_field(v):
    """The fixed point of the machine's own mean field, which is not its posterior."""
    p = parameters()
    with numpyro.plate("data", len(v)):
        v = ebm.visible("v", v)
        h = jnp.full((len(v), 2), 0.5)
        for _ in range(10):
            g = sigmoid(v @ p["W"] + h @ p["U"].T + p["c"])
            h = sigmoid(g @ p["U"] + p["d"])
        numpyro.sample("g", dist.Bernoulli(g).to_event(1))
        numpyro.sample("h", dist.Bernoulli(h).to_event(1))


def likelihood_of_machine(p, v):
    means = G @ p["W"].T + p["b"]  # of v in the states of g
    weights = (G @ p["c"])[:, None] + (G @ p["U"]) @ H.T + H @ p["d"]
    log_p = logsumexp((v @ means.T)[..., None] + weights, (1, 2)) - 0.5 * jnp.sum(v**2, -1)
    log_z = logsumexp(0.5 * jnp.sum(means**2, -1)[:, None] + weights) + 2 * jnp.log(2 * jnp.pi)
    return log_p - log_z


# Two real layers: z2 tilted by an energy, z1 given z2 and x given z1 normalised.


def layers():
    w = jnp.array([[1.0, 0.5], [-0.7, 1.5], [0.4, -2.0]])
    return {"a": jnp.array(-0.4), "b": jnp.array(0.3), "w": w}


def hierarchy(x):
    a, b, w = (numpyro.param(k, v) for k, v in layers().items())
    with numpyro.plate("data", len(x)):
        z2 = numpyro.sample("z2", dist.Normal(0.0, 1.0))
        z1 = numpyro.sample("z1", dist.Normal(z2[..., None] * ALONG, BETWEEN).to_event(1))
        numpyro.sample("x", dist.Normal(z1 @ w.T, NOISE).to_event(1), obs=x)
        ebm.energy("E", 0.5 * a * z2**2 - b * z2)


def posterior(x):
    """Of the hierarchy: a Gaussian, z2 given x and z1 given both."""
    a, b, w = (numpyro.param(k, v) for k, v in layers().items())
    with numpyro.plate("data", len(x)):
        eta = ebm.visible("x", x) @ w / NOISE**2
        precision, cross = jnp.eye(2) / BETWEEN**2 + w.T @ w / NOISE**2, ALONG / BETWEEN**2
        gain = jnp.linalg.solve(precision, cross)
        of_z2 = 1 + a + ALONG @ cross - cross @ gain
        z2 = numpyro.sample("z2", dist.Normal((b + eta @ gain) / of_z2, of_z2**-0.5))
        mean = jnp.linalg.solve(precision, (eta + z2[..., None] * cross)[..., None])[..., 0]
        numpyro.sample("z1", dist.MultivariateNormal(mean, precision_matrix=precision))


def likelihood_of_hierarchy(p, x):
    variance = 1 / (1 + p["a"])
    middle = variance * jnp.outer(ALONG, ALONG) + BETWEEN**2 * jnp.eye(2)
    covariance = p["w"] @ middle @ p["w"].T + NOISE**2 * jnp.eye(3)
    mean = p["w"] @ (ALONG * p["b"] * variance)
    return dist.MultivariateNormal(mean, covariance).log_prob(x)


class Case(NamedTuple):
    model: object
    params: dict
    likelihood: object
    kernel: object
    size: int

    def rows(self, num):
        """Rows that are not the model's: its gradient does not vanish."""
        return 0.5 + 1.5 * jax.random.normal(jax.random.key(8), (num, self.size))


MACHINE = Case(machine, units(), likelihood_of_machine, ebm.BlockGibbs, 4)
HIERARCHY = Case(
    hierarchy,
    layers(),
    likelihood_of_hierarchy,
    lambda model: ebm.MALA(block(model, hide=["x"]), step_size=0.3),
    3,
)
MOVES = partial(ebm.MALA, step_size=0.03)
SWEEPS = ebm.KernelRefinement(ebm.BlockGibbs, 20)
WAYS = {
    "machine, summed": (MACHINE, None, None),
    "machine, particles": (MACHINE, ebm.PersistentParticles(ebm.BlockGibbs, 2), None),
    "machine, mean field and sweeps": (MACHINE, ebm.VaGES(2, refine=SWEEPS), mean_field),
    "hierarchy, summed": (HIERARCHY, None, None),
    "hierarchy, particles": (HIERARCHY, ebm.PersistentParticles(MOVES, 2, num_steps=3), None),
    "hierarchy, posterior": (HIERARCHY, ebm.VaGES(2), posterior),
}
BLOCKS, LENGTH, FORGOTTEN = 40, 30, 8


def listener():
    """An optimiser that moves nothing, and keeps the sums of gradients in blocks of rounds."""

    def init(params):
        return jnp.array(0), jax.tree.map(lambda x: jnp.zeros((BLOCKS, *x.shape)), params)

    def update(gradient, state, params=None):
        count, sums = state
        sums = jax.tree.map(lambda s, g: s.at[count // LENGTH].add(g), sums, gradient)
        return jax.tree.map(jnp.zeros_like, gradient), (count + 1, sums)

    return optax.GradientTransformation(init, update)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_of_two_layers_is_that_of_the_likelihood(way):
    case, marginal, guide = WAYS[way]
    data = case.rows(100)
    exact = jax.grad(lambda p: -jnp.mean(case.likelihood(p, data)))(case.params)
    objective = ebm.ContrastiveDivergence(
        case.kernel, 3, marginal, persistent=True, num_chains=100, history=None
    )
    svi = ebm.EnergySVI(case.model, guide, listener(), objective)
    fit = svi.run(jax.random.key(6), BLOCKS * LENGTH, data, progress_bar=False)
    _, sums = fit.state.optim_state[1][1]
    for name, expected in exact.items():
        blocks = np.asarray(sums[name])[FORGOTTEN:] / LENGTH
        error = blocks.std(0, ddof=1) / len(blocks) ** 0.5
        assert np.all(error < 0.1)
        assert np.all(np.abs(blocks.mean(0) - expected) < 4.5 * error), name


@pytest.mark.parametrize("case", [MACHINE, HIERARCHY], ids=["machine", "hierarchy"])
def test_the_likelihood_of_two_layers_is_the_closed_form(case):
    data, model = case.rows(20), ebm.fixed(case.model, case.params)
    found = ebm.log_likelihood(jax.random.key(6), model, data)
    np.testing.assert_allclose(found, case.likelihood(case.params, data), rtol=1e-4)


@pytest.mark.slow
def test_the_score_matching_gradient_of_two_real_layers_is_the_closed_form():
    """Denoising by VaGES with the posterior, and by the marginal Gaussian."""
    case, sigma = HIERARCHY, 0.5
    data, keys = case.rows(50), jax.random.split(jax.random.key(7), 200)

    def exact(p, key):
        noise = jax.random.normal(key, data.shape)
        score = jax.vmap(jax.grad(lambda x: case.likelihood(p, x)))(data + sigma * noise)
        return 0.5 * jnp.mean(jnp.sum((score + noise / sigma) ** 2, -1))

    objective = ebm.DenoisingScoreMatching(sigma, ebm.VaGES(2))

    def estimated(p, key):
        return objective.loss(key, p, hierarchy, posterior, data)

    both = jax.jit(jax.vmap(jax.grad(estimated), (None, 0)))(case.params, keys)
    truth = jax.jit(jax.vmap(jax.grad(exact), (None, 0)))(case.params, keys)
    for name in case.params:
        found, expected = np.asarray(both[name]), np.asarray(truth[name])
        error = np.sqrt((found.var(0) + expected.var(0)) / len(keys))
        difference = np.abs(found.mean(0) - expected.mean(0))
        assert np.all(difference < 4 * error) and np.all(error < 0.3), name
