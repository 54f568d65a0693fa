# SPDX-License-Identifier: Apache-2.0
"""Particles refined by Langevin steps."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from jax.nn import sigmoid
from marginal_cases import W, bound, estimates, lateral_in_a_plate
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
