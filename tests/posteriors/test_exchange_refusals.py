# SPDX-License-Identifier: Apache-2.0
"""Auxiliary chains that are too short, and what the exchange kernel refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from exchange_cases import (
    GAUSSIAN,
    GROUPS,
    LATTICES,
    MALA,
    NUM_UNITS,
    Ran,
    gaussian,
    gaussian_rows,
    ising,
)

import numpyro_ebm as ebm


def critical_lattice(size=6, num_sweeps=300):
    """A state of a lattice near its critical temperature, from Gibbs sweeps in NumPy."""
    rng = np.random.default_rng(0)
    s = np.ones((size, size))
    even = np.indices((size, size)).sum(0) % 2 == 0
    for _ in range(num_sweeps):
        for color in (even, ~even):
            field = sum(np.roll(s, step, axis) for step in (1, -1) for axis in (0, 1))
            up = rng.random(s.shape) < 1 / (1 + np.exp(-2 * 0.4406868 * field))
            s = np.where(color, np.where(up, 1, -1), s)
    return jnp.asarray((s[None] + 1) / 2).astype(int)


@pytest.mark.slow
def test_adequacy_tells_one_step_at_a_critical_lattice_from_a_hundred():
    data = critical_lattice()

    def run(num_steps):
        kernel = ebm.Exchange(ising, ebm.BlockGibbs, num_steps, step_size=0.8)

        def one(key):
            state = kernel.init(key, 0, {"beta": jnp.zeros(())}, (data,), {})

            def step(state, _):
                state = kernel.sample(state, (data,), {})
                return state, (state.auxiliary, state.z)

            return jax.lax.scan(step, state, None, 200)[1]

        traces = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4))
        return Ran(kernel, (data,), *traces)

    short = run(1)
    with pytest.warns(ebm.ShortAuxiliaryWarning, match="num_auxiliary_steps"):
        found = ebm.auxiliary_adequacy(short)
    assert not found.is_adequate and found.sds > 0.5 and found.p_value < 1e-10
    assert found.acceptance_drift > 0.1
    found = ebm.auxiliary_adequacy(run(100))
    assert found.is_adequate and found.sds < 0.1 and found.p_value > 1e-3
    short.get_extra_fields = lambda group_by_chain: {"energy": 0.0}
    with pytest.raises(ebm.ModelError, match="needs one field.*'energy'"):
        ebm.auxiliary_adequacy(short)


def flat_prior(data):
    theta = numpyro.sample("theta", dist.ImproperUniform(dist.constraints.positive, (), ()))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * v**2)


def no_prior(data):
    theta = numpyro.param("theta", 1.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * v**2)


def unset_param(data):
    width = numpyro.param("width", 1.0)
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * (v / width) ** 2)


def discrete_parameter(data):
    theta = numpyro.sample("theta", dist.Poisson(2.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (1 + theta) * v**2)


def subsampled(data):
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data), subsample_size=10):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data[:10])
        ebm.energy("E", 0.5 * theta * v**2)


def infinite(data):
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * theta * v**2 + jnp.where(jnp.arange(len(data)) == 3, jnp.inf, 0.0))


def real_latent(data):
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", ebm.Lebesgue())
        ebm.energy("E", 0.5 * theta * v**2 + (h - v) ** 4)


def quartic(data):
    theta = numpyro.sample("theta", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", theta * v**4)


def coupled_rows(data):
    with numpyro.plate("groups", len(data)):
        rate = numpyro.sample("rate", dist.Gamma(3.0, 2.0))
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((NUM_UNITS,)), obs=data)
        ebm.energy("E", 0.5 * (rate + jnp.roll(rate, 1)) * jnp.sum(v**2, -1))


def coupled_prior(data):
    with numpyro.plate("groups", len(data)):
        rate = numpyro.sample("rate", dist.Gamma(3.0, 2.0))
    numpyro.sample("total", dist.Normal(jnp.sum(rate), 1.0), obs=3.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((NUM_UNITS,)), obs=data)
        ebm.energy("E", 0.5 * rate * jnp.sum(v**2, -1))


class Biased(ebm.MALA):
    leaves_invariant = False


class OneWay(ebm.MALA):
    is_reversible = False


V, S = jnp.asarray(GAUSSIAN), jnp.asarray(LATTICES[3])
BY_ROW = {"by_row": True, "step_size": 1.0}


REFUSED = {
    "no prior": (no_prior, ebm.BlockGibbs, {}, V, "no parameter.*prior.*'theta'"),
    "improper": (flat_prior, ebm.BlockGibbs, {}, V, "'theta' is improper"),
    "unset param": (unset_param, ebm.BlockGibbs, {}, V, "'width'.*substitute"),
    "discrete": (discrete_parameter, ebm.BlockGibbs, {}, V, "'theta'.*discrete.*DiscreteGibbs"),
    "subsampled": (subsampled, ebm.BlockGibbs, {}, V, "'data' subsamples 10"),
    "infinite": (infinite, ebm.BlockGibbs, {}, V, r"row\(s\) \[3\] is not finite.*init_params"),
    "latent": (real_latent, ebm.BlockGibbs, {}, V, "'h'.*given.*Gibbs"),
    "bare MALA on spins": (ising, ebm.MALA, {}, S, "MALA cannot draw.*'s'.*discrete"),
    "MALA on spins": (ising, MALA, {}, S, "MALA cannot draw.*'s'.*discrete"),
    "Gibbs on quartic": (quartic, ebm.BlockGibbs, {}, V, "BlockGibbs cannot draw.*'v'"),
    "ULA": (gaussian, lambda m: ebm.ULA(m, 0.1), {}, V, "ULA without a Metropolis"),
    "DULA": (
        ising,
        lambda m: ebm.DiscreteLangevin(m, 0.1, adjusted=False),
        {},
        S,
        "without a Metropolis",
    ),
    "says it is biased": (gaussian, lambda m: Biased(m, 0.1), {}, V, "Biased without a Metropolis"),
    "says it is not reversible": (
        gaussian,
        lambda m: OneWay(m, 0.1),
        {"num_bridges": 2},
        V,
        "OneWay does not",
    ),
    "no kernel": (gaussian, lambda m: 3, {}, V, "returned 3"),
    "wrong draws": (gaussian, lambda k, p: {"v": jnp.zeros(3)}, {}, V, r"\(200,\).*\(3,\)"),
    "enumerate reals": (gaussian, "enumerate", {}, V, "'v', which is continuous"),
    "too many states": (ising, "enumerate", {"max_states": 100}, S, "512 states.*BlockGibbs"),
    "bridges of Gibbs": (ising, ebm.BlockGibbs, {"num_bridges": 2}, S, "reversible=True"),
    "bridges of draws": (gaussian, gaussian_rows, {"num_bridges": 2}, V, "num_bridges.*kernel"),
    "by_row": (gaussian, ebm.BlockGibbs, BY_ROW, V, r"'theta' has shape \(\)"),
    "coupled": (coupled_rows, ebm.BlockGibbs, BY_ROW, jnp.asarray(GROUPS), "energy of a row"),
    "coupled prior": (coupled_prior, ebm.BlockGibbs, BY_ROW, jnp.asarray(GROUPS), "couple"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sampled_is_refused(name):
    model, auxiliary, options, data, message = REFUSED[name]
    kernel = ebm.Exchange(model, auxiliary, **options)
    with pytest.raises(ebm.ModelError, match=message):
        kernel.init(jax.random.key(0), 100, None, (data,), {})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"auxiliary": 3}, "auxiliary.*Got 3"),
        ({"auxiliary": "gibbs"}, "auxiliary"),
        ({"auxiliary": lambda a, b, c: None}, "auxiliary"),
        ({"auxiliary": ebm.BlockGibbs(gaussian)}, "auxiliary"),
        ({"num_auxiliary_steps": 0}, "num_auxiliary_steps"),
        ({"num_auxiliary_steps": 2.0}, "num_auxiliary_steps"),
        ({"proposal": "nuts"}, "proposal"),
        ({"num_bridges": -1}, "num_bridges"),
        ({"step_size": 0.0}, "step_size"),
        ({"target_accept_prob": 1.0}, "target_accept_prob"),
        ({"num_references": 0}, "num_references"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ebm.ModelError, match=message):
        ebm.Exchange(gaussian, **{"auxiliary": ebm.BlockGibbs, **options})


def test_what_the_warmup_needs_is_refused_before_it_starts():
    with pytest.raises(ebm.ModelError, match="step_size"):
        ebm.Exchange(gaussian, gaussian_rows).init(jax.random.key(0), 0, None, (V,), {})
    with pytest.raises(ebm.ModelError, match="MALA cannot draw.*step_size.*lambda model"):
        ebm.Exchange(gaussian, ebm.MALA, step_size=1.0).init(jax.random.key(0), 0, None, (V,), {})
    kernel = ebm.Exchange(gaussian, gaussian_rows, proposal="langevin", num_references=20)
    with pytest.raises(ebm.ModelError, match="at least 84"):
        kernel.init(jax.random.key(0), 50, None, (V,), {})
    with pytest.raises(ebm.ModelError, match=r"init_params.*\['rate'\]"):
        ebm.Exchange(gaussian, gaussian_rows).init(
            jax.random.key(0), 10, {"rate": jnp.zeros(())}, (V,), {}
        )
