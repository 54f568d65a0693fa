# SPDX-License-Identifier: Apache-2.0
"""Discrete kernels: the protocol, mixed models, what they refuse."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import assert_mean
from discrete_cases import (
    BIASES,
    KERNELS,
    LAWS,
    LOADINGS,
    dense_energy,
    factors,
    law_of,
    pixels,
    step,
)
from jax import lax
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, DiscreteGibbs, Gibbs

import numpyro_ebm as ebm
from numpyro_ebm.samplers import discrete_langevin


@pytest.mark.filterwarnings("ignore:Some donated buffers:UserWarning")  # NumPyro's, under vmap
@pytest.mark.parametrize(
    "name, method",
    [
        ("DiscreteLangevin", "vectorized"),
        *(
            pytest.param(name, method, marks=pytest.mark.slow)
            for name, method in itertools.product(KERNELS, ("sequential", "vectorized", jax.vmap))
            if (name, method) != ("DiscreteLangevin", "vectorized")
        ),
    ],
)
def test_protocol(name, method):
    law = law_of(name)
    kernel = KERNELS[name].make(law.model)
    options = {"num_warmup": 5, "num_samples": 20, "num_chains": 2, "progress_bar": False}
    mcmc = MCMC(kernel, chain_method=method, **options)
    mcmc.run(jax.random.key(0), num_rows=3, extra_fields=kernel.default_fields[1:])
    draws = mcmc.get_samples(group_by_chain=True)
    assert draws["s"].shape == (2, 20, 3, 6) and draws["s"].dtype == "int32"
    assert np.any(draws["s"][0] != draws["s"][1])
    extra = mcmc.get_extra_fields(group_by_chain=True)
    assert extra["potential_energy"].shape == (2, 20, 3)
    energy = law.energy(np.asarray(draws["s"]).reshape(-1, 6)).reshape(2, 20, 3)
    np.testing.assert_allclose(extra["potential_energy"], energy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KERNELS)
def test_states_start_where_they_are_told_and_refresh(name):
    law = law_of(name)
    kernel = KERNELS[name].make(law.model)
    kwargs = {"num_rows": 3}
    state = kernel.init(jax.random.key(0), 5, {"s": jnp.ones((3, 6), int)}, (), kwargs)
    np.testing.assert_array_equal(state.z["s"], 1)
    again = kernel.refresh(state, (), kwargs)
    np.testing.assert_allclose(again.potential_energy, state.potential_energy)
    np.testing.assert_array_equal(kernel.get_constrain_fn((), kwargs)(state.z)["s"], state.z["s"])
    wrapped = kernel.wrap_model(lambda m: m)
    assert wrapped is not kernel and wrapped.model is law.model
    assert isinstance(kernel.get_diagnostics_str(state), str)


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ({"differences": "exact"}, {"adjusted": False})
        ),
    ],
)
def test_the_langevin_sampler_is_blackjax_shaped(options):
    def log_density(x):
        return -dense_energy(x["s"]) + x["a"] * x["s"][:, 0]

    position = {"s": jnp.zeros((4, 6), int), "a": jnp.ones(4, int)}
    values = {"a": [1, 2, 5], "s": [0, 1]}
    algorithm = discrete_langevin.as_top_level_api(log_density, 0.5, values, **options)
    init, step = jax.jit(algorithm.init), jax.jit(algorithm.step)
    state, taken = init(position), []
    for key in jax.random.split(jax.random.key(0), 20):
        state, info = step(key, state)
        taken.extend(np.asarray(info.is_accepted))
        # What a row keeps is that of its position, whether it moved or stayed.
        np.testing.assert_allclose(state.differences, init(state.position).differences, atol=1e-5)
        assert set(np.unique(state.position["a"])) <= {1, 2, 5}
        assert set(np.unique(state.position["s"])) <= {0, 1}
    assert state.position["s"].dtype == "int32" and not info.is_divergent.any()
    np.testing.assert_allclose(state.logdensity, log_density(state.position), rtol=1e-5)
    assert any(taken) and (all(taken) == (not options.get("adjusted", True)))


CONTINUOUS = {"MALA": ebm.MALA, "NUTS": NUTS, "BlockGibbs": ebm.BlockGibbs}


DISCRETE = {
    "BlockGibbs": ebm.BlockGibbs,
    "DiscreteLangevin": ebm.DiscreteLangevin,
    "DiscreteGibbs": DiscreteGibbs,
}


FAST_PAIRS = {("MALA", "BlockGibbs")}


PAIRS = [
    pytest.param(*pair, marks=[] if pair in FAST_PAIRS else pytest.mark.slow)
    for pair in itertools.product(CONTINUOUS, DISCRETE)
]


def run(kernel, num_samples=8_000, num_warmup=500, **kwargs):
    mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, progress_bar=False)
    mcmc.run(jax.random.key(1), **kwargs)
    return {k: np.asarray(x) for k, x in mcmc.get_samples().items()}


def compose(model, first, continuous, second, discrete):
    return Gibbs([(CONTINUOUS[first](model), continuous), (DISCRETE[second](model), discrete)])


@pytest.mark.parametrize("first, second", PAIRS)
def test_real_visible_and_discrete_hidden_units_take_turns(grbm, first, second):
    model = ebm.fixed(grbm.model, grbm.params)
    draws = run(compose(model, first, ["v"], second, ["h"]))
    mean, second_moment, hidden = grbm.oracle.moments()
    v, h = draws["v"].swapaxes(0, 1), draws["h"].swapaxes(0, 1)
    assert_mean(v, mean)
    assert_mean(v[..., 0] * v[..., 1], second_moment[0, 1])
    assert_mean(h, hidden)


def factor_moments():
    """E[x] and E[z] by a sum over x and a grid over each coordinate of z."""
    x = np.indices((2,) * 4).reshape(4, -1).T
    grid = np.linspace(-8, 8, 4_001)
    log_weight = (x @ LOADINGS)[..., None] * grid - 0.5 * grid**2 - 0.05 * grid**4
    weight = np.exp(log_weight)  # (16, 2, grid)
    integrals = weight.sum(-1)
    p = np.exp(x @ BIASES) * integrals.prod(-1)
    p /= p.sum()
    return p @ x, p @ ((weight * grid).sum(-1) / integrals)


@pytest.mark.parametrize(
    "first, second",
    [
        ("MALA", "DiscreteLangevin"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("MALA", "BlockGibbs"), ("NUTS", "BlockGibbs"), ("NUTS", "DiscreteGibbs"))
        ),
    ],
)
def test_discrete_visible_and_real_latent_units_take_turns(first, second):
    draws = run(compose(ebm.fixed(factors, {}), first, ["z"], second, ["x"]), num_rows=4)
    mean_x, mean_z = factor_moments()
    assert_mean(draws["x"].swapaxes(0, 1), mean_x)
    assert_mean(draws["z"].swapaxes(0, 1), mean_z)


@pytest.mark.parametrize(
    "name", ["DiscreteLangevin", pytest.param("BlockGibbs", marks=pytest.mark.slow)]
)
def test_geweke_data_and_hidden_units_have_their_joint_law(grbm, name):
    """v | h drawn by its formula, h | v by a step of the kernel: the joint law is kept."""
    num_rows, oracle = 10_000, grbm.oracle

    def conditional(v):
        model = ebm.fixed(ebm.models.grbm, grbm.params)
        return handlers.condition(model, {"v": v})(num_hidden=3, num_rows=num_rows)

    kernel = {"DiscreteLangevin": lambda m: ebm.DiscreteLangevin(m, 2.0)}.get(name, ebm.BlockGibbs)
    kernel = kernel(conditional)
    W, b, scale = (jnp.asarray(grbm.params[k]) for k in ("W", "b", "scale"))

    def both(_, carry):
        key, v, state = carry
        key, key_v = jax.random.split(key)
        noise = jax.random.normal(key_v, v.shape)
        v = (b + scale**2 * (state.z["h"] @ W.T) + scale * noise).astype(v.dtype)
        state = kernel.sample(kernel.refresh(state, (), {"v": v}), (), {"v": v})
        return key, v, state

    v = jnp.zeros((num_rows, 2))
    state = kernel.init(jax.random.key(0), 0, None, (), {"v": v})
    _, v, state = jax.jit(lambda c: lax.fori_loop(0, 60, both, c))((jax.random.key(1), v, state))
    v, h = np.asarray(v), np.asarray(state.z["h"])
    expected = num_rows * oracle.state_probabilities()
    counts = np.bincount(h @ [1, 2, 4], minlength=8)
    assert np.sum((counts - expected) ** 2 / expected) < 7 + 4.5 * 14**0.5
    mean, second, _ = oracle.moments()
    for x, moment in ((v, mean), (v[:, :, None] * v[:, None], second)):
        assert np.all(np.abs(x.mean(0) - moment) < 4.5 * x.std(0) / num_rows**0.5)
    # h belongs to its v: E[v h] = E[v E[h | v]].
    product = v[:, :, None] * (h - oracle.posterior_mean(v))[:, None]
    assert np.all(np.abs(product.mean(0)) < 4.5 * product.std(0) / num_rows**0.5)


def poisson():
    with numpyro.plate("data", 2):
        n = numpyro.sample("n", dist.Poisson(2.0))
        ebm.energy("E", 0.1 * n)


def broken():
    with numpyro.plate("data", 2):
        s = numpyro.sample("s", ebm.Counting(2, (3,)))
        ebm.energy("E", jnp.log(jnp.sum(s, -1) - 10.0))


def one_site(energy):
    def model():
        with numpyro.plate("data", 2):
            s = numpyro.sample("s", ebm.Counting(3, (3,)))
            ebm.energy("E", energy(s))

    return ebm.fixed(model, {})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ebm.DiscreteLangevin(broken, 0.0), "step_size.*positive"),
        (lambda: ebm.DiscreteLangevin(broken, float("nan")), "step_size.*positive"),
        (lambda: ebm.DiscreteLangevin(broken, target_accept_prob=1.0), "target_accept_prob"),
        (lambda: ebm.DiscreteLangevin(broken, differences="none"), "differences.*'none'"),
        (lambda: ebm.DiscreteLangevin(broken, adjusted=False), "pass a `step_size`"),
        (
            lambda: step(ebm.DiscreteLangevin(LAWS["dense"].model, adapt_step_size=False)),
            "pass a `step_size`",
        ),
        (lambda: step(ebm.DiscreteLangevin(ebm.fixed(poisson, {}))), "'n'.*Poisson.*finite"),
        (lambda: ebm.sample(jax.random.key(0), ebm.fixed(poisson, {}), 2), "'n'.*Poisson.*finite"),
        (
            lambda: step(ebm.DiscreteLangevin(ebm.fixed(broken, {}))),
            r"not finite at the initial.*'E'.*init_params",
        ),
        (
            lambda: step(ebm.BlockGibbs(ebm.fixed(broken, {}))),
            r"not finite at the initial.*'E'.*init_params",
        ),
        (
            lambda: step(ebm.DiscreteLangevin(ebm.fixed(factors, {}))),
            r"Gibbs\(\[\(MALA\(model\), \['z'\]\), \(DiscreteLangevin\(model\), \['x'\]\)",
        ),
        (lambda: step(ebm.DiscreteLangevin(ebm.fixed(pixels, {}))), "continuous.*MALA"),
        (lambda: step(ebm.MALA(LAWS["dense"].model)), "DiscreteLangevin"),
        (lambda: step(ebm.DiscreteLangevin(ebm.models.grbm)), "'W', 'b', 'c', 'scale'.*fixed"),
        (
            lambda: step(ebm.DiscreteLangevin(one_site(lambda s: jnp.arange(3.0)[s].sum(-1)))),
            r"no gradient in \['s'\].*BlockGibbs.*exact",
        ),
        (
            lambda: step(ebm.DiscreteLangevin(one_site(lambda s: jax.nn.one_hot(s, 3)[:, 0, 1]))),
            r"no gradient in \['s'\].*DiscreteGibbs",
        ),
        (
            lambda: step(ebm.DiscreteLangevin(one_site(lambda s: 1.0 * jnp.sum(s == 1, -1)))),
            r"no gradient in \['s'\]",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ebm.ModelError, match=message):
        make()


PARALLEL = """
import sys
sys.path.insert(0, {here!r})
import jax, jax.numpy as jnp, numpy as np, numpyro
from numpyro.infer import MCMC
import numpyro_ebm as ebm
assert jax.local_device_count() == 2

def chain(num_rows=3):
    with numpyro.plate("data", num_rows):
        s = numpyro.sample("s", ebm.Counting(2, (6,)))
        ebm.energy("E", -jnp.sum(s[:, 1:] * s[:, :-1], -1))

model = ebm.fixed(chain, {{}})
for kernel in (ebm.DiscreteLangevin(model), ebm.BlockGibbs(model)):
    mcmc = MCMC(kernel, num_warmup=8, num_samples=10, num_chains=2, chain_method="parallel",
                progress_bar=False)
    mcmc.run(jax.random.key(0))
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["s"])
    assert draws.shape == (2, 10, 3, 6), draws.shape
    assert np.any(draws[0] != draws[1])
"""


@pytest.mark.slow
def test_chains_in_parallel():
    """On two host devices, which have to be asked for before JAX starts."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    script = PARALLEL.format(here=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
