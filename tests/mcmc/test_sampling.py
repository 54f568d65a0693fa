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
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS, DiscreteGibbs, Gibbs, init_to_value

import numpyro_ebm as ebm
from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.model.reading import read_model
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


def run(kernel, num_samples=2_000, num_warmup=500, seed=0, num_chains=1, **options):
    kwargs = {k: options.pop(k) for k in ("num_rows", "init_params") if k in options}
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
    mcmc.run(jax.random.key(seed), **kwargs)
    return mcmc, {k: np.asarray(x) for k, x in mcmc.get_samples(group_by_chain=True).items()}


# Rows


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


# Kernels


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


def test_rows_accept_on_their_own():
    mcmc, _ = run(ebm.MALA(ebm.fixed(skewed, {})), num_samples=200, num_warmup=300, num_rows=1_000)
    accept = np.asarray(mcmc.get_extra_fields()["accept_prob"])
    assert abs(accept.mean() - 0.574) < 0.05
    assert accept.std(1).mean() > 0.1
    state = mcmc.last_state
    assert state.adapt_state.step_size.shape == () and state.i == 500


def test_adaptation_ends_with_the_warm_up_and_can_be_switched_off():
    kernel = ebm.MALA(ebm.fixed(skewed, {}), step_size=0.3, adapt_step_size=False)
    mcmc, _ = run(kernel, num_samples=20, num_warmup=20)
    np.testing.assert_allclose(mcmc.last_state.adapt_state.step_size, 0.3)
    kernel = ebm.MALA(ebm.fixed(skewed, {}))
    mcmc = MCMC(kernel, num_warmup=100, num_samples=50, progress_bar=False)
    mcmc.run(jax.random.key(0), extra_fields=("adapt_state.step_size",))
    sizes = np.asarray(mcmc.get_extra_fields()["adapt_state.step_size"])
    assert np.ptp(sizes) == 0 and sizes[0] != 0.1
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(jax.random.key(1))
    np.testing.assert_allclose(mcmc.last_state.adapt_state.step_size, sizes[0])


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
    np.testing.assert_allclose(moved.z_grad["v"], fresh[1].z_grad["v"], rtol=1e-5)
    wrapped = kernel.wrap_model(lambda m: m)
    assert wrapped is not kernel and wrapped.model is conditional


def improper(num_rows=1):
    with numpyro.plate("data", num_rows):
        v = numpyro.sample("v", ebm.Lebesgue())
        ebm.energy("E", jnp.log(v - 100.0))


def units(num_units=20):
    with numpyro.plate("data", 1):
        v = numpyro.sample("v", ebm.Lebesgue())
        h = numpyro.sample("h", ebm.Counting(2, (num_units,)))
        ebm.energy("E", 0.5 * v**2 - v * jnp.mean(h, -1) ** 2)


def bits():
    with numpyro.plate("data", 1):
        h = numpyro.sample("h", ebm.Counting(2, (3,)))
        ebm.energy("E", -h @ jnp.array([1.0, -1.0, 0.5]) - 0.5 * h[:, 0] * h[:, 1])


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


# Drawing in one call


def test_sample_draws_the_joint_of_visible_and_hidden_units(grbm):
    for model in (grbm.model, grbm.plate_model):
        fixed = ebm.fixed(model, grbm.params)
        draws = ebm.sample(jax.random.key(1), fixed, 4_000, num_chains=100)
        v, h = np.asarray(draws["v"])[:, 0], np.asarray(draws["h"])
        h = h[:, 0] if model is grbm.model else h[:, :, 0]
        assert v.shape == (4_000, 2) and h.shape == (4_000, 3)
        mean, _, hidden = grbm.oracle.moments()
        chains = lambda x: np.reshape(x, (100, 40, *x.shape[1:]))  # noqa: E731
        assert_mean(chains(v), mean)
        assert_mean(chains(h), hidden)
        # E[v h] = E[v E[h | v]]: h belongs to its v.
        expected = np.mean(v[:, :, None] * grbm.oracle.posterior_mean(v)[:, None, :], 0)
        product = v[:, :, None] * h[:, None, :]
        error = product.std(0) / np.sqrt(4_000)
        assert np.all(np.abs(product.mean(0) - expected) < 4.5 * error)


def test_sample_draws_discrete_models_exactly():
    states = (np.arange(8)[:, None] >> np.arange(3)) & 1
    energy = -states @ [1.0, -1.0, 0.5] - 0.5 * states[:, 0] * states[:, 1]
    probabilities = np.exp(-energy) / np.exp(-energy).sum()
    draws = np.asarray(ebm.sample(jax.random.key(0), ebm.fixed(bits, {}), 8_000)["h"])[:, 0]
    counts = np.bincount(draws @ [1, 2, 4], minlength=8)
    statistic = np.sum((counts - 8_000 * probabilities) ** 2 / (8_000 * probabilities))
    assert statistic < 7 + 4.5 * 14**0.5

    def scalar():
        with numpyro.plate("data", 1):
            a = numpyro.sample("a", ebm.Counting(3))
            b = numpyro.sample("b", ebm.Counting(2))
            ebm.energy("E", -0.7 * a * b)

    draws = ebm.sample(jax.random.key(0), ebm.fixed(scalar, {}), 2_000, num_warmup=50)
    a = np.asarray(draws["a"])[:, 0]
    weights = 1 + np.exp(0.7 * np.arange(3))
    error = a.std() / 2_000**0.5
    assert abs(a.mean() - np.arange(3) @ weights / weights.sum()) < 4.5 * error


def test_sample_draws_units_of_both_kinds_beside_each_other():
    """Event dimensions and a hidden plate, which are drawn one after the other."""

    def model():
        with numpyro.plate("data", 2, dim=-1):
            v = numpyro.sample("v", ebm.Lebesgue())
            g = numpyro.sample("g", ebm.Counting(3, (2,)))
            ebm.energy("E", 0.5 * v**2 - jnp.sin(v) * jnp.prod(g, -1))
            with numpyro.plate("units", 2, dim=-2):
                h = numpyro.sample("h", ebm.Counting())
                ebm.energy("E_h", -h * (jnp.cos(v) + 0.5 * jnp.sum(g, -1)))

    draws = ebm.sample(jax.random.key(0), ebm.fixed(model, {}), 4_000, num_chains=100)
    g = np.indices((3, 3)).reshape(2, -1).T
    v = np.asarray(draws["v"])[..., None]
    on = jax.nn.sigmoid(np.cos(v) + 0.5 * g.sum(-1))
    log_weights = np.sin(v) * g.prod(-1) - 2 * np.log1p(-on)
    weights = jax.nn.softmax(log_weights, -1)
    chains = lambda x: np.reshape(x, (100, 40, *x.shape[1:]))  # noqa: E731
    assert_mean(chains(draws["g"].prod(-1) - np.sum(weights * g.prod(-1), -1)), 0.0)
    h = draws["h"][:, 0] * draws["h"][:, 1]
    assert_mean(chains(h - np.sum(weights * on**2, -1)), 0.0)


def test_sample_composes_gibbs_where_units_cannot_be_enumerated():
    draws = ebm.sample(
        jax.random.key(0), ebm.fixed(units, {}), 400, num_chains=40, num_warmup=200, num_units=20
    )
    assert draws["h"].shape == (400, 1, 20) and draws["v"].shape == (400, 1)
    v, mean_h = np.asarray(draws["v"])[:, 0], np.asarray(draws["h"]).mean(-1)[:, 0]
    # v | h ~ N((mean h)², 1)
    chains = (v - mean_h**2).reshape(40, 10)
    assert_mean(chains, 0.0, min_ess=50)


def test_sample_given_observed_sites_and_a_kernel(grbm):
    fixed = ebm.fixed(grbm.model, grbm.params)
    clamped = handlers.condition(fixed, {"v": jnp.array([[0.5, -1.0]])})
    h = np.asarray(ebm.sample(jax.random.key(0), clamped, 4_000)["h"])[:, 0]
    expected = grbm.oracle.posterior_mean(np.array([[0.5, -1.0]]))[0]
    assert np.all(np.abs(h.mean(0) - expected) < 4.5 * np.sqrt(expected * (1 - expected) / 4_000))
    draws = ebm.sample(jax.random.key(0), fixed, 50, kernel=ebm.ULA(fixed, 0.01), num_warmup=10)
    assert draws["v"].shape == (50, 1, 2) and draws["h"].shape == (50, 1, 3)
    for options in ({"thinning": 0}, {"num_samples": 0}):
        with pytest.raises(ebm.ModelError, match=next(iter(options))):
            ebm.sample(jax.random.key(0), fixed, **{"num_samples": 5, **options})
    with pytest.raises(ebm.ModelError, match="fixed"):
        ebm.sample(jax.random.key(0), grbm.model, 5)


# Refinement of particles


def linear(data):
    w = numpyro.param("w", 1.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        h = numpyro.sample("h", dist.Normal(0.0, 1.0))
        ebm.energy("E", 0.5 * (v - w * h) ** 2)


def shifted(data):
    """A guide one unit off the posterior N(v / 2, 1 / 2) of w = 1."""
    with numpyro.plate("data", len(data)):
        v = ebm.visible("v", data)
        numpyro.sample("h", dist.Normal(v / 2 + 1.0, 0.5**0.5))


@pytest.mark.parametrize("adjusted", [False, True])
def test_refinement_moves_particles_to_the_posterior(adjusted):
    v = jnp.array([0.5, -1.0])
    row_model = read_model(linear, (v,), {}, {"w": 1.0})
    guide = Guide(shifted, row_model, (v,), {})
    means = []
    for refine in (None, ebm.LangevinRefinement(60, 0.05, adjusted=adjusted)):
        marginal = ebm.VaGES(2_000, refine=refine)
        estimate = marginal.bind(jax.random.key(0), row_model, guide, {"w": 1.0}, {"v": v}, order=1)
        means.append(estimate.score({"v": v})["v"] + v / 2)  # exact score: -v / 2
    assert jnp.all(jnp.abs(means[0]) > 0.9)
    assert jnp.all(jnp.abs(means[1]) < 0.07)


def test_refinement_refuses_what_it_cannot_do(grbm):
    marginal = ebm.VaGES(2, refine=ebm.LangevinRefinement())
    params = {**grbm.params, **grbm.exact_guide_params}
    with pytest.raises(ebm.ModelError, match="'h' is discrete"):
        ebm.DenoisingScoreMatching(0.1, marginal).loss(
            jax.random.key(0), params, grbm.model, grbm.guide, jnp.asarray(grbm.data)
        )
    for options in ({"num_steps": 0}, {"step_size": 0.0}):
        with pytest.raises(ebm.ModelError, match=next(iter(options))):
            ebm.LangevinRefinement(**options)
    with pytest.raises(ebm.ModelError, match="exclude each other"):
        ebm.VaGES(2, importance_weighted=True, refine=ebm.LangevinRefinement())


# ArviZ


def test_arviz_gets_energies_and_no_likelihood(grbm):
    import arviz as az

    fixed = ebm.fixed(grbm.model, grbm.params)
    mcmc, draws = run(ebm.MALA(fixed), num_chains=3, num_samples=40, num_warmup=40)
    idata = ebm.to_arviz(mcmc)
    groups = {
        str(g).strip("/") for g in (idata.groups() if callable(idata.groups) else idata.groups)
    }
    assert {"posterior", "sample_stats"} <= groups
    assert not {"log_likelihood", "observed_data"} & groups
    assert idata["posterior"]["v"].dims == ("chain", "draw", "data", "v_dim_0")
    energy = -grbm.oracle.log_marginal(draws["v"].reshape(-1, 2)).reshape(3, 40)
    stats = idata["sample_stats"]
    np.testing.assert_allclose(stats["energy"].values, energy, rtol=1e-4)
    assert stats["row_energy"].shape == (3, 40, 1) and stats["diverging"].shape == (3, 40)
    np.testing.assert_allclose(stats["lp"].values, -energy, rtol=1e-4)
    assert "v[0, 0]" in az.summary(idata).index

    row_model = ebm.sample(jax.random.key(0), fixed, 30)
    idata = ebm.to_arviz(row_model, fixed)
    v, h = np.asarray(row_model["v"])[:, 0], np.asarray(row_model["h"])[:, 0]
    expected = -grbm.oracle.log_joint(v, h)
    np.testing.assert_allclose(idata["sample_stats"]["energy"].values[0], expected, rtol=1e-4)
    assert idata["posterior"]["h"].dims == ("chain", "draw", "data", "h_dim_0")


def test_arviz_shows_what_was_observed(grbm):
    fixed = ebm.fixed(grbm.model, grbm.params)
    clamped = handlers.condition(fixed, {"h": jnp.ones((1, 3), int)})
    mcmc, _ = run(ebm.MALA(clamped), num_samples=20, num_warmup=20)
    np.testing.assert_array_equal(ebm.to_arviz(mcmc)["observed_data"]["h"].values, np.ones((1, 3)))
    kernel = Gibbs([(NUTS(fixed), ["v"]), (DiscreteGibbs(fixed), ["h"])])
    mcmc, _ = run(kernel, num_samples=20, num_warmup=20)
    assert ebm.to_arviz(mcmc)["sample_stats"]["energy"].shape == (1, 20)
    with pytest.raises(ebm.ModelError, match="arguments of its run.*unknown"):
        ebm.to_arviz(mcmc, unknown=1)
    with pytest.raises(ebm.ModelError, match="has not been run"):
        ebm.to_arviz(MCMC(ebm.MALA(fixed), num_warmup=1, num_samples=1))
    with pytest.raises(ebm.ModelError, match="model of the draws"):
        ebm.to_arviz({"v": jnp.ones((5, 1, 2))})
    with pytest.raises(ebm.ModelError, match="lack the site"):
        ebm.to_arviz({"h": jnp.ones((5, 1, 3), int)}, fixed)


def test_effective_sizes_are_not_an_excuse():
    """The tolerance of `assert_mean` is a standard error: a shifted mean fails it."""
    draws = np.random.default_rng(0).normal(size=(4, 1_000))
    assert effective_sample_size(draws) > 3_000
    assert_mean(draws, 0.0)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_mean(draws, 0.1)
