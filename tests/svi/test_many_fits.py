# SPDX-License-Identifier: Apache-2.0
"""Numbers of objectives and kernels may be traced: many fits at once are each of them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

import numpyro_ebm as ebm

DATA = np.random.default_rng(3).normal(0.4, 0.8, (24, 2)).astype(np.float32)


def model(data):
    precision = numpyro.param("precision", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(event_shape=(2,)), obs=data)
        ebm.energy("E", 0.5 * precision * jnp.sum((v - 0.4) ** 2, -1))


def chains(kernel, **options):
    def make(step_size):
        return ebm.ContrastiveDivergence(lambda m: kernel(m, step_size=step_size), 2, **options)

    return make


OBJECTIVES = {
    "DSM": ebm.DenoisingScoreMatching,
    "levels": lambda x: ebm.MultiscaleDenoisingScoreMatching(
        x, min_noise_scale=0.5 * x, max_noise_scale=2.0 * x
    ),
    "CNCE": ebm.ConditionalNCE,
    "KRM": ebm.KernelRatioMatching,
    "ED": ebm.EnergyDiscrepancy,
    "recovery": lambda x: ebm.RecoveryLikelihood(0.5, num_steps=2, step_size=x),
    "KSD": lambda x: ebm.KernelSteinDiscrepancy(bandwidth=x),
    "NCE": lambda x: ebm.NCE(dist.Normal(jnp.zeros(2), x).to_event(1)),
    "CD, ULA": chains(ebm.ULA),
    "PCD, MALA": chains(ebm.MALA, persistent=True),
    "weighted sum": lambda x: x * ebm.ScoreMatching() + ebm.SlicedScoreMatching(),
}


def fit(objective, rng_key, number, rate):
    optim = optax.inject_hyperparams(optax.adam)(rate)
    svi = ebm.EnergySVI(model, None, optim, OBJECTIVES[objective](number))
    state = svi.init(rng_key, DATA)
    state, losses = jax.lax.scan(lambda s, _: svi.update(s, DATA), state, length=3)
    return svi.get_params(state)["precision"], losses


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x != "DSM")) for x in OBJECTIVES]
)
def test_many_fits_at_once_are_each_of_them(name):
    keys, rates = jax.random.split(jax.random.key(1)), jnp.array([0.05, 0.1])
    numbers = jnp.array([0.3, 0.6])
    at_once = jax.jit(jax.vmap(lambda *x: fit(name, *x)))(keys, numbers, rates)
    for i in range(2):
        alone = jax.jit(lambda key, rate, x=numbers[i]: fit(name, key, float(x), rate))
        for x, y in zip(at_once, alone(keys[i], rates[i]), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=2e-4, atol=2e-5)


def test_numbers_that_decide_what_is_computed_are_refused_where_they_are_traced():
    for make in (
        lambda x: ebm.ContrastiveDivergence(ebm.MALA, persistent=True, reset_probability=x),
        lambda x: ebm.ContrastiveDivergence(ebm.MALA, energy_penalty=x),
        lambda x: ebm.ContrastiveDivergence(ebm.MALA, kl_weight=x, kl_step_size=0.1),
        lambda x: ebm.EnergyDiscrepancy(1.0, x),
        lambda x: ebm.VaGES(x),
    ):
        with pytest.raises(ebm.ModelError, match="decides what is|must be an? [pi]"):
            jax.vmap(lambda x, make=make: bool(make(x)))(jnp.array([1, 2]))
