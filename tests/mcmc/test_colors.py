# SPDX-License-Identifier: Apache-2.0
"""Declared colours of discrete sites."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from discrete_cases import FIELD, Law, last

import numpyro_ebm as ebm
from numpyro_ebm.samplers import chromatic_gibbs
from numpyro_ebm.samplers.gibbs_blocks import plan_block


def running(num_rows=1):
    """A chain of spins through differences of a running sum: no rule knows it."""
    with numpyro.plate("data", num_rows):
        s = numpyro.sample("s", ebm.Counting(2, (6,)))
        neighbours = jnp.diff(jnp.cumsum(s * jnp.roll(s, 1, -1), -1), prepend=0.0)
        ebm.energy("E", -0.8 * jnp.sum(neighbours, -1) - s @ FIELD[:6])


@pytest.mark.slow
def test_declared_colors_are_used_and_tried():
    model = ebm.fixed(running, {})
    assert ebm.BlockGibbs(model).plan()[0].kind == "sequential"
    kernel = ebm.BlockGibbs(model, colors={"s": np.arange(6) % 2})
    assert kernel.plan()[0].colors.tolist() == [0, 1] * 3
    law = Law(lambda s: -0.8 * np.sum(s * np.roll(s, 1, -1), -1) - s @ FIELD[:6], 2, 6, "")
    assert abs(law.z_score(last(kernel, 10_000, 0, 15).z["s"])) < 4.5
    wrong = ebm.BlockGibbs(model, colors={"s": np.array([0, 1, 0, 1, 1, 2])})
    with pytest.raises(ebm.ModelError, match=r"units \(3,\) and \(4,\) of 's'.*interact"):
        last(wrong, 3, 0, 1)
    all_at_once = ebm.BlockGibbs(model, colors={"s": np.zeros(6, int)})
    with pytest.raises(ebm.ModelError, match="of 's'.*interact"):  # vectorised chains
        all_at_once.init(jax.random.split(jax.random.key(0), 2), 0, None, (), {})


@pytest.mark.slow
def test_a_weak_interaction_of_one_pair_is_found():
    def log_density(x):
        return 0.01 * x["s"][:, 3] * x["s"][:, 17] + jnp.sum(jnp.sin(x["s"]), -1)

    position = {"s": jnp.zeros((1, 30), int)}
    colors = {"s": np.zeros(30, int)}
    plan = plan_block(log_density, position, ["s"], {"s": np.arange(3)}, colors)
    assert chromatic_gibbs.find_interaction(jax.random.key(0), log_density, position, plan) == (
        3,
        17,
    )


@pytest.mark.parametrize(
    "colors, message",
    [
        ({"t": np.zeros(6, int)}, r"names 't'.*\['s'\]"),
        ({"s": np.zeros(5, int)}, r"shape \(5,\).*shape \(6,\)"),
        ({"s": np.zeros(6)}, "'s' must be integers"),
        ([0, 1], "dict of arrays"),
    ],
)
def test_bad_colors(colors, message):
    with pytest.raises(ebm.ModelError, match=message):
        last(ebm.BlockGibbs(ebm.fixed(running, {}), colors=colors), 3, 0, 1)
