# SPDX-License-Identifier: Apache-2.0
"""Particles refined by Langevin steps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from jax.nn import sigmoid
from marginal_cases import W, bound, estimates, lateral_in_a_plate
from numpyro.distributions import constraints
from oracles import assert_unbiased, draws, z_scores

import numpyro_ebm as ebm
from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.model.reading import read_model

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.slow
def test_langevin_steps_move_a_wrong_guide_to_the_posterior():
    system = oracles.linear_system(num_rows=2)._replace(guide=oracles.linear_guide(shift=1.0))
    wrong, expected = estimates(ebm.VaGES(2), system, 2)
    z = z_scores(draws(wrong, jax.random.key(0), 2_000), expected)
    assert np.max(np.abs(z)) > 20
    refine = ebm.LangevinRefinement(num_steps=60, step_size=0.15, adjusted=True)
    moved, _ = estimates(ebm.VaGES(2, refine=refine), system, 2)
    assert_unbiased(draws(moved, jax.random.key(1), 4_000), expected, "refined")


def bowls(data):
    """One unit beside each of two, which it follows at another rate in every row."""
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue((2,)), obs=data)
        h = numpyro.sample("h", ebm.Lebesgue((2,)))
        ebm.energy("E", 0.5 * jnp.sum((h - v) ** 2, -1) + 0.5 * jnp.sum(v**2, -1))


REFINEMENTS = {
    "Langevin": ebm.LangevinRefinement(4, 0.2),
    "kernel": ebm.KernelRefinement(partial(ebm.ULA, step_size=0.2), 4),
}


@pytest.mark.parametrize("name", REFINEMENTS)
def test_refinement_takes_its_steps_each_with_noise_of_its_own(name):
    """h' = h + ε (v - h) + √(2ε) ξ, four times, from where the particles are, at the given v."""
    row_model = read_model(bowls, (jnp.zeros((3, 2)),))
    visible = {"v": jnp.arange(6.0).reshape(3, 2)}
    start = jnp.broadcast_to(jnp.array([4.0, -3.0]), (4_000, 3, 2))
    moved = REFINEMENTS[name](jax.random.key(5), row_model, {}, visible, {"h": start})["h"]
    shrinks = 0.8 ** np.arange(5)
    mean = visible["v"] + shrinks[4] * (start[0] - visible["v"])
    variance = 0.4 * np.sum(shrinks[:4] ** 2)
    gap = (moved.mean(0) - mean) / np.sqrt(variance / len(moved))
    assert np.max(np.abs(gap)) < 4.5
    ratio = moved.var(0) / variance
    assert np.max(np.abs(ratio - 1)) < 4.5 * np.sqrt(2 / len(moved))


def test_langevin_refinement_refuses_discrete_latents():
    system = oracles.grbm_system()
    with pytest.raises(ebm.ModelError, match="'h' is discrete.*continuous"):
        bound(
            ebm.VaGES(2, refine=ebm.LangevinRefinement()), system, jax.random.key(0), system.params
        )


def test_a_guide_over_all_latents_but_the_visible_plate_works_for_lateral_plates():
    """What `Enumerated` refuses, units of a plate coupled from outside it, VaGES serves."""
    posterior = np.array([0.3, -0.1]) @ W

    def guide(data):
        with numpyro.plate("data", len(data), dim=-1):
            v = ebm.visible("v", data)
            with numpyro.plate("hidden", 2, dim=-2):
                numpyro.sample("h", dist.Bernoulli(logits=(v @ W).T))

    data = jnp.asarray(np.array([[0.3, -0.1]]))
    row_model = read_model(lateral_in_a_plate, (data,))
    reader = Guide(guide, row_model, (data,), {})

    def score(rng_key):
        estimate = ebm.VaGES(2).bind(
            rng_key, row_model, reader, {}, row_model.unconstrain_visible()
        )
        return estimate.score(row_model.unconstrain_visible())

    expected = W @ sigmoid(posterior) - data[0]
    assert_unbiased(draws(score, jax.random.key(0), 2_000), expected, "lateral plate")


# Steps of any kernel


def off_the_data(system, num_rows):
    """A row model read at other visible values than those it is asked at."""
    data = np.random.default_rng(5).normal(size=(num_rows, 2))
    return read_model(system.model, (jnp.asarray(data) + 3.0,), {}, system.params), data


def test_sweeps_end_at_the_posterior_given_the_values_at_hand():
    """A sweep over units that are independent given v forgets where it began."""
    system, num = oracles.grbm_system(), 4_000
    row_model, v = off_the_data(system, 5)
    refine, p = ebm.KernelRefinement(ebm.BlockGibbs), system.params
    start = {"h": jnp.zeros((num, 5, np.size(p["c"])), int)}
    refined = oracles.jit(lambda key: refine(key, row_model, p, {"v": jnp.asarray(v)}, start))
    found = refined(jax.random.key(0))["h"]
    assert found.dtype == start["h"].dtype
    law = np.asarray(sigmoid(v @ p["W"] + p["c"]))
    z = (np.mean(found, 0) - law) / np.sqrt(law * (1 - law) / num)
    assert np.abs(z).max() < 4.0


def rates(v, x):
    """h ~ Gamma(2, 1.5), v | h ~ Exp(h x), with covariates x."""
    with numpyro.plate("data", len(v)):
        h = numpyro.sample("h", ebm.Lebesgue(support=constraints.positive))
        v = numpyro.sample("v", ebm.Lebesgue(support=constraints.positive), obs=v)
        ebm.energy("E", 1.5 * h - jnp.log(h) - jnp.log(h * x) + h * x * v)


@pytest.mark.slow
def test_steps_of_a_kernel_on_a_positive_latent_with_covariates():
    """h | v ~ Gamma(3, 1.5 + x v), for 200 rows that each have a covariate."""
    rng = np.random.default_rng(0)
    v, x = rng.exponential(1.0, 200), rng.uniform(0.5, 2.0, 200)
    row_model = read_model(rates, (jnp.ones(200), jnp.asarray(x)))
    refine = ebm.KernelRefinement(partial(ebm.MALA, step_size=0.3), 60)
    start = {"h": jnp.ones((100, 200))}
    refined = oracles.jit(lambda key: refine(key, row_model, {}, {"v": jnp.asarray(v)}, start)["h"])
    beta = 1.5 + x * v
    z = np.mean((refined(jax.random.key(1)) * beta - 3.0) / np.sqrt(3.0), 0) * 10.0
    assert np.abs(z).max() < 4.5 and abs(z.mean()) < 4 / np.sqrt(200)
    assert 0.6 < np.mean(z**2) < 1.4


@pytest.mark.slow
def test_sweeps_take_the_bias_of_a_guide_away():
    """VaGES with coins for a guide, whose score and gradient are those of the posterior after."""
    system = oracles.grbm_system(num_rows=2)

    def coins(data, **sizes):
        with numpyro.plate("data", len(data)):
            v = ebm.visible("v", data)
            probs = 0.5 + 0 * v[:, :1] + jnp.zeros(np.size(system.params["c"]))
            numpyro.sample("h", dist.Bernoulli(probs).to_event(1))

    system = system._replace(guide=coins)
    wrong, expected = estimates(ebm.VaGES(2), system, 2)
    assert np.max(np.abs(z_scores(draws(wrong, jax.random.key(0), 1_000), expected))) > 10
    refine = ebm.KernelRefinement(ebm.BlockGibbs, 1)
    moved, _ = estimates(ebm.VaGES(2, refine=refine), system, 2)
    assert_unbiased(draws(moved, jax.random.key(1), 4_000), expected, "refined")


def signed(v):
    with numpyro.plate("data", len(v)):
        s = numpyro.sample("s", ebm.Counting())
        h = numpyro.sample("h", ebm.Lebesgue())
        v = numpyro.sample("v", ebm.Lebesgue(), obs=v)
        ebm.energy("E", 0.5 * h**2 + 0.5 * (v - (2 * s - 1) * h) ** 2)


@pytest.mark.slow
def test_a_kernel_that_sums_latents_out_is_refused():
    v = jnp.ones(2)
    row_model = read_model(signed, (v,))
    latent = {"s": jnp.zeros((2, 2), int), "h": jnp.zeros((2, 2))}
    refine = ebm.KernelRefinement(partial(ebm.MALA, step_size=0.1))
    with pytest.raises(ebm.ModelError, match=r"KernelRefinement: MALA sums.*\['s'\] out"):
        refine(jax.random.key(0), row_model, {}, {"v": v}, latent)


def test_a_kernel_itself_is_no_function_that_makes_one():
    with pytest.raises(ebm.ModelError, match="KernelRefinement: `kernel` must be a function"):
        ebm.KernelRefinement(ebm.BlockGibbs(oracles.grbm))
