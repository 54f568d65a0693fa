# SPDX-License-Identifier: Apache-2.0
"""Options out of their range are refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest

import numpyro_ebm as ebm
from numpyro_ebm.errors import ModelError, check_fraction, check_integer, check_positive


@pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, True, "1", None, jnp.array(1), np.int64(0)])
def test_what_is_no_positive_integer(value):
    with pytest.raises(ModelError, match="NUTS: `num_steps` must be a positive integer, got"):
        check_integer("NUTS", num_chains=1, num_steps=value)


def test_integers_of_at_least():
    check_integer("VaGES", 2, num_particles=2)
    check_integer("Unrolled", 0, num_steps=0)
    check_integer("VaGES", 2, num_particles=np.int64(2))
    with pytest.raises(ModelError, match="`num_particles` must be an integer of at least 2, got 1"):
        check_integer("VaGES", 2, num_particles=1)


@pytest.mark.parametrize(
    "value", [0.0, -1.0, float("nan"), float("inf"), jnp.array(0.0), np.array([0.1, -1.0])]
)
def test_what_is_not_positive(value):
    with pytest.raises(ModelError, match=r"MALA: `step_size` must be positive( and finite)?, got"):
        check_positive("MALA", step_size=value)
    check_positive("MALA", step_size=jnp.array(0.1), scale=2, each=np.array([1.0, 0.5]))


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.1, float("nan")])
def test_what_is_no_fraction(value):
    words = "MALA: `target_accept_prob` must be between 0 and 1( and finite)?, got"
    with pytest.raises(ModelError, match=words):
        check_fraction("MALA", target_accept_prob=value)
    check_fraction("MALA", target_accept_prob=jnp.bfloat16(0.5))


@pytest.mark.parametrize("value", ["0.1", None, True, [], object, {"v": 0.1}, 1 + 2j])
@pytest.mark.parametrize("check", [check_positive, check_fraction])
def test_what_is_no_number(check, value):
    with pytest.raises(ModelError, match="MALA: `step_size` must be (a number|positive|between)"):
        check("MALA", step_size=value)


def test_what_is_traced_is_not_looked_at():
    @jax.vmap
    def loss(noise_scale):
        objective = ebm.DenoisingScoreMatching(noise_scale)
        return objective.loss(jax.random.key(0), {"mean": 0.5}, gaussian, None, jnp.arange(4.0))

    scales = jnp.array([0.1, 1.0])
    each = [
        ebm.DenoisingScoreMatching(x).loss(
            jax.random.key(0), {"mean": 0.5}, gaussian, None, jnp.arange(4.0)
        )
        for x in (0.1, 1.0)
    ]
    np.testing.assert_allclose(loss(scales), jnp.stack(each), rtol=1e-6)


def gaussian(data):
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(data)):
        v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
        ebm.energy("E", 0.5 * (v - mean) ** 2)
