# SPDX-License-Identifier: Apache-2.0
"""Laws that every kernel on continuous sites obeys, and those of single kernels.

The sharpest law is invariance: rows that start with exact draws of the target still have its law
after some coarse steps, and being independent they say so with the standard error of 20,000 draws.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import assert_mean, enable_x64
from jax import lax
from numpyro import handlers
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, DiscreteGibbs, Gibbs
from numpyro.infer.mcmc import MCMCKernel
from registry.kernels import KERNELS as REGISTRY
from registry.kernels import kernels
from scipy import stats

import numpyro_ebm as ebm
from numpyro_ebm import mcmc
from numpyro_ebm.mcmc.adaptation import Adaptation, acceptance_tuner, energy_error_tuner
from numpyro_ebm.samplers import annealed, tempering
from numpyro_ebm.samplers.per_row import per_row

COVARIANCE = np.array([[1.0, 0.8], [0.8, 2.0]])
PRECISION = np.linalg.inv(COVARIANCE)

KERNELS = kernels(moves_discrete=False)
ADJUSTED = kernels(moves_discrete=False, leaves_invariant=True)
FIELDS = ("potential_energy", "energy", "accept_prob", "diverging")


slow = partial(pytest.param, marks=pytest.mark.slow)


def make(name, model, **options):
    return KERNELS[name].make(model, **options)


def skewed(num_rows=20):
    """Asymmetric and correlated: a Gumbel scalar beside a correlated Gaussian."""
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue((2,)))
        g = numpyro.sample("g", ebm.Lebesgue())
        ebm.energy("E", 0.5 * jnp.einsum("ni,ij,nj->n", v, PRECISION, v))
        ebm.energy("F", g + jnp.exp(-g))


def positives(num_rows=10):
    with numpyro.plate("data", num_rows):
        r = numpyro.sample("r", ebm.Lebesgue((), dist.constraints.positive))
        p = numpyro.sample("p", ebm.Lebesgue((), dist.constraints.unit_interval))
        ebm.energy("E", -dist.Gamma(3.0, 2.0).log_prob(r) - dist.Beta(2.0, 3.0).log_prob(p))


def run(kernel, num_samples=1_000, num_warmup=300, seed=0, num_chains=1, **options):
    kwargs = {k: options.pop(k) for k in ("num_rows", "init_params") if k in options}
    fields = options.pop("extra_fields", ())
    if num_chains > 1:
        options.setdefault("chain_method", "vectorized")
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        progress_bar=False,
        **options,
    )
    mcmc.run(jax.random.key(seed), extra_fields=fields, **kwargs)
    return mcmc, {k: np.asarray(x) for k, x in mcmc.get_samples(group_by_chain=True).items()}


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


# The protocol


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
    step = jax.jit(lambda s: kernel.sample(s, (), {}))
    states = [state]
    for _ in range(6):
        states.append(step(states[-1]))
    second = states[-1]
    assert second.i == 6 and not np.array_equal(state.z["v"], second.z["v"])
    # A pure function of the state, of the same types and shapes.
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), second
    )
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
from test_kernels import KERNELS, make, run, skewed
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


# Stationary laws


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


def test_discrete_sites_are_summed_out(grbm):
    mean, second, _ = grbm.oracle.moments()
    kernel = ebm.ReplicaExchange(ebm.fixed(grbm.model, grbm.params), num_replicas=3)
    mcmc, draws = run(kernel, num_chains=20, num_samples=800)
    assert np.max(mcmc.last_state.mean_swap_prob) < 0.99  # the hot replicas are hot
    v = draws["v"][:, :, 0]
    assert set(draws) == {"v"}
    assert_mean(v, mean)
    assert_mean(v[..., 0] * v[..., 1], second[0, 1])


# Single kernels


def scales(num_rows=10, dimension=12):
    sd = jnp.exp(jnp.linspace(-2.0, 2.0, dimension))
    with numpyro.plate("data", num_rows):
        shift = 5.0 * jnp.arange(num_rows)[:, None]  # rows with different laws
        v = numpyro.sample("v", ebm.Lebesgue((dimension,)))
        ebm.energy("E", 0.5 * jnp.sum(((v - shift) / sd) ** 2, -1))


@pytest.mark.parametrize(
    "name", ["UnderdampedLangevin", slow("MALA-mass"), slow("MCLMC"), slow("MCLMC-unadjusted")]
)
def test_the_preconditioner_learns_the_scales(name):
    init = {"v": 5.0 * jnp.arange(10.0)[:, None] + jnp.zeros((10, 12))}
    mcmc, draws = run(
        make(name, ebm.fixed(scales, {})), 300, 500, init_params=init, extra_fields=("num_steps",)
    )
    found = np.asarray(mcmc.last_state.adapt_state.inverse_mass_matrix)
    expected = np.exp(np.linspace(-4.0, 4.0, 12))
    assert np.all(np.abs(np.log(found / expected)) < np.log(1.5))
    v = draws["v"][0].swapaxes(0, 1) - np.asarray(init["v"])[:, None]
    assert effective_sample_size(v).min() > 150
    if "MCLMC" in name:
        length = mcmc.last_state.adapt_state.trajectory_length
        assert abs(length / 12**0.5 - (1.5 if name == "MCLMC" else 1.0)) < 0.1


def test_a_divergence_does_not_stop_a_row_for_good():
    """The slice of a rejected row is multiplied by 0·exp(ΔH), and must not turn NaN."""

    def model(num_rows=200):
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", ebm.Lebesgue())
            ebm.energy("E", jnp.where(v < 1.5, 0.5 * v**2, jnp.inf))

    kernel = ebm.UnderdampedLangevin(ebm.fixed(model, {}), step_size=0.8)
    mcmc, draws = run(kernel, 400, 0, init_params={"v": jnp.zeros(200)})
    v = draws["v"][0]
    assert mcmc.get_extra_fields()["diverging"].sum() > 1_000
    assert np.all(np.isfinite(mcmc.last_state.memory[1]))
    assert np.all(np.any(v[-50:] != v[-1], 0))
    # N(0, 1) below 1.5: the mean is -φ(1.5) / Φ(1.5).
    assert_mean(v[50:].T, -stats.norm.pdf(1.5) / stats.norm.cdf(1.5))


def test_hamiltonian_and_potential_energy():
    _, state, later = _two_states(ebm.UnderdampedLangevin(ebm.fixed(skewed, {}), step_size=0.3))
    kinetic = np.asarray(later.energy - later.potential_energy)
    expected = sum(0.5 * np.sum(np.square(m).reshape(20, -1), -1) for m in later.memory[0].values())
    np.testing.assert_allclose(kinetic, expected, rtol=1e-3, atol=1e-4)
    assert np.all(state.energy > state.potential_energy)


def _two_states(kernel):
    state = kernel.init(jax.random.key(0), 0, None, (), {})
    return kernel, state, jax.jit(lambda s: kernel.sample(s, (), {}))(state)


@pytest.mark.slow
def test_unadjusted_mclmc_meets_its_target_and_has_the_bias_it_says():
    def gaussian(num_rows=50):
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", ebm.Lebesgue((30,)))
            ebm.energy("E", 0.5 * jnp.sum(v**2, -1))

    variances = []
    for target in (5e-4, 5e-6):
        kernel = ebm.MCLMC(ebm.fixed(gaussian, {}), adjusted=False, target_energy_variance=target)
        _, draws = run(kernel, 800, 400)
        variances.append(float(np.var(draws["v"])))
    assert 0.01 < 1 - variances[0] < 0.035
    assert abs(1 - variances[1]) < 0.008


def test_mclmc_trajectories():
    """Their numbers of steps run evenly from 1 to 19, mean L/ε, up to the bound."""
    kernel = ebm.MCLMC(
        ebm.fixed(skewed, {}), step_size=0.1, trajectory_length=1.0, max_num_steps=15
    )
    mcmc, _ = run(kernel, 190, 0, extra_fields=("num_steps",))
    steps = np.asarray(mcmc.get_extra_fields()["num_steps"])
    assert steps.min() == 1 and steps.max() == 15
    expected = np.minimum(np.arange(1, 20), 15).mean()
    assert abs(steps.mean() - expected) < 0.5


# Replica exchange

CENTRES = 3.0 * np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], -1)
WEIGHTS = np.array([1.0, 2, 1, 3, 1, 2, 1, 1]) / 12
WIDTH = 0.2  # neighbours are 11.5 widths apart: a barrier of 16 nats


def eight_modes(num_rows=40):
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue((2,)))
        squares = jnp.sum((v[:, None] - CENTRES) ** 2, -1) / WIDTH**2
        ebm.energy("E", -jax.scipy.special.logsumexp(-squares / 2 + jnp.log(WEIGHTS), axis=-1))


def chi_square(draws, weights):
    """p-value of the counts of modes against the weights, draws thinned to their effective size.

    :param draws: positions of shape (chains, draws, 2).
    """
    mode = np.argmin(np.sum((draws[:, :, None] - CENTRES) ** 2, -1), -1)
    indicators = (mode[..., None] == np.arange(8)).astype(float)
    ess = effective_sample_size(indicators + 1e-9 * np.arange(mode.shape[1])[:, None]).min()
    thin = max(1, int(np.ceil(mode.size / ess)))
    counts = np.bincount(mode[:, ::thin].ravel(), minlength=8)
    return stats.chisquare(counts, counts.sum() * weights).pvalue, counts


def test_replica_exchange_finds_the_modes_and_mala_does_not():
    model = ebm.fixed(eight_modes, {})
    start = {"v": jnp.zeros((40, 2)) + jnp.asarray(CENTRES[0])}  # all in one mode
    mcmc, draws = run(
        ebm.ReplicaExchange(model, num_replicas=6, min_inverse_temperature=0.02),
        3_000,
        600,
        init_params=start,
        thinning=3,
    )
    v = draws["v"][0].swapaxes(0, 1)
    pvalue, counts = chi_square(v, WEIGHTS)
    assert counts.sum() > 400 and counts.min() > 10
    assert 0.005 < pvalue
    assert chi_square(v, np.full(8, 1 / 8))[0] < 1e-4  # unequal weights are told apart
    state = mcmc.last_state
    rates = np.asarray(state.mean_swap_prob)
    assert rates.shape == (5,) and rates.min() > 0.2 and np.ptp(rates) < 0.25
    assert np.all(state.round_trips > 20)
    assert state.adapt_state.inverse_temperatures[0] == 1
    np.testing.assert_allclose(state.adapt_state.inverse_temperatures[-1], 0.02, rtol=1e-6)
    assert "swap rates" in mcmc.sampler.get_diagnostics_str(state)

    _, draws = run(ebm.MALA(model), 3_000, 600, init_params=start)
    mode = np.argmin(np.sum((draws["v"][0][:, :, None] - CENTRES) ** 2, -1), -1)
    assert np.mean(mode == 0) > 0.95  # plain MALA stays where it started
    assert (
        stats.chisquare(
            np.bincount(mode[::50].ravel(), minlength=8) + 1e-9, WEIGHTS * mode[::50].size
        )[1]
        < 1e-12
    )


def test_only_energies_are_tempered():
    """N(1, 1) as base and an energy v²/2: at β the density is N(1/(1 + β), 1/(1 + β))."""

    def model(num_rows=30):
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", dist.Normal(1.0, 1.0))
            ebm.energy("E", 0.5 * v**2)

    kernel = ebm.ReplicaExchange(ebm.fixed(model, {}), [1.0, 0.5, 0.0], adapt_ladder=False)
    mcmc, draws = run(kernel, 2_000, 300, extra_fields=("memory",))
    replicas = np.asarray(mcmc.get_extra_fields()["memory"][0].position["v"])  # draws, K, rows
    for k, beta in enumerate((1.0, 0.5, 0.0)):
        chains = replicas[:, k].T
        assert_mean(chains, 1 / (1 + beta))
        assert_mean((chains - 1 / (1 + beta)) ** 2, 1 / (1 + beta))
    np.testing.assert_array_equal(replicas[:, 0], draws["v"][0])


def test_tempering_is_blackjax_shaped_and_swaps_by_turns():
    assert {"init", "build_kernel", "as_top_level_api"} <= set(dir(tempering))
    beta = jnp.array([1.0, 0.5, 0.25, 0.1])
    algorithm = tempering.as_top_level_api(
        lambda x: 0.0 * x, lambda x: -0.5 * x**2, beta, 1.0 / beta
    )
    state = algorithm.init(jnp.arange(4.0))
    assert state.replicas.loglikelihood.tolist() == [-0.0, -0.5, -2.0, -4.5]

    def step(state, key):
        state, info = algorithm.step(key, state)
        return state, (state.replicas.position, info.is_swapped, info.swap_probability)

    keys = jax.random.split(jax.random.key(0), 20_000)
    _, (x, swapped, probability) = lax.scan(step, state, keys)
    assert_mean(np.asarray(x)[None] ** 2, 1 / np.asarray(beta))
    assert not swapped[::2, 1].any() and not swapped[1::2, 0].any() and not swapped[1::2, 2].any()
    rates = np.asarray([swapped[::2, 0].mean(), swapped[1::2, 1].mean(), swapped[::2, 2].mean()])
    np.testing.assert_allclose(rates, probability.mean(0), atol=0.02)


def test_swaps_keep_replicas_together():
    replicas = tempering.Replica(
        {"v": jnp.arange(8.0).reshape(4, 2)}, *(jnp.arange(4.0) * s for s in (0.0, 100.0)), 0, 0
    )
    replicas = replicas._replace(logprior_grad=jnp.arange(4.0), loglikelihood_grad=jnp.arange(4.0))
    beta = jnp.array([1.0, 0.5, 0.2, 0.1])
    for parity, order in ((0, [1, 0, 3, 2]), (1, [0, 2, 1, 3])):
        new, label, probability, swapped = tempering.swap(
            jax.random.key(0), replicas, beta, parity, jnp.arange(4)
        )
        assert label.tolist() == order and probability.tolist() == [1.0] * 3
        np.testing.assert_array_equal(new.position["v"], replicas.position["v"][jnp.array(order)])
        assert new.loglikelihood.tolist() == [100.0 * k for k in order]
        assert new.logprior_grad.tolist() == order
        assert swapped.tolist() == [parity == 0, parity == 1, parity == 0]
    worse = replicas._replace(loglikelihood=-replicas.loglikelihood)
    _, label, probability, _ = tempering.swap(jax.random.key(0), worse, beta, 0, jnp.arange(4))
    assert label.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(probability, np.exp(-100 * -np.diff(beta)), rtol=1e-3)


def test_the_ladder_moves_to_equal_rejection():
    beta = jnp.array([1.0, 0.1, 0.05, 0.01])
    new = tempering.equal_rejection_ladder(beta, jnp.array([0.9, 0.1, 0.2]))
    assert np.all(np.diff(new) < 0) and new[0] == 1 and new[-1] == beta[-1]
    assert new[1] > 0.3 and new[2] > 0.1  # most of the way is between the first two
    even = tempering.equal_rejection_ladder(beta, jnp.full(3, 0.4))
    np.testing.assert_allclose(even, beta, rtol=1e-3)
    ended = tempering.equal_rejection_ladder(beta.at[-1].set(0.0), jnp.array([0.9, 0.1, 0.2]))
    assert ended[-1] == 0 and np.all(np.diff(ended) < 0)


# Annealing

MEANS, SHARES, SPREAD = np.array([[-2.0, 0.0], [2.0, 1.0]]), np.array([0.3, 0.7]), 0.3


def noised_mixture(sigma, num_rows=2_000):
    """A mixture of two Gaussians, noised: each variance grows by σ²."""
    variance = SPREAD**2 + sigma**2
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue((2,)))
        # Fresh constants: JAX keeps NumPy's in the first precision in which it meets them.
        means, shares = jnp.array(MEANS.tolist()), jnp.array(SHARES.tolist())
        squares = jnp.sum((v[:, None] - means) ** 2, -1)
        terms = -0.5 * squares / variance + jnp.log(shares) - jnp.log(variance)
        ebm.energy("E", -jax.scipy.special.logsumexp(terms, axis=-1))


@pytest.mark.parametrize("precision", ["float32", slow("float64")])
def test_annealing_of_a_mixture_whose_noised_scores_are_known(precision):
    sigma = np.geomspace(4.0, 0.1, 15)
    with enable_x64() if precision == "float64" else jax.default_matmul_precision("highest"):
        kernel = ebm.AnnealedLangevin(
            ebm.fixed(noised_mixture, {}), sigma, noise_argument="sigma", num_steps=60
        )
        _, draws = run(kernel, 2, 0)
        v = draws["v"][0]
        assert v.dtype == precision
        # Every draw is a run of its own: nothing is left of the one before.
        side = v[..., 0] > 0
        assert abs(np.corrcoef(side[0], side[1])[0, 1]) < 0.1
        rows = v.reshape(-1, 2)
        share = (rows[:, 0] > 0).mean()
        assert abs(share - 0.7) < 4.5 * (0.21 / len(rows)) ** 0.5 + 0.02
        near = rows[rows[:, 0] > 0] - MEANS[1]
        assert np.all(np.abs(near.mean(0)) < 0.03)
        # Denoised, the variance is SPREAD⁴ / (SPREAD² + σ²) and not SPREAD² + σ².
        expected = SPREAD**4 / (SPREAD**2 + sigma[-1] ** 2)
        assert np.all(np.abs(near.var(0) / expected - 1) < 0.1)


@pytest.mark.slow
def test_annealing_with_the_convention_of_mdsm():
    """Data at a point: MDSM's minimiser is s(z) = -(z - μ)/σ₀² for every level."""
    sigma_0, centre = 0.1, 2.0

    def learned(num_rows=3_000):
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", ebm.Lebesgue())
            ebm.energy("E", 0.5 * (v - centre) ** 2 / sigma_0**2)

    # It is the minimiser: the loss there is zero, as noise and score cancel row by row.
    def model(data):
        with numpyro.plate("data", len(data)):
            v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
            mean = numpyro.param("mean", centre)
            ebm.energy("E", 0.5 * (v - mean) ** 2 / sigma_0**2)

    objective = ebm.MultiscaleDenoisingScoreMatching(
        sigma_0, min_noise_scale=0.1, max_noise_scale=2.0, variance_reduction=False
    )
    loss = objective.loss(jax.random.key(0), {"mean": centre}, model, None, jnp.full(50, centre))
    assert abs(loss) < 1e-4
    levels = np.geomspace(2.0, 0.5, 5)
    options = {"noise_scale": sigma_0, "num_steps": 40, "step_size": 0.1}
    kernel = ebm.AnnealedLangevin(ebm.fixed(learned, {}), levels, denoise=False, **options)
    v = run(kernel, 1, 0)[1]["v"][0, 0]
    # At the last level the density is N(μ, σ_K²), wider by 1/(1 - r/2).
    assert abs(v.mean() - centre) < 4.5 * 0.5 / 3_000**0.5
    assert abs(v.var() / (0.25 / 0.95) - 1) < 0.12
    last = kernel.init(jax.random.key(0), 0, None, (), {}).adapt_state.step_size
    np.testing.assert_allclose(last, 0.1 * 0.5**2, rtol=1e-5)  # r σ²
    denoised = run(ebm.AnnealedLangevin(ebm.fixed(learned, {}), levels, **options), 1, 0)[1]["v"]
    np.testing.assert_allclose(denoised, centre, atol=1e-4)


@pytest.mark.slow
def test_annealing_by_temperatures_ends_with_the_noise_of_dsm():
    def learned(num_rows=3_000):
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", ebm.Lebesgue())
            ebm.energy("E", 0.5 * (v - 2.0) ** 2 / 0.1**2)

    options = {"inverse_temperatures": [1e-3, 1e-2, 0.1, 1.0], "num_steps": 40, "init_scale": 3.0}
    kernel = ebm.AnnealedLangevin(ebm.fixed(learned, {}), step_size=1e-3, **options)
    v = run(kernel, 1, 0)[1]["v"][0, 0]
    assert abs(v.mean() - 2) < 0.01
    assert abs(v.var() / (0.01 / 0.95) - 1) < 0.12
    kernel = ebm.AnnealedLangevin(
        ebm.fixed(learned, {}), step_size=1e-3, noise_scale=0.1, **options
    )
    np.testing.assert_allclose(run(kernel, 1, 0)[1]["v"], 2.0, atol=1e-4)


def test_annealed_is_blackjax_shaped():
    assert {"init", "build_kernel", "as_top_level_api"} <= set(dir(annealed))
    beta = jnp.array([0.1, 0.5, 1.0])
    algorithm = annealed.as_top_level_api(
        lambda x, b: -0.5 * b * jnp.sum((x - 1) ** 2), beta, 0.1 / beta, num_steps=50
    )
    state = jax.vmap(algorithm.init)(jnp.zeros((4_000, 1)))
    state, info = jax.vmap(algorithm.step)(jax.random.split(jax.random.key(0), 4_000), state)
    x = np.asarray(state.position[:, 0])
    assert not info.is_divergent.any()
    assert abs(x.mean() - 1) < 4.5 / 4_000**0.5 + 0.01
    assert abs(x.var() * 0.95 - 1) < 0.1
    np.testing.assert_allclose(state.logdensity, -0.5 * (x - 1) ** 2, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_annealing_in_a_block_of_gibbs(grbm):
    model = ebm.fixed(grbm.model, grbm.params)
    block = ebm.AnnealedLangevin(
        model, inverse_temperatures=[0.3, 1.0], num_steps=30, step_size=0.03, init_scale=2.0
    )
    _, draws = run(Gibbs([(block, ["v"]), (DiscreteGibbs(model), ["h"])]), 3_000, 100)
    mean, _, hidden = grbm.oracle.moments()
    assert_mean(draws["v"][:, :, 0], mean, num_errors=6.0)
    assert_mean(draws["h"][:, :, 0], hidden, num_errors=6.0)


# Parts


def test_per_row_takes_arguments_that_rows_share():
    rows = per_row(lambda x, beta: -beta * jnp.sum(x**2, -1))
    x = jnp.arange(6.0).reshape(3, 2)
    value, gradient = jax.vmap(jax.value_and_grad(rows), (0, None))(x, 0.5)
    np.testing.assert_allclose(value, -0.5 * jnp.sum(x**2, -1))
    np.testing.assert_allclose(gradient, -x)
    many = jax.vmap(jax.vmap(rows, (0, None)), (None, 0))(x, jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(many[1], 2 * many[0])
    with pytest.raises(ValueError, match="must not vary by row"):
        jax.vmap(rows)(x, jnp.ones(3))


def test_warm_up_windows():
    adaptation = Adaptation(200, acceptance_tuner(0.5), True, adapt_mass_matrix=True)
    state = adaptation.init(jnp.asarray(0.1), 30, 2, True, None)
    rng = np.random.default_rng(0)
    sd, shift = np.array([0.1, 3.0]), 100.0 * np.arange(30)[:, None]
    update = jax.jit(lambda i, s, x: adaptation.update(i, s, 0.5, lambda: x))
    for i in range(210):
        rows = jnp.asarray(shift + sd * rng.normal(size=(30, 2)), jnp.float32)
        if i == 200:
            last = state
        state = update(i, state, rows)
    np.testing.assert_allclose(state.inverse_mass_matrix, sd**2, rtol=0.15)
    jax.tree.map(np.testing.assert_array_equal, state, last)  # warm-up is over


def test_the_energy_error_tuner_finds_its_root():
    tuner = energy_error_tuner()
    rng = np.random.default_rng(0)
    state = tuner.init(jnp.asarray(0.1))
    update = jax.jit(tuner.update)
    for _ in range(300):  # the error is one at ε = 2
        state = update(state, (tuner.current(state) / 2.0) ** 6 * rng.chisquare(20) / 20)
    assert abs(tuner.final(state) / 2.0 - 1) < 0.05


# Bad input


def bits():
    with numpyro.plate("data", 1):
        h = numpyro.sample("h", ebm.Counting(2, (3,)))
        ebm.energy("E", -jnp.sum(h, -1))


def holes(num_rows=8):
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue((2,)))
        ebm.energy("bowl", 0.5 * jnp.sum(v**2, -1))
        ebm.energy("hole", jnp.where(jnp.arange(num_rows) == 5, jnp.inf, 0.0) + v[:, 0])


def cusp():
    with numpyro.plate("data", 1):
        v = numpyro.sample("v", ebm.Lebesgue((2,)))
        ebm.energy("E", jnp.sqrt(jnp.sum(v**2, -1)))


def scalar():
    with numpyro.plate("data", 1):
        v = numpyro.sample("v", ebm.Lebesgue())
        ebm.energy("E", 0.5 * v**2)


def init(kernel, num_warmup=10, params=None, **kwargs):
    return kernel.init(jax.random.key(0), num_warmup, params, (), kwargs)


@pytest.mark.parametrize("name", KERNELS)
def test_bad_models(name, grbm):
    with pytest.raises(
        ebm.ModelError, match=r"'h'.*discrete.*DiscreteLangevin.*BlockGibbs.*DiscreteGibbs"
    ):
        init(make(name, ebm.fixed(bits, {})))
    with pytest.raises(ebm.ModelError, match=r"'W', 'b', 'c', 'scale'.*fixed"):
        init(make(name, grbm.model))
    with pytest.raises(ebm.ModelError, match=r"not finite.*1 of 8 rows \(rows 5.*'hole'.*init_par"):
        if name == "ReplicaExchange":  # its replicas are 3 x 8 rows, told about at β = 1
            init(make(name, ebm.fixed(holes, {})))
        else:
            init(make(name, ebm.fixed(holes, {})))
    with pytest.raises(ebm.ModelError, match=r"gradient in \['v'\] is not"):
        init(make(name, ebm.fixed(cusp, {})), params={"v": jnp.zeros((1, 2))})
    with pytest.raises(ebm.ModelError, match=r"init_params.*'x'"):
        init(make(name, ebm.fixed(skewed, {})), params={"x": jnp.zeros(1)})


MODEL = ebm.fixed(skewed, {})


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: ebm.UnderdampedLangevin(MODEL, step_size=-1.0), "step_size.*positive"),
        (lambda: ebm.UnderdampedLangevin(MODEL, friction=0.0), "friction.*positive"),
        (lambda: ebm.UnderdampedLangevin(MODEL, target_accept_prob=1.0), "target_accept_prob"),
        (
            lambda: init(ebm.UnderdampedLangevin(MODEL), 0),
            "UnderdampedLangevin.*pass a `step_size`",
        ),
        (lambda: ebm.MCLMC(MODEL, 0.0), "step_size.*positive"),
        (lambda: ebm.MCLMC(MODEL, trajectory_length=0.0), "trajectory_length.*positive"),
        (lambda: ebm.MCLMC(MODEL, target_energy_variance=-1), "target_energy_variance.*positive"),
        (lambda: ebm.MCLMC(MODEL, max_num_steps=0), "max_num_steps.*positive"),
        (lambda: init(ebm.MCLMC(ebm.fixed(scalar, {}))), "single coordinate.*MALA"),
        (lambda: ebm.ReplicaExchange(MODEL, step_size=0.0), "step_size.*positive"),
        (lambda: ebm.ReplicaExchange(MODEL, [1.0]), "two or more"),
        (lambda: ebm.ReplicaExchange(MODEL, [0.9, 0.1]), "decrease from 1"),
        (lambda: ebm.ReplicaExchange(MODEL, [1.0, 0.1, 0.5]), "decrease from 1"),
        (lambda: ebm.ReplicaExchange(MODEL, [1.0, -0.1]), "at 0"),
        (lambda: ebm.ReplicaExchange(MODEL, num_replicas=1), "num_replicas.*2"),
        (lambda: ebm.ReplicaExchange(MODEL, min_inverse_temperature=0.0), "inverse_temperatures"),
        (lambda: init(ebm.ReplicaExchange(MODEL, [1.0, 0.0])), r"\['g', 'v'\] is flat"),
        (lambda: init(ebm.ReplicaExchange(MODEL), 0), "ReplicaExchange.*pass a `step_size`"),
        (lambda: ebm.AnnealedLangevin(MODEL), "either `noise_scales` or"),
        (lambda: ebm.AnnealedLangevin(MODEL, [1.0]), "noise_argument.*noise_scale"),
        (lambda: ebm.AnnealedLangevin(MODEL, [0.1, 1.0], noise_scale=0.1), "decreasing"),
        (lambda: ebm.AnnealedLangevin(MODEL, [1.0, 0.0], noise_scale=0.1), "positive and finite"),
        (lambda: ebm.AnnealedLangevin(MODEL, [1.0], noise_scale=-0.1), "noise_scale.*positive"),
        (lambda: ebm.AnnealedLangevin(MODEL, inverse_temperatures=[1.0]), "pass a `step_size`"),
        (
            lambda: ebm.AnnealedLangevin(MODEL, inverse_temperatures=[1.0, 0.1], step_size=1.0),
            "increasing",
        ),
        (
            lambda: ebm.AnnealedLangevin(
                MODEL, inverse_temperatures=[0.5, 2.0], step_size=1.0, noise_scale=0.1
            ),
            "end `inverse_temperatures` with 1",
        ),
        (
            lambda: ebm.AnnealedLangevin(
                MODEL, inverse_temperatures=[1.0], step_size=1.0, noise_argument="sigma"
            ),
            "goes with `noise_scales`",
        ),
        (
            lambda: init(
                ebm.AnnealedLangevin(ebm.fixed(noised_mixture, {}), [1.0], noise_argument="sigma"),
                sigma=1.0,
            ),
            "leave it to the kernel",
        ),
    ],
)
def test_bad_options(build, message):
    with pytest.raises(ebm.ModelError, match=message):
        build()


def test_replica_exchange_is_no_block_of_gibbs(grbm):
    model = ebm.fixed(grbm.model, grbm.params)
    kernel = Gibbs([(ebm.ReplicaExchange(model), ["v"]), (DiscreteGibbs(model), ["h"])])
    with pytest.raises(ebm.ModelError, match="cannot be a block of `Gibbs`"):
        run(kernel, 5, 5)
    clamped = handlers.condition(model, {"h": jnp.ones((1, 3), int)})
    _, draws = run(ebm.ReplicaExchange(clamped), 5, 5)  # conditioned once and for all it may be
    assert draws["v"].shape == (1, 5, 1, 2)
