# SPDX-License-Identifier: Apache-2.0
"""Laws that every kernel on continuous sites obeys."""

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
from conftest import assert_mean, enable_x64
from jax import lax
from kernel_cases import COVARIANCE, KERNELS, make, run, skewed, slow
from numpyro import handlers
from numpyro.infer import MCMC, DiscreteGibbs, Gibbs
from numpyro.infer.mcmc import MCMCKernel
from registry.kernels import KERNELS as REGISTRY
from registry.kernels import kernels

import numpyro_ebm as ebm
from numpyro_ebm import mcmc

ADJUSTED = kernels(moves_discrete=False, leaves_invariant=True)
FIELDS = ("potential_energy", "energy", "accept_prob", "diverging")


def positives(num_rows=10):
    with numpyro.plate("data", num_rows):
        r = numpyro.sample("r", ebm.Lebesgue((), dist.constraints.positive))
        p = numpyro.sample("p", ebm.Lebesgue((), dist.constraints.unit_interval))
        ebm.energy("E", -dist.Gamma(3.0, 2.0).log_prob(r) - dist.Beta(2.0, 3.0).log_prob(p))


def exact_draws(rng, num_rows, beta=1.0):
    """Draws of `skewed` at an inverse temperature: exp(-g) is Gamma(β, 1/β)."""
    v = rng.multivariate_normal(np.zeros(2), COVARIANCE / beta, num_rows)
    return {"v": v, "g": -np.log(rng.gamma(beta, 1 / beta, num_rows))}


def assert_law(draws, num_errors=4.5):
    """The moments of `skewed` from independent rows."""
    v, g = np.asarray(draws["v"], float), np.asarray(draws["g"], float)
    for values, expected in (
        (g, np.euler_gamma),
        (g**2, np.euler_gamma**2 + np.pi**2 / 6),
        (np.exp(-g), 1.0),
        (v[:, 0], 0.0),
        (v[:, 0] ** 2, 1.0),
        (v[:, 0] * v[:, 1], 0.8),
        (v[:, 1] ** 2, 2.0),
        (v[:, 1] * g, 0.0),
    ):
        error = values.std() / np.sqrt(len(values))
        assert abs(values.mean() - expected) < num_errors * error, (values.mean(), expected, error)


def test_every_kernel_is_in_the_registry():
    members = [getattr(mcmc, name) for name in mcmc.__all__]
    exported = {x for x in members if isinstance(x, type) and issubclass(x, MCMCKernel)}
    assert {type(x.make(ebm.fixed(skewed, {}))) for x in REGISTRY.values()} == exported
    for name in ADJUSTED:
        assert ADJUSTED[name].step_size is not None
    for name, kernel in kernels(moves_discrete=True, leaves_invariant=True).items():
        assert kernel.laws and kernel.num_steps, name


def type_of(x):
    """What decides whether a program is compiled again."""
    return x.shape, x.dtype, getattr(x, "weak_type", False)


@pytest.mark.parametrize("name", KERNELS)
def test_protocol(name):
    def model(num_rows=4):
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", ebm.Lebesgue((2,)))
            r = numpyro.sample("r", ebm.Lebesgue((), dist.constraints.positive))
            numpyro.deterministic("square", r**2)
            ebm.energy("E", 0.5 * jnp.sum(v**2, -1) + r - jnp.log(r))

    kernel = make(name, ebm.fixed(model, {}))
    state = kernel.init(jax.random.key(0), 25, None, (), {})
    assert state.i == 0 and set(state.z) == {"v", "r"}
    if getattr(state.adapt_state, "inverse_mass_matrix", None) is not None:  # units of its own
        adapted = state.adapt_state._replace(inverse_mass_matrix=jnp.array([0.3, 1.5, 2.0]))
        state = state._replace(adapt_state=adapted)
    step = jax.jit(lambda s: kernel.sample(s, (), {}))
    states = [state]
    for _ in range(6):
        states.append(step(states[-1]))
    second = states[-1]
    assert second.i == 6 and not np.array_equal(state.z["v"], second.z["v"])
    # A pure function of the state, of the same types and shapes: one program.
    assert jax.tree.map(type_of, state) == jax.tree.map(type_of, second)
    np.testing.assert_array_equal(step(states[-2]).z["v"], second.z["v"])
    # The density and its gradient that are kept belong to the position.
    fresh = jax.jit(lambda s: kernel.refresh(s, (), {}))(second)
    np.testing.assert_allclose(fresh.potential_energy, second.potential_energy, rtol=2e-4)
    np.testing.assert_allclose(fresh.energy, second.energy, rtol=2e-4)
    np.testing.assert_allclose(fresh.z_grad["v"], second.z_grad["v"], rtol=1e-3, atol=1e-4)
    values = kernel.get_constrain_fn((), {})(second.z)
    np.testing.assert_allclose(values["r"], np.exp(second.z["r"]), rtol=1e-5)
    energy = 0.5 * np.sum(np.square(values["v"]), -1) + values["r"] - 2 * np.asarray(second.z["r"])
    np.testing.assert_allclose(second.potential_energy, energy, rtol=1e-3, atol=1e-4)
    if name == "ReplicaExchange":  # the Jacobian belongs to the base, which is not tempered
        tempered = 0.5 * np.sum(np.square(values["v"]), -1) + values["r"] - np.log(values["r"])
        np.testing.assert_allclose(-second.memory[0].loglikelihood[0], tempered, rtol=1e-3)
    for field in FIELDS:
        assert getattr(second, field).shape == (4,), field
    assert np.all(second.accept_prob >= 0) and np.all(second.accept_prob <= 1)
    assert second.num_steps >= 1 and second.mean_accept_prob.shape == ()
    accepted = [np.mean(s.accept_prob) for s in states[1:]]
    np.testing.assert_allclose(second.mean_accept_prob, np.mean(accepted), rtol=1e-4)
    assert isinstance(kernel.get_diagnostics_str(second), str)
    assert np.all(second.adapt_state.step_size > 0)
    wrapped = kernel.wrap_model(lambda m: m)
    assert wrapped is not kernel and wrapped.model is kernel.model
    # Chains side by side.
    keys = jax.random.split(jax.random.key(1), 3)
    chains = jax.tree.map(lambda x: jnp.stack([x] * 3), second._replace(rng_key=None))
    moved = jax.jit(lambda s: kernel.sample(s, (), {}))(chains._replace(rng_key=keys))
    assert moved.z["v"].shape == (3, 4, 2) and moved.accept_prob.shape == (3, 4)
    assert not np.allclose(moved.z["v"][0], moved.z["v"][1])


METHODS = ["sequential", "vectorized", jax.vmap]


@pytest.mark.filterwarnings("ignore:Some donated buffers:UserWarning")  # NumPyro's, under vmap
@pytest.mark.parametrize(
    "name, method",
    [slow(name, method) for name in KERNELS for method in METHODS],
)
def test_chain_methods(name, method):
    options = {"num_samples": 10, "num_warmup": 20, "num_chains": 2, "chain_method": method}
    kernel = make(name, ebm.fixed(positives, {}))
    mcmc, draws = run(kernel, num_rows=3, **options)
    assert draws["r"].shape == (2, 10, 3) and draws["r"].min() > 0
    assert not np.allclose(draws["r"][0], draws["r"][1])
    extra = mcmc.get_extra_fields(group_by_chain=True)
    assert all(extra[field].shape == (2, 10, 3) for field in FIELDS)
    _, again = run(kernel, num_rows=3, **options)
    np.testing.assert_array_equal(draws["r"], again["r"])
    # A run goes on from its last state, without another warm-up.
    sizes = np.asarray(mcmc.last_state.adapt_state.step_size)
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(jax.random.key(1), num_rows=3)
    assert mcmc.last_state.i.tolist() == [40] * 2
    np.testing.assert_array_equal(mcmc.last_state.adapt_state.step_size, sizes)


PARALLEL = """
import sys, warnings
sys.path[:0] = {here!r}
import jax, numpy as np
from kernel_cases import KERNELS, make, run, skewed
import numpyro_ebm as ebm
assert jax.local_device_count() == 2
for name in {names!r}:
    kernel = make(name, ebm.fixed(skewed, {{}}))
    _, draws = run(
        kernel, 8, 10, num_chains=2, chain_method="parallel", num_rows=3
    )
    assert draws["v"].shape == (2, 8, 3, 2), draws["v"].shape
    assert not np.allclose(draws["v"][0], draws["v"][1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("names", [["UnderdampedLangevin"], slow(list(KERNELS))])
def test_chains_in_parallel(names):
    """On two host devices, which have to be asked for before JAX starts."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    script = PARALLEL.format(here=[str(x) for x in Path(__file__).parents[:2]], names=names)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name, precision",
    [(name, "float32") for name in ADJUSTED] + [slow(name, "float64") for name in ADJUSTED],
)
def test_the_law_of_the_model_is_invariant(name, precision):
    num_rows = 20_000
    rng = np.random.default_rng(0)
    with enable_x64() if precision == "float64" else jax.default_matmul_precision("highest"):
        # An uneven preconditioner where there is one, as warm-up would leave it.
        kernel = make(name, ebm.fixed(skewed, {}), step_size=ADJUSTED[name].step_size)
        start = {k: jnp.asarray(x, float) for k, x in exact_draws(rng, num_rows).items()}
        state = kernel.init(jax.random.key(1), 0, start, (), {"num_rows": num_rows})
        if name == "ReplicaExchange":
            ladder = np.asarray(state.adapt_state.inverse_temperatures)
            draws = [exact_draws(rng, num_rows, beta) for beta in ladder]
            draws = {k: jnp.asarray(np.stack([x[k] for x in draws]), float) for k in draws[0]}
            replicas = state.memory[0]._replace(position=draws)
            state = state._replace(memory=(replicas, state.memory[1]))
            state = kernel.refresh(state, (), {"num_rows": num_rows})
        elif state.adapt_state.inverse_mass_matrix is not None:
            uneven = jnp.array([0.5, 1.3, 1.7])  # g, v[0], v[1]
            adapted = state.adapt_state._replace(inverse_mass_matrix=uneven)
            state = state._replace(adapt_state=adapted)

        @jax.jit
        def steps(state):
            def body(i, carry):
                state, accept = carry
                state = kernel.sample(state, (), {"num_rows": num_rows})
                return state, accept + state.accept_prob / 12

            return lax.fori_loop(0, 12, body, (state, jnp.zeros(num_rows)))

        state, accept = steps(state)
        assert state.z["v"].dtype == precision
        assert 0.3 < accept.mean() < 0.93  # else the test would not bite
        assert np.mean(np.all(state.z["v"] == start["v"], -1)) < 0.05  # everything has moved
        assert_law(state.z)
        if name == "ReplicaExchange":
            for k, beta in enumerate(ladder):  # every replica has its own law
                square = np.asarray(state.memory[0].position["v"][k, :, 0]) ** 2
                error = square.std() / num_rows**0.5
                assert abs(square.mean() - 1 / beta) < 4.5 * error


@pytest.mark.parametrize("name", ["MALA", slow("UnderdampedLangevin"), slow("MCLMC")])
def test_geweke_data_and_hidden_units_have_their_joint_law(grbm, name):
    """h | v drawn by its formula, v | h by a step of the kernel: the joint law is found."""
    num_rows, oracle = 10_000, grbm.oracle

    def conditional(h):
        model = ebm.fixed(ebm.models.grbm, grbm.params)
        return handlers.condition(model, {"h": h})(num_hidden=3, num_rows=num_rows)

    kernel = make(name, conditional, step_size=0.8)
    W, c = jnp.asarray(grbm.params["W"]), jnp.asarray(grbm.params["c"])

    def both(_, carry):
        key, _, state = carry
        key, key_h = jax.random.split(key)
        h = jax.random.bernoulli(key_h, jax.nn.sigmoid(c + state.z["v"] @ W)).astype(int)
        state = kernel.sample(kernel.refresh(state, (), {"h": h}), (), {"h": h})
        return key, h, state

    h = jnp.zeros((num_rows, 3), int)
    state = kernel.init(jax.random.key(0), 0, None, (), {"h": h})
    _, h, state = jax.jit(lambda x: lax.fori_loop(0, 80, both, x))((jax.random.key(1), h, state))
    v, h = np.asarray(state.z["v"]), np.asarray(h)
    expected = num_rows * oracle.state_probabilities()
    counts = np.bincount(h @ [1, 2, 4], minlength=8)
    assert np.sum((counts - expected) ** 2 / expected) < 7 + 4.5 * 14**0.5
    mean, second, _ = oracle.moments()
    for x, moment in ((v, mean), (v[:, :, None] * v[:, None], second)):
        assert np.all(np.abs(x.mean(0) - moment) < 4.5 * x.std(0) / num_rows**0.5)
    product = v[:, :, None] * (h - oracle.posterior_mean(v))[:, None]
    assert np.all(np.abs(product.mean(0)) < 4.5 * product.std(0) / num_rows**0.5)


@pytest.mark.parametrize(
    "name", ["ReplicaExchange", slow("UnderdampedLangevin"), slow("MCLMC"), slow("MALA-mass")]
)
def test_moments_from_a_cold_start_with_warm_up(name):
    mcmc, draws = run(make(name, ebm.fixed(skewed, {})), num_rows=40, num_samples=1_500)
    v, g = draws["v"][0].swapaxes(0, 1), draws["g"][0].T  # rows are chains
    assert_mean(v, 0.0)
    assert_mean(v[..., 0] * v[..., 1], 0.8)
    assert_mean(g, np.euler_gamma)
    assert_mean(np.exp(-g), 1.0)
    assert mcmc.get_extra_fields()["diverging"].mean() < 0.02


@pytest.mark.parametrize("name", ["MCLMC", slow("UnderdampedLangevin"), slow("ReplicaExchange")])
def test_constrained_sites(name):
    _, draws = run(make(name, ebm.fixed(positives, {})), num_samples=1_500, num_rows=40)
    r, p = draws["r"][0].T, draws["p"][0].T
    assert r.min() > 0 and 0 < p.min() and p.max() < 1
    assert_mean(r, 1.5)
    assert_mean(r**2, 3.0)
    assert_mean(p, 0.4)


@pytest.mark.parametrize("name, target", [("UnderdampedLangevin", 0.8), ("MCLMC", 0.9)])
def test_a_thousand_rows_are_a_thousand_chains(name, target):
    mcmc, draws = run(make(name, ebm.fixed(skewed, {})), 60, 200, num_rows=1_000)
    accept = np.asarray(mcmc.get_extra_fields()["accept_prob"])
    assert abs(accept.mean() - target) < 0.05
    assert accept.std(1).mean() > 0.05  # each for itself
    assert_law({k: x[0, -1] for k, x in draws.items()})


@pytest.mark.parametrize("name", ["UnderdampedLangevin", "MCLMC", slow("MCLMC-unadjusted")])
def test_blocks_of_gibbs(grbm, name):
    model = ebm.fixed(grbm.model, grbm.params)
    block = make(name, model)
    kernel = Gibbs([(block, ["v"]), (DiscreteGibbs(model), ["h"])])
    mcmc = MCMC(kernel, num_warmup=300, num_samples=4_000, num_chains=1, progress_bar=False)
    mcmc.run(jax.random.key(0))
    v, h = (np.asarray(mcmc.get_samples(group_by_chain=True)[k])[:, :, 0] for k in ("v", "h"))
    mean, second, hidden = grbm.oracle.moments()
    slack = {"num_errors": 5.0 if name == "MCLMC-unadjusted" else 4.0}
    assert_mean(v, mean, **slack)
    assert_mean(v[..., 0] * v[..., 1], second[0, 1], **slack)
    assert_mean(h, hidden, **slack)


@pytest.mark.slow
def test_discrete_sites_are_summed_out(grbm):
    mean, second, _ = grbm.oracle.moments()
    kernel = ebm.ReplicaExchange(ebm.fixed(grbm.model, grbm.params), num_replicas=3)
    mcmc, draws = run(kernel, num_chains=20, num_samples=800)
    assert np.max(mcmc.last_state.mean_swap_prob) < 0.99  # the hot replicas are hot
    v = draws["v"][:, :, 0]
    assert set(draws) == {"v"}
    assert_mean(v, mean)
    assert_mean(v[..., 0] * v[..., 1], second[0, 1])
