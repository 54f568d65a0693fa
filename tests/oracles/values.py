# SPDX-License-Identifier: Apache-2.0
"""A discrete distribution whose values may have gaps, as a user writes one."""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

__all__ = ["Values"]


class Values(dist.Distribution):
    """The values that it is given, which may have gaps, all equally likely."""

    arg_constraints = {}
    pytree_aux_fields = ("values", "_support")
    has_enumerate_support = True

    def __init__(self, *values):
        self.values = tuple(values)
        low, high = float(min(values)), float(max(values))
        self._support = dist.constraints.integer_interval(low, high)
        super().__init__((), ())

    @property
    def support(self):
        return self._support

    def sample(self, key, sample_shape=()):
        return jax.random.choice(key, jnp.array(self.values), sample_shape)

    def log_prob(self, value):
        is_value = jnp.any(jnp.asarray(value)[..., None] == jnp.array(self.values), -1)
        return jnp.where(is_value, -jnp.log(float(len(self.values))), -jnp.inf)

    def enumerate_support(self, expand=True):
        return jnp.array(self.values)
