# SPDX-License-Identifier: Apache-2.0
"""Auxiliary chains that are too short, and those that are not: how often the verdict is right."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from exchange_cases import ising
from numpyro.infer import MCMC

import numpyro_ebm as ebm

NUM_STEPS = 40


def gaussian(data):
    precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((3,)), obs=data)
        ebm.energy("E", 0.5 * precision * jnp.sum(v**2, -1))


def regression(data, x):
    """Nine tenths of the variance are explained: rows look like their data without remembering."""
    slope = numpyro.sample("slope", dist.Normal(0.0, 2.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (v - slope * x) ** 2)


X = jnp.linspace(-3.0, 3.0, 50)
MODELS = {
    "Gaussian": (gaussian, lambda key: (jax.random.normal(key, (50, 3)),)),
    "regression": (regression, lambda key: (2 * X + jax.random.normal(key, (50,)), X)),
    "misfit": (
        regression,
        lambda key: (4 * jnp.sin(5 * X) + 3 * jax.random.normal(key, (50,)), X),
    ),
    "one lattice": (
        ising,
        lambda key: (jax.random.bernoulli(key, 0.5, (1, 5, 5)).astype(int),),
    ),
}


def verdicts(name, auxiliary, num_runs, num_steps=NUM_STEPS, num_draws=300):
    """Judgements of runs on data sets of their own."""
    model, data = MODELS[name]
    kernel = ebm.Exchange(model, auxiliary, num_steps, step_size=0.3)
    kernel.init(jax.random.key(0), 0, None, data(jax.random.key(0)), {})

    def run(key):
        args = data(key)

        def step(state, _):
            state = kernel.sample(state, args, {})
            return state, state.auxiliary

        return jax.lax.scan(step, kernel.init(key, 0, None, args, {}), None, num_draws)[1]

    keys = jax.random.split(jax.random.key(1), num_runs)
    traces = jax.jit(lambda keys: jax.lax.map(run, keys, batch_size=20))(keys)
    for i in range(num_runs):
        trace = jax.tree.map(lambda x, i=i: x[i][None], traces)
        yield ebm.auxiliary_adequacy(Run(trace))


class Run:
    """What is asked of NumPyro's MCMC."""

    def __init__(self, trace):
        self.trace = trace

    def get_extra_fields(self, group_by_chain):
        return {"auxiliary": self.trace}


def mala(step_size):
    return lambda model: ebm.MALA(model, step_size=step_size)


@pytest.mark.parametrize("step_size", [1e3, 0.01])
def test_chains_that_hardly_move_give_the_prior_and_say_so(step_size):
    """1,000: few steps are accepted. 0.01: all are, and 40 of them cover a tenth of the way."""
    data = jax.random.normal(jax.random.key(0), (50, 3))
    kernel = ebm.Exchange(gaussian, mala(step_size), NUM_STEPS)
    mcmc = MCMC(kernel, num_warmup=100, num_samples=300, progress_bar=False)
    mcmc.run(jax.random.key(1), data)
    with pytest.warns(ebm.ShortAuxiliaryWarning, match="hardly move.*draws are those of the prior"):
        found = ebm.auxiliary_adequacy(mcmc)
    assert not found.is_adequate and found.correlation > 0.5
    assert (found.accept_prob < 0.2) == (step_size > 1)


@pytest.mark.parametrize("name", ["Gaussian", "regression"])
def test_chains_that_move_are_adequate(name):
    found = list(verdicts(name, mala(0.6), 3, num_draws=200))
    assert sum(x.is_adequate for x in found) >= 2
    assert all(x.correlation < 0.3 for x in found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::numpyro_ebm.ShortAuxiliaryWarning")
@pytest.mark.parametrize("name", MODELS)
def test_right_runs_are_called_inadequate_in_a_twentieth(name):
    auxiliary = ebm.BlockGibbs if name == "one lattice" else mala(0.6)
    found = list(verdicts(name, auxiliary, 200))
    wrong = sum(not x.is_adequate for x in found) / len(found)
    print(f"{name}: {wrong:.3f} of {len(found)} right runs are called inadequate")
    assert wrong < 0.05 + 3 * (0.05 * 0.95 / len(found)) ** 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::numpyro_ebm.ShortAuxiliaryWarning")
@pytest.mark.parametrize("step_size", [1e3, 0.001, 0.003, 0.01])
@pytest.mark.parametrize("name", ["Gaussian", "regression"])
def test_runs_with_a_tenth_of_the_moves_or_less_are_found(name, step_size):
    found = list(verdicts(name, mala(step_size), 40))
    assert sum(not x.is_adequate for x in found) >= 0.95 * len(found)
