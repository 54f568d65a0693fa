# SPDX-License-Identifier: Apache-2.0
"""Block Gibbs under MCMC, in contrastive divergence and in Gibbs; what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from conftest import assert_mean, enable_x64
from gibbs_cases import moments_of
from jax import lax
from numpyro import handlers
from numpyro.infer import MCMC, Gibbs, init_to_value

import numpyro_ebm as ebm
from numpyro_ebm.mcmc.block_gibbs import BlockGibbs
from numpyro_ebm.samplers import block_gibbs
from numpyro_ebm.samplers.gibbs_blocks import plan_block


def test_contrastive_divergence_asks_inside_jit_with_traced_parameters(grbm):
    params = {k: jnp.asarray(x, jnp.float32) for k, x in grbm.params.items()}
    data = jnp.asarray(grbm.data, jnp.float32)

    @jax.jit
    def chains(rng_key, params):
        def model():
            return ebm.models.grbm(num_hidden=3, num_rows=len(data))

        kernel = BlockGibbs(ebm.fixed(model, params))
        state = kernel.init(rng_key, 0, {"v": data}, (), {})
        start = state.z
        sample = lambda _, s: kernel.sample(s, (), {})  # noqa: E731
        return start, lax.fori_loop(0, 300, sample, state)

    start, state = chains(jax.random.key(0), params)
    np.testing.assert_array_equal(start["v"], data)
    assert state.i == 300 and state.potential_energy.shape == (5,)
    energy = -grbm.oracle.log_joint(state.z["v"], state.z["h"])
    np.testing.assert_allclose(state.potential_energy, energy, rtol=1e-4)
    moved = {**params, "b": params["b"] + 100.0}
    assert np.all(chains(jax.random.key(0), moved)[1].z["v"] > 80.0)


def test_starting_from_data_keeps_the_hidden_units_in_step(grbm):
    """With v clamped the hidden units are drawn from their posterior in one sweep."""
    clamped = handlers.condition(
        ebm.fixed(grbm.model, grbm.params), {"v": jnp.array([[0.5, -1.0]])}
    )
    _, draws = moments_of(BlockGibbs(clamped), 4_000)
    expected = grbm.oracle.posterior_mean(np.array([[0.5, -1.0]]))[0]
    error = np.sqrt(expected * (1 - expected) / 4_000)
    assert np.all(np.abs(draws["h"][:, 0].mean(0) - expected) < 4.5 * error)


@pytest.mark.filterwarnings("ignore:Some donated buffers:UserWarning")  # NumPyro's, under vmap
@pytest.mark.parametrize(
    "method",
    ["vectorized", *(pytest.param(m, marks=pytest.mark.slow) for m in ("sequential", jax.vmap))],
)
def test_chain_methods(method, grbm):
    kernel = BlockGibbs(ebm.fixed(grbm.model, grbm.params))
    options = {"num_warmup": 5, "num_samples": 30, "num_chains": 2, "progress_bar": False}
    mcmc = MCMC(kernel, chain_method=method, **options)
    init = {"v": jnp.array([[[5.0, 5.0]], [[-5.0, -5.0]]])}
    mcmc.run(jax.random.key(0), init_params=init)
    draws = mcmc.get_samples(group_by_chain=True)
    assert draws["v"].shape == (2, 30, 1, 2) and draws["h"].shape == (2, 30, 1, 3)
    assert not np.allclose(draws["v"][0], draws["v"][1])


def test_float64_and_deterministic_sites():
    def model():
        with numpyro.plate("data", 30):
            v = numpyro.sample("v", ebm.Lebesgue((2,)))
            numpyro.deterministic("square", v**2)
            ebm.energy("E", jnp.sum((v - 1) ** 2, -1))

    with enable_x64():
        _, draws = moments_of(BlockGibbs(ebm.fixed(model, {})), 100)
        assert draws["v"].dtype == "float64"
        np.testing.assert_allclose(draws["square"], draws["v"] ** 2, rtol=1e-12)
        assert_mean(draws["v"].swapaxes(0, 1), 1.0)


def skewed():
    """A Gumbel scalar g with a bit and a Gaussian that lean on it."""
    with numpyro.plate("data", 20):
        g = numpyro.sample("g", ebm.Lebesgue())
        v = numpyro.sample("v", ebm.Lebesgue())
        bit = numpyro.sample("bit", ebm.Counting(2))
        ebm.energy("E", g + jnp.exp(-g) + 0.5 * (v - g) ** 2 - bit * 0.5)


@pytest.mark.slow
def test_a_block_of_gibbs_beside_mala():
    model = ebm.fixed(skewed, {})
    with pytest.raises(ebm.ModelError, match=r"\['g'\].*Gibbs\(\[\(MALA\(model\), \['g'\]\)"):
        moments_of(BlockGibbs(model), 5)
    kernel = Gibbs([(ebm.MALA(model), ["g"]), (BlockGibbs(model), ["v", "bit"])])
    mcmc = MCMC(kernel, num_warmup=300, num_samples=1_500, progress_bar=False)
    mcmc.run(jax.random.key(0))
    g, v, bit = (np.asarray(mcmc.get_samples()[k]).T for k in ("g", "v", "bit"))
    assert_mean(g, np.euler_gamma)
    assert_mean(np.exp(-g), 1.0)
    assert_mean(v - g, 0.0)
    assert_mean((v - g) ** 2, 1.0)
    assert_mean(bit, 1 / (1 + np.exp(-0.5)))


def test_refresh_recomputes_what_depends_on_the_conditioning(grbm):
    def conditional(h=None):
        return handlers.condition(ebm.fixed(grbm.model, grbm.params), {"h": h})()

    kernel, states = BlockGibbs(conditional), [jnp.zeros((1, 3), int), jnp.ones((1, 3), int)]
    init = {"v": jnp.ones((1, 2))}
    fresh = [kernel.init(jax.random.key(0), 5, init, (), {"h": h}) for h in states]
    assert fresh[0].potential_energy != fresh[1].potential_energy
    moved = kernel.refresh(fresh[0], (), {"h": states[1]})
    np.testing.assert_allclose(moved.potential_energy, fresh[1].potential_energy, rtol=1e-5)
    wrapped = kernel.wrap_model(lambda m: m)
    assert wrapped is not kernel and wrapped.model is conditional
    assert "conditionals" in kernel.get_diagnostics_str(moved)


def test_the_sampler_is_blackjax_shaped():
    def log_density(x):
        return jnp.sum(x["h"] * x["v"] - 0.5 * x["v"] ** 2, -1)

    position = {"v": jnp.zeros((3, 2)), "h": jnp.ones((3, 2), int)}
    blocks = [plan_block(log_density, position, [k], {"h": [0, 1]}) for k in "vh"]
    algorithm = block_gibbs.as_top_level_api(log_density, blocks)
    state, info = jax.jit(algorithm.step)(jax.random.key(0), algorithm.init(position))
    assert isinstance(state, block_gibbs.BlockGibbsChainState) and state.logdensity.shape == (3,)
    assert isinstance(info, block_gibbs.BlockGibbsInfo) and not info.is_divergent.any()
    assert state.position["h"].dtype == position["h"].dtype


def continuous(energy, support=dist.constraints.real):
    def model():
        with numpyro.plate("data", 2):
            v = numpyro.sample("v", ebm.Lebesgue((), support))
            w = numpyro.sample("w", ebm.Lebesgue())
            h = numpyro.sample("h", ebm.Counting(2))
            ebm.energy("E", energy(v, w, h))

    return ebm.fixed(model, {})


def poisson():
    with numpyro.plate("data", 2):
        n = numpyro.sample("n", dist.Poisson(2.0))
        ebm.energy("E", 0.1 * n)


def bowl(v, w, h):
    return v**2 + w**2 + h


def run(kernel, **options):
    return moments_of(kernel, 3, **options)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: run(BlockGibbs(continuous(lambda v, w, h: v**4 + w**2 + h))),
            r"\['v'\] are not.*degree 4.*MALA\(model\), \['v'\]\), \(BlockGibbs\(model\), "
            r"\['h', 'w'\]",
        ),
        (lambda: run(BlockGibbs(continuous(lambda v, w, h: v + w**2))), r"\['v'\].*does not bend"),
        (
            lambda: run(BlockGibbs(continuous(lambda v, w, h: w**2 - v**2))),
            "'v'.*positive definite",
        ),
        (
            lambda: run(BlockGibbs(continuous(bowl, dist.constraints.positive))),
            "'v'.*Positive.*MALA",
        ),
        (
            lambda: run(BlockGibbs(continuous(bowl), [["v", "h"], ["w"]])),
            "real.*'v'.*'h'.*together",
        ),
        (
            lambda: run(
                BlockGibbs(continuous(lambda v, w, h: v**2 * (1 + w**2)), [["v", "w"], "h"])
            ),
            "sequence of sequences",
        ),
        (
            lambda: run(
                BlockGibbs(continuous(lambda v, w, h: v**2 * (1 + w**2)), [["v", "w"], ["h"]])
            ),
            r"\['v', 'w'\] are not jointly Gaussian.*degree 4",
        ),
        (lambda: run(BlockGibbs(continuous(bowl), ["v", "w", "h"])), "sequence of sequences"),
        (lambda: run(BlockGibbs(continuous(bowl), [["v"], ["h"]])), r"\['w'\] are missing"),
        (lambda: run(BlockGibbs(continuous(bowl), [["v"], ["w", "h", "v"]])), r"\['v'\] are"),
        (lambda: run(BlockGibbs(continuous(bowl), [["v", "w", "h", "x"]])), r"\['x'\] are"),
        (lambda: run(BlockGibbs(ebm.fixed(poisson, {}))), "'n'.*Poisson.*finite"),
        (lambda: run(BlockGibbs(ebm.models.grbm)), "'W', 'b', 'c', 'scale'.*fixed"),
        (
            lambda: run(BlockGibbs(continuous(bowl)), init_params={"x": jnp.ones(2)}),
            "init_params.*'x'",
        ),
        (
            lambda: run(BlockGibbs(continuous(bowl)), init_params={"v": jnp.ones(3)}),
            r"init_params.*'v' the shape \(3,\)",
        ),
        (
            lambda: run(
                BlockGibbs(
                    continuous(bowl),
                    init_strategy=init_to_value(values={"v": jnp.full(2, jnp.inf)}),
                )
            ),
            "not finite at the initial.*init_strategy",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ebm.ModelError, match=message):
        make()
