# SPDX-License-Identifier: Apache-2.0
"""Rows with a normalizer each, in every way to write them: right by all that can, else refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer.util import log_density
from scipy.special import logsumexp

import numpyro_ebm as ebm

ROWS, KEY = 12, jax.random.key(0)
rng = np.random.default_rng(0)
EFFECTS, GROUP = np.array([1.0, -2.0, 0.5]), np.repeat(np.arange(3), 4)
OF_ROW = EFFECTS[GROUP]
TABLE = np.stack([EFFECTS, rng.normal(size=3)], 1)
DATA = rng.integers(0, 3, size=(ROWS, 2))
REAL = rng.normal(size=ROWS)
STATES = np.array(list(itertools.product(range(3), repeat=2)))

# The effect of every row: from the parameter a (3,), the indices i of the plate and an argument x.
WAYS = {
    "an argument": (lambda a, i, x: x, OF_ROW),
    "an argument, rows last": (lambda a, i, x: x[0], np.stack([OF_ROW, -OF_ROW])),
    "a table by the plate's index": (lambda a, i, x: x[i // 4, 0], TABLE),
    "a closed-over array": (lambda a, i, x: jnp.asarray(OF_ROW), None),
    "a closed-over array, reshaped": (
        lambda a, i, x: jnp.asarray(np.repeat(OF_ROW, 2)).reshape(ROWS, 2)[:, 1],
        None,
    ),
    "groups in a closure": (lambda a, i, x: a[GROUP], None),
    "groups as an argument": (lambda a, i, x: a[x], GROUP),
    "the plate's index": (lambda a, i, x: a[i // 4], None),
    "repeat": (lambda a, i, x: jnp.repeat(a, 4), None),
    "one hot": (lambda a, i, x: jax.nn.one_hot(GROUP, 3) @ a, None),
    "concatenate": (lambda a, i, x: jnp.concatenate([jnp.full(4, a[k]) for k in range(3)]), None),
}


def model_of(way, states=3):
    """E = -r (s₀ - s₁ + s₀²) - 0.7 s₀ s₁ for discrete rows; (1 + r²) v²/2 for real ones."""

    def model(data, x=None):
        a = numpyro.sample("a", dist.Normal(0, 1).expand([3]).to_event(1))
        with numpyro.plate("data", len(data)) as i:
            r = way(a, i, x)
            if states:
                s = numpyro.sample("s", ebm.Counting(states, (2,)), obs=data)
                quadratic = r * (s[:, 0] - s[:, 1] + s[:, 0] ** 2) + 0.7 * s[:, 0] * s[:, 1]
                ebm.energy("E", -quadratic)
            else:
                v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
                ebm.energy("E", 0.5 * (1 + r**2) * v**2)

    return model


def minus_energy(r, s):
    return r * (s[..., 0] - s[..., 1] + s[..., 0] ** 2) + 0.7 * s[..., 0] * s[..., 1]


LOG_Z = np.array([logsumexp(minus_energy(r, STATES)) for r in OF_ROW])
LOG_LIKELIHOOD = minus_energy(OF_ROW, DATA) - LOG_Z
PARAMS = {"a": jnp.asarray(EFFECTS)}


def arguments(name, data=DATA):
    x = WAYS[name][1]
    return (jnp.asarray(data),) if x is None else (jnp.asarray(data), jnp.asarray(x))


def neighbours(r, s):
    """Log-ratios to the states with one coordinate changed."""
    for i, value in itertools.product(range(2), range(3)):
        if value != s[i]:
            other = s.copy()
            other[i] = value
            yield i, minus_energy(r, other) - minus_energy(r, s)


def pseudo_likelihood():
    total = 0.0
    for r, s in zip(OF_ROW, DATA, strict=True):
        for i in range(2):
            total += np.log1p(sum(np.exp(x) for k, x in neighbours(r, s) if k == i))
    return total / ROWS


def probability_flow():
    pairs = zip(OF_ROW, DATA, strict=True)
    return sum(np.exp(x / 2) for r, s in pairs for _, x in neighbours(r, s)) / ROWS


@pytest.mark.parametrize("name", WAYS)
def test_every_row_has_its_own_normalizer(name):
    model, args = model_of(WAYS[name][0]), arguments(name)

    def loss(objective):
        return objective.loss(KEY, PARAMS, model, None, *args)

    np.testing.assert_allclose(loss(ebm.MaximumLikelihood()), -LOG_LIKELIHOOD.mean(), rtol=1e-5)
    np.testing.assert_allclose(loss(ebm.PseudoLikelihood()), pseudo_likelihood(), rtol=1e-5)
    np.testing.assert_allclose(loss(ebm.MinimumProbabilityFlow()), probability_flow(), rtol=1e-5)
    fixed = ebm.fixed(model, PARAMS)
    np.testing.assert_allclose(ebm.log_normalizer(KEY, fixed, *args).value, LOG_Z, rtol=1e-5)
    np.testing.assert_allclose(ebm.log_likelihood(KEY, fixed, *args), LOG_LIKELIHOOD, rtol=1e-4)
    value, _ = log_density(ebm.normalized(model, "enumerate"), args, {}, PARAMS)
    prior = float(dist.Normal(0, 1).log_prob(EFFECTS).sum())
    np.testing.assert_allclose(value, LOG_LIKELIHOOD.sum() + prior, rtol=1e-5)
    value, _ = log_density(
        ebm.normalized(model_of(WAYS[name][0], 0), "quadrature"),
        (jnp.asarray(REAL), *args[1:]),
        {},
        PARAMS,
    )
    right = dist.Normal(0, 1 / np.sqrt(1 + OF_ROW**2)).log_prob(REAL).sum() + prior
    np.testing.assert_allclose(value, right, rtol=1e-4)


# Who takes rows as draws of one density.
NEED_ONE = {
    "NCE": lambda m, args: ebm.NCE(dist.Normal(0, 1)).loss(
        KEY, {**PARAMS, "log_normalizer": 0.0}, m, None, *args
    ),
    "KernelSteinDiscrepancy": lambda m, args: ebm.KernelSteinDiscrepancy().loss(
        KEY, PARAMS, m, None, *args
    ),
    "FisherDivergence": lambda m, args: ebm.EnergySVI(
        m, None, optax.adam(0.1), ebm.FisherDivergence()
    ).run(KEY, 1, *args, progress_bar=False),
    "ContrastiveDivergence": lambda m, args: ebm.EnergySVI(
        m,
        None,
        optax.adam(0.1),
        ebm.ContrastiveDivergence(ebm.BlockGibbs, persistent=True, num_chains=5),
    ).run(KEY, 1, *args, progress_bar=False),
    "stein_test": lambda m, args: ebm.stein_test(KEY, ebm.fixed(m, PARAMS), *args),
    "fisher_divergence": lambda m, args: ebm.fisher_divergence(
        KEY,
        ebm.fixed(m, PARAMS),
        args[0],
        **dict(zip("x", args[1:], strict=False)),
        progress_bar=False,
    ),
    "log_likelihood": lambda m, args: ebm.log_likelihood(
        KEY, ebm.fixed(m, PARAMS), *args, log_normalizer=1.0
    ),
    "emulate_log_normalizer": lambda m, args: ebm.emulate_log_normalizer(KEY, m, *args, design=4),
    "normalized": lambda m, args: log_density(
        ebm.normalized(m, lambda params: jnp.zeros(())), args, {}, PARAMS
    ),
    "energy_gap": lambda m, args: ebm.energy_gap(
        KEY, ebm.fixed(m, PARAMS), args[0], jnp.zeros((50,)), *args[1:]
    ),
}


@pytest.mark.parametrize("way", ["an argument", "a closed-over array", "groups in a closure"])
@pytest.mark.parametrize("name", NEED_ONE)
def test_who_needs_one_density_says_so(name, way):
    model = model_of(WAYS[way][0], states=0)
    with pytest.raises(ebm.ModelError, match=f"{name}.*what differs from row to row"):
        NEED_ONE[name](model, arguments(way, REAL))
