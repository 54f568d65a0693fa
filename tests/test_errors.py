# SPDX-License-Identifier: Apache-2.0
"""Options out of their range are refused by name."""

import jax.numpy as jnp
import pytest

from numpyro_ebm.errors import ModelError, check_fraction, check_integer, check_positive


@pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, True, "1", None, jnp.array(1)])
def test_what_is_no_positive_integer(value):
    with pytest.raises(ModelError, match="NUTS: `num_steps` must be a positive integer, got"):
        check_integer("NUTS", num_chains=1, num_steps=value)


def test_integers_of_at_least():
    check_integer("VaGES", 2, num_particles=2)
    check_integer("Unrolled", 0, num_steps=0)
    with pytest.raises(ModelError, match="`num_particles` must be an integer of at least 2, got 1"):
        check_integer("VaGES", 2, num_particles=1)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), jnp.array(0.0)])
def test_what_is_not_positive(value):
    with pytest.raises(ModelError, match="MALA: `step_size` must be positive, got"):
        check_positive("MALA", step_size=value)
    check_positive("MALA", step_size=jnp.array(0.1), scale=float("inf"))


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.1, float("nan")])
def test_what_is_no_fraction(value):
    with pytest.raises(ModelError, match="MALA: `target_accept_prob` must be between 0 and 1, got"):
        check_fraction("MALA", target_accept_prob=value)
    check_fraction("MALA", target_accept_prob=0.5)
