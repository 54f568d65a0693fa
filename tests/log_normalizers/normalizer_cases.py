# SPDX-License-Identifier: Apache-2.0
"""What the tests of log_normalizers share."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro

import numpyro_ebm as ebm

KEY = jax.random.key(0)
CRITICAL = 0.5 * math.log(1 + math.sqrt(2))


def model_of(energy, base, num_rows=1):
    """A fixed model of one visible site."""

    def model(data=None):
        with numpyro.plate("data", num_rows if data is None else len(data)):
            v = numpyro.sample("v", base, obs=data)
            ebm.energy("E", energy(v))

    return ebm.fixed(model, {})


def ising(data=None, *, size=4):
    beta = numpyro.param("beta", 0.0)
    with numpyro.plate("data", 1 if data is None else len(data)):
        x = numpyro.sample("x", ebm.Counting(2, (size, size)), obs=data)
        s = 2.0 * x - 1
        pairs = s * jnp.roll(s, 1, -1) + s * jnp.roll(s, 1, -2)
        ebm.energy("E", -beta * jnp.sum(pairs, (-1, -2)))


def assert_covers(result, truth, num_errors=3.0):
    z = (np.asarray(result[0]) - truth) / np.asarray(result[1])
    assert np.all(np.abs(z) < num_errors), f"off by {z} standard errors: {result[:2]}, not {truth}"


def kaufman(size, beta):
    """log Z of the Ising model on a square torus (Kaufman 1949)."""
    coth = 1 / np.tanh(2 * beta)
    gamma = np.arccosh(np.cosh(2 * beta) * coth - np.cos(np.pi * np.arange(2 * size) / size))
    gamma[0] = 2 * beta + np.log(np.tanh(beta))
    x = 0.5 * size * gamma
    odd, even = x[1::2], x[0::2]
    # Products of 2 cosh and 2 sinh, as signs and logarithms.
    terms = [
        (1.0, np.sum(np.logaddexp(odd, -odd))),
        (1.0, np.sum(np.log(2 * np.sinh(odd)))),
        (1.0, np.sum(np.logaddexp(even, -even))),
        (np.sign(even[0]), np.sum(np.log(np.abs(2 * np.sinh(even)) + 1e-300))),
    ]
    top = max(log for _, log in terms)
    total = sum(sign * np.exp(log - top) for sign, log in terms)
    return 0.5 * size**2 * np.log(2 * np.sinh(2 * beta)) + top + np.log(0.5 * total)
