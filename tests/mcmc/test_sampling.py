# SPDX-License-Identifier: Apache-2.0
"""Langevin kernels under NumPyro's MCMC and Gibbs, `sample`, refinement of particles, ArviZ."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import assert_mean, enable_x64
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, DiscreteGibbs, Gibbs, init_to_value
from sampling_cases import bits, run, units

import numpyro_ebm as ebm
from numpyro_ebm.samplers import langevin
from numpyro_ebm.samplers.per_row import per_row

COVARIANCE = np.array([[1.0, 0.8], [0.8, 2.0]])
PRECISION = np.linalg.inv(COVARIANCE)


KERNELS = {
    "MALA": lambda model: ebm.MALA(model),
    "ULA": lambda model: ebm.ULA(model, step_size=0.02),
}


def skewed(num_rows=20):
    """Asymmetric and correlated: a Gumbel scalar beside a correlated Gaussian, shifted by row."""
    shift = jnp.arange(num_rows, dtype=float) / num_rows
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue((2,)))
        g = numpyro.sample("g", ebm.Lebesgue())
        centred = v - shift[:, None]
        ebm.energy("E", 0.5 * jnp.einsum("ni,ij,nj->n", centred, PRECISION, centred))
        ebm.energy("F", g + jnp.exp(-g))


def positives(num_rows=10):
    with numpyro.plate("data", num_rows):
        r = numpyro.sample("r", ebm.Lebesgue((), dist.constraints.positive))
        p = numpyro.sample("p", ebm.Lebesgue((), dist.constraints.unit_interval))
        ebm.energy("E", -dist.Gamma(3.0, 2.0).log_prob(r) - dist.Beta(2.0, 3.0).log_prob(p))


def test_per_row_evaluates_the_plate_once():
    calls = []

    def log_density(x):
        calls.append(x["v"].shape)
        return -0.5 * jnp.sum(x["v"] ** 2, -1) + x["g"]

    x = {"v": jnp.arange(6.0).reshape(3, 2), "g": jnp.ones(3)}
    rows = per_row(log_density)
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(rows)))(x)
    assert calls == [(3, 2)]
    np.testing.assert_allclose(values, log_density(x))
    np.testing.assert_allclose(gradients["v"], -x["v"])
    chains = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), x)
    nested = jax.vmap(jax.vmap(rows))(chains)
    np.testing.assert_allclose(nested[1], log_density(jax.tree.map(lambda a: 2 * a, x)))
    assert np.isnan(rows({"v": jnp.ones(2), "g": jnp.array(1.0)}))


def test_ula_is_blackjax_shaped_and_biased_as_known():
    """Stationary variance 1 / (1 - ε/2) for N(0, 1)."""
    step_size = 0.5
    algorithm = langevin.as_top_level_api(lambda x: -0.5 * jnp.sum(x**2), step_size)
    state = jax.vmap(algorithm.init)(jnp.zeros((200, 1)))

    def step(state, key):
        state, info = jax.vmap(algorithm.step)(jax.random.split(key, 200), state)
        return state, (state.position[:, 0], info.is_divergent)

    _, (draws, divergent) = jax.lax.scan(step, state, jax.random.split(jax.random.key(0), 1_000))
    assert not divergent.any()
    draws = np.asarray(draws[50:]).T
    assert_mean(draws**2, 1 / (1 - step_size / 2))
    state = langevin.init(jnp.ones(3), lambda x: -0.5 * jnp.sum(x**2))
    assert isinstance(state, langevin.ULAState) and state.logdensity == -1.5
    assert {"init", "build_kernel", "as_top_level_api"} <= set(dir(langevin))


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", KERNELS)
def test_moments_of_asymmetric_and_correlated_targets(name, precision):
    with enable_x64() if precision == "float64" else jax.default_matmul_precision("highest"):
        mcmc, draws = run(KERNELS[name](ebm.fixed(skewed, {})), num_rows=40)
        v = draws["v"][0] - (np.arange(40.0) / 40)[:, None]
        v, g = v.swapaxes(0, 1), draws["g"][0].T  # rows are chains
        assert draws["v"].dtype == precision and draws["g"].dtype == precision
        assert_mean(v, 0.0)
        slack = {"num_errors": 4.0 if name == "MALA" else 5.0}
        assert_mean(v[..., 0] * v[..., 1], 0.8, **slack)
        assert_mean(v[..., 1] ** 2, 2.0, **slack)
        assert_mean(g, np.euler_gamma, **slack)
        assert_mean(np.exp(-g), 1.0, **slack)
        extra = mcmc.get_extra_fields()
        assert extra["potential_energy"].shape == (2_000, 40)
        assert extra["diverging"].mean() < 0.01


@pytest.mark.slow
def test_mala_is_exact_where_ula_is_not():
    """One step size for both: the variance of N(0, 1) tells a missing correction at once."""

    def gaussian():
        with numpyro.plate("data", 300):
            v = numpyro.sample("v", ebm.Lebesgue())
            ebm.energy("E", 0.5 * v**2)

    model = ebm.fixed(gaussian, {})
    for kernel, variance in (
        (ebm.MALA(model, step_size=1.0, adapt_step_size=False), 1.0),
        (ebm.ULA(model, step_size=1.0), 2.0),
    ):
        _, draws = run(kernel, num_samples=400, num_warmup=50)
        assert_mean(draws["v"][0].T ** 2, variance)


@pytest.mark.slow
def test_rows_accept_on_their_own():
    mcmc, _ = run(ebm.MALA(ebm.fixed(skewed, {})), num_samples=200, num_warmup=300, num_rows=1_000)
    accept = np.asarray(mcmc.get_extra_fields()["accept_prob"])
    assert abs(accept.mean() - 0.75) < 0.05
    assert accept.std(1).mean() > 0.1
    state = mcmc.last_state
    assert state.adapt_state.step_size.shape == (1_000,) and state.i == 500


@pytest.mark.slow
def test_adaptation_ends_with_the_warm_up_and_can_be_switched_off():
    kernel = ebm.MALA(ebm.fixed(skewed, {}), step_size=0.3, adapt_step_size=False)
    mcmc, _ = run(kernel, num_samples=20, num_warmup=20)
    np.testing.assert_allclose(mcmc.last_state.adapt_state.step_size, 0.3)
    kernel = ebm.MALA(ebm.fixed(skewed, {}))
    mcmc = MCMC(kernel, num_warmup=100, num_samples=50, progress_bar=False)
    mcmc.run(jax.random.key(0), extra_fields=("adapt_state.step_size",))
    sizes = np.asarray(mcmc.get_extra_fields()["adapt_state.step_size"])
    assert sizes.shape == (50, 20) and np.all(sizes[0] == sizes) and np.all(sizes != 0.1)
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(jax.random.key(1))
    np.testing.assert_array_equal(mcmc.last_state.adapt_state.step_size, sizes[0])


@pytest.mark.parametrize("name", KERNELS)
def test_constrained_sites_come_back_constrained_with_their_jacobian(name):
    _, draws = run(KERNELS[name](ebm.fixed(positives, {})), num_samples=3_000, num_rows=40)
    r, p = draws["r"][0].T, draws["p"][0].T
    assert r.min() > 0 and 0 < p.min() and p.max() < 1
    slack = {"num_errors": 4.0 if name == "MALA" else 6.0}
    assert_mean(r, 1.5, **slack)
    assert_mean(p, 0.4, **slack)
    assert_mean(p**2, 0.2, **slack)


@pytest.mark.filterwarnings("ignore:Some donated buffers:UserWarning")  # NumPyro's, under vmap
@pytest.mark.parametrize("method", ["sequential", "vectorized", jax.vmap])
def test_chain_methods(method):
    options = {"num_samples": 30, "num_warmup": 30, "num_chains": 2, "chain_method": method}
    mcmc, draws = run(ebm.MALA(ebm.fixed(skewed, {})), num_rows=5, **options)
    assert draws["v"].shape == (2, 30, 5, 2) and draws["g"].shape == (2, 30, 5)
    assert not np.allclose(draws["v"][0], draws["v"][1])
    _, again = run(ebm.MALA(ebm.fixed(skewed, {})), num_rows=5, **options)
    np.testing.assert_array_equal(draws["v"], again["v"])


@pytest.mark.slow
def test_deterministic_sites_and_hidden_plates():
    def model():
        with numpyro.plate("data", 30, dim=-1):
            v = numpyro.sample("v", ebm.Lebesgue())
            numpyro.deterministic("square", v**2)
            with numpyro.plate("units", 2, dim=-2):
                u = numpyro.sample("u", ebm.Lebesgue((2,)))
                ebm.energy("E_u", 0.5 * jnp.sum((u - v[:, None]) ** 2, -1))
            ebm.energy("E", 0.5 * v**2)

    _, draws = run(ebm.MALA(ebm.fixed(model, {})), num_samples=1_000)
    np.testing.assert_allclose(draws["square"], draws["v"] ** 2, rtol=1e-5)
    assert draws["u"].shape == (1, 1_000, 2, 30, 2)
    u, v = draws["u"][0][:, 0, :, 0].T, draws["v"][0].T
    assert_mean(u * v, 1.0)
    assert_mean(u**2, 2.0)


@pytest.mark.slow
def test_discrete_sites_are_summed_out(grbm):
    for model in (grbm.model, grbm.plate_model):
        mcmc, draws = run(ebm.MALA(ebm.fixed(model, grbm.params)), num_chains=20, num_samples=1_000)
        mean, second, _ = grbm.oracle.moments()
        assert set(draws) == {"v"}
        v = draws["v"][:, :, 0]
        assert_mean(v, mean)
        assert_mean(v[..., 0] * v[..., 1], second[0, 1])


@pytest.mark.parametrize("block", ["MALA", "ULA", "NUTS"])
def test_blocks_of_gibbs_beside_discrete_gibbs(grbm, block):
    model = ebm.fixed(grbm.model, grbm.params)
    first = {"MALA": ebm.MALA, "NUTS": NUTS, "ULA": lambda m: ebm.ULA(m, 0.1)}[block](model)
    kernel = Gibbs([(first, ["v"]), (DiscreteGibbs(model), ["h"])])
    _, draws = run(kernel, num_samples=8_000, num_warmup=300)
    mean, _, hidden = grbm.oracle.moments()
    slack = {"num_errors": 5.0 if block == "ULA" else 4.0}
    assert_mean(draws["v"][:, :, 0], mean, **slack)
    assert_mean(draws["h"][:, :, 0], hidden, **slack)


@pytest.mark.slow
def test_gibbs_hands_constrained_values_from_block_to_block():
    """r > 0 given a bit is Gamma(2 + 2 bit, 1), and the bit has the weights of their integrals."""

    def model():
        with numpyro.plate("data", 1):
            r = numpyro.sample("r", ebm.Lebesgue((), dist.constraints.positive))
            bit = numpyro.sample("bit", ebm.Counting(2))
            ebm.energy("E", r - (1 + 2 * bit) * jnp.log(r))

    fixed = ebm.fixed(model, {})
    kernel = Gibbs([(ebm.MALA(fixed), ["r"]), (DiscreteGibbs(fixed), ["bit"])])
    _, draws = run(kernel, num_samples=8_000, num_warmup=500)
    weights = np.array([1.0, 6.0]) / 7.0  # ∫ r^(1 + 2 bit) e^(-r) dr = 1, 6
    assert draws["r"].min() > 0
    assert_mean(draws["bit"][:, :, 0], weights[1])
    assert_mean(draws["r"][:, :, 0], weights @ [2.0, 4.0])


def test_refresh_recomputes_what_depends_on_the_conditioning(grbm):
    def conditional(h=None):
        return handlers.condition(ebm.fixed(grbm.model, grbm.params), {"h": h})()

    kernel = ebm.MALA(conditional)
    states = [jnp.zeros((1, 3), int), jnp.ones((1, 3), int)]
    init = {"v": jnp.ones((1, 2))}
    fresh = [kernel.init(jax.random.key(0), 5, init, (), {"h": h}) for h in states]
    assert fresh[0].potential_energy != fresh[1].potential_energy
    moved = kernel.refresh(fresh[0], (), {"h": states[1]})
    np.testing.assert_allclose(moved.potential_energy, fresh[1].potential_energy, rtol=1e-5)
    np.testing.assert_allclose(moved.energy, fresh[1].energy, rtol=1e-5)
    np.testing.assert_allclose(moved.z_grad["v"], fresh[1].z_grad["v"], rtol=1e-5)
    wrapped = kernel.wrap_model(lambda m: m)
    assert wrapped is not kernel and wrapped.model is conditional


def improper(num_rows=1):
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue())
        ebm.energy("E", jnp.log(v - 100.0))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ebm.MALA(skewed, step_size=0.0), "step_size.*positive"),
        (lambda: ebm.ULA(skewed, step_size=-1.0), "step_size.*positive"),
        (lambda: ebm.ULA(skewed, None), "step_size"),
        (lambda: ebm.MALA(skewed, target_accept_prob=1.0), "target_accept_prob"),
        (lambda: run(ebm.MALA(ebm.fixed(skewed, {})), num_warmup=0), "pass a `step_size`"),
        (lambda: run(ebm.MALA(skewed)), "not resolved.*fixed"),
        (lambda: run(ebm.MALA(ebm.models.grbm)), "'W', 'b', 'c', 'scale'.*fixed"),
        (lambda: run(ebm.MALA(ebm.fixed(bits, {}))), "'h'.*discrete.*DiscreteGibbs"),
        (lambda: run(ebm.MALA(ebm.fixed(units, {}))), r"Gibbs\(\[\(MALA.*DiscreteGibbs"),
        (
            lambda: run(ebm.MALA(ebm.fixed(improper, {}))),
            "not finite at the initial.*init_strategy",
        ),
        (
            lambda: run(ebm.MALA(ebm.fixed(skewed, {})), init_params={"x": jnp.ones(2)}),
            "init_params.*'x'",
        ),
    ],
)
def test_bad_input_of_kernels(make, message):
    with pytest.raises(ebm.ModelError, match=message):
        make()


def test_initial_values_can_be_given():
    strategy = init_to_value(values={"v": 101.0 * jnp.ones(1)})
    kernel = ebm.MALA(ebm.fixed(improper, {}), step_size=1e-6, init_strategy=strategy)
    _, draws = run(kernel, num_samples=5, num_warmup=0)
    np.testing.assert_allclose(draws["v"], 101.0, atol=0.1)


@pytest.mark.parametrize("is_annealed", [False, True])
def test_what_is_not_said_is_as_the_docstring_says(is_annealed, monkeypatch):
    """A hundred chains, 500 steps of warm-up, ten between draws; none where each step is a run."""

    def model(num_rows=1):
        with numpyro.plate("data", num_rows):
            v = numpyro.sample("v", ebm.Lebesgue())
            ebm.energy("E", 0.5 * v**2)

    def annealed(model):
        levels = {"inverse_temperatures": [0.5, 1.0], "step_size": 0.1}
        return ebm.AnnealedLangevin(model, num_steps=2, **levels)

    asked = {}

    def run_chains(*args, **options):
        asked.update(options)
        raise StopIteration

    monkeypatch.setattr("numpyro_ebm.mcmc.sampling.run_chains", run_chains)
    kernel = annealed if is_annealed else ebm.MALA
    with pytest.raises(StopIteration):
        ebm.sample(jax.random.key(5), ebm.fixed(model, {}), 250, kernel=kernel)
    expected = {"num_chains": 100, "num_warmup": 500, "num_draws": 3, "every": 10}
    if is_annealed:
        expected |= {"num_warmup": 0, "every": 1}
    assert {name: asked[name] for name in expected} == expected
