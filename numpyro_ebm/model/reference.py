# SPDX-License-Identifier: Apache-2.0
r"""The law of elements that nothing reads: those of a site that is observed in part.

NumPyro makes two sites of ``sample(name, fn, obs=x, obs_mask=m)``, ``<name>_observed`` and
``<name>_unobserved``, of full shape each, and reads either of them at every element. The other one
is under a mask: flat there, and often of infinite mass. Here it has a *reference* law instead, that
knows nothing of the model,

.. math:: \log r(x) = \log N(T^{-1}(x); 0, 1) + \log |∂T^{-1}/∂x| \quad\text{or}\quad -\log K,

a standard normal in unconstrained coordinates, or uniform over K values (a Poisson law of mean 1
where they are infinitely many). So

.. math:: \tilde p(v_{\text{o}}, v_{\text{u}}) = \tilde p(v)\, r(v_{\text{o}} \text{ where } ¬m)\,
    r(v_{\text{u}} \text{ where } m)

has the integral of :math:`\tilde p(v)`, and its marginal at the observed elements is that of p̃.
Elements of the data that were not observed are replaced by draws of r: completed so, rows are draws
of the completed model if the observed elements are of the model, whatever is done with them.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.typing import ArrayLike
from numpyro.distributions import biject_to
from numpyro.primitives import Messenger

from numpyro_ebm.language.distributions import is_real, lowest_value, scalar_support
from numpyro_ebm.language.sites import masks_of, without_masks

__all__ = ["Completed", "FillUnobserved", "completed_log_prob", "reference_log_prob"]

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def completed_log_prob(fn: Any, value: ArrayLike) -> jax.Array:
    """Log-density of a site that is masked in part, of the reference where it is.

    :param fn: its distribution, under masks.
    :param value: its value.
    """
    counts = _is_read(fn)
    return jnp.where(counts, without_masks(fn).log_prob(value), reference_log_prob(fn, value))


def reference_log_prob(fn: Any, value: ArrayLike) -> jax.Array:
    """Log-density of the reference where a site is masked, and zero elsewhere."""
    counts, event_dim = _is_read(fn), fn.event_dim
    if fn.support.is_discrete:
        log_prob = _over_values(fn).log_prob(jnp.asarray(value) - lowest_value(fn.support))
        log_prob = _sum_last(log_prob, event_dim)
        return jnp.where(counts, 0.0, log_prob)
    transform = biject_to(fn.support)
    shape = jnp.shape(value)
    safe = transform(jnp.zeros(transform.inverse_shape(shape), jnp.result_type(value)))
    value = jnp.where(_over_event(counts, event_dim), safe, value)
    z = transform.inv(value)
    total = _sum_last(-0.5 * z**2 - HALF_LOG_2PI, jnp.ndim(z) - (len(shape) - event_dim))
    if not is_real(fn.support):
        jacobian = transform.log_abs_det_jacobian(z, value)
        total = total - _sum_last(jacobian, jnp.ndim(jacobian) - (len(shape) - event_dim))
    return jnp.where(counts, 0.0, total)


def draw_reference(rng_key: jax.Array, fn: Any) -> jax.Array:
    """A draw of the reference, of the shape of a site."""
    if fn.support.is_discrete:
        return lowest_value(fn.support) + _over_values(fn).sample(rng_key, fn.shape())
    transform = biject_to(fn.support)
    return transform(jax.random.normal(rng_key, transform.inverse_shape(fn.shape())))


class FillUnobserved(Messenger):
    """Replace data that were not observed by draws of the reference.

    :param fn: a model.
    """

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or not msg["name"].endswith("_observed"):
            return
        fn = msg["fn"]
        if not msg["is_observed"] or all(isinstance(x, bool) for x in masks_of(fn)):
            return
        key = jax.random.key(zlib.crc32(msg["name"].encode()))
        drawn = draw_reference(key, fn).astype(jnp.result_type(msg["value"]))
        msg["value"] = jnp.where(_over_event(_is_read(fn), fn.event_dim), msg["value"], drawn)


class Completed(dist.Distribution):
    """A distribution under masks, with the reference where they are.

    :param base_dist: the distribution.
    """

    arg_constraints = {}
    pytree_data_fields = ("base_dist",)

    def __init__(self, base_dist: Any):
        self.base_dist = base_dist
        super().__init__(base_dist.batch_shape, base_dist.event_shape)

    @dist.constraints.dependent_property
    def support(self) -> Any:
        return self.base_dist.support

    @property
    def has_rsample(self) -> bool:
        return self.base_dist.has_rsample

    def rsample(self, key: jax.Array | None, sample_shape: tuple[int, ...] = ()) -> Any:
        return self.base_dist.rsample(key, sample_shape)

    def sample(self, key: jax.Array | None, sample_shape: tuple[int, ...] = ()) -> Any:
        return self.base_dist.sample(key, sample_shape)

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> jax.Array:
        return completed_log_prob(self.base_dist, value)


def _is_read(fn):
    masks = [x for x in masks_of(fn) if not isinstance(x, bool)]
    return jnp.all(jnp.stack([jnp.broadcast_to(x, fn.batch_shape) for x in masks]), 0)


def _over_event(counts, event_dim):
    return jnp.reshape(counts, jnp.shape(counts) + (1,) * event_dim)


def _sum_last(x, num):
    return jnp.sum(x, tuple(range(-num, 0))) if num else x


def _over_values(fn):
    """The reference of one element of a discrete site, counted from its lowest value."""
    one = scalar_support(fn.support)
    if isinstance(one, type(dist.constraints.boolean)):
        return dist.DiscreteUniform(0, 1)
    if getattr(one, "upper_bound", None) is None:
        return dist.Poisson(1.0)
    return dist.DiscreteUniform(0, int(one.upper_bound) - lowest_value(fn.support))
