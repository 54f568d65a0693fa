# SPDX-License-Identifier: Apache-2.0
r"""The base measure of a fixed model as the reference that annealing starts from.

.. math:: q(x) = q_{\text{flat}}(x_{\text{flat}}) \prod_{\text{other sites}} b(x_s \mid x_{<s})

Sites with a proper distribution are drawn as the model draws them, and flat discrete ones
uniformly. Flat real sites have no distribution of their own: they are given one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from numpyro.handlers import seed, trace

from numpyro_ebm.log_normalizers.gaussian import Gaussian
from numpyro_ebm.log_normalizers.integrand import Integrand
from numpyro_ebm.log_normalizers.mixture import Mixture
from numpyro_ebm.samplers.positions import flatten_sites
from numpyro_ebm.types import SiteValues

__all__ = ["draw_base_measure", "reference"]


def draw_base_measure(
    rng_key: jax.Array, integrand: Integrand, num: int, flat: SiteValues
) -> SiteValues:
    """Draw the proper sites from their distributions, and flat discrete ones uniformly.

    :param rng_key: random key.
    :param Integrand integrand: the density.
    :param int num: number of points.
    :param dict flat: values of the flat real sites, (num, ...), in unconstrained coordinates.
    :return: a position.
    """
    row_model = integrand.row_model

    def draw_rows(rows, rng_key):
        given, _ = row_model.constrain(row_model.from_rows(rows))
        key_model, *keys = jax.random.split(rng_key, 1 + len(integrand.discrete))
        for name, key in zip(integrand.discrete, keys, strict=True):
            if name not in integrand.proper:
                value, choices = row_model.latent[name].value, integrand.values(name)
                index = jax.random.randint(key, jnp.shape(value), 0, len(choices))
                given[name] = jnp.asarray(choices, jnp.result_type(value))[index]
        model_trace = trace(seed(row_model.substituted(given), key_model)).get_trace(
            *row_model.args, **row_model.kwargs
        )
        z = {k: jnp.asarray(model_trace[k]["value"]) for k in integrand.discrete}
        for name in integrand.real:
            value = jnp.asarray(model_trace[name]["value"])
            z[name] = row_model.sites[name].unconstrain_draw(value)
        return row_model.to_rows(z)

    keys = jax.random.split(rng_key, -(-num // row_model.num_rows))
    return integrand.over_rows(draw_rows, keys)(flat, num)


def reference(
    integrand: Integrand, fitted: Gaussian | Mixture | None
) -> tuple[Callable[..., tuple[jax.Array, jax.Array]], Callable[..., SiteValues]]:
    """Log-densities of the reference and of the model, and draws of the reference.

    :param Integrand integrand: the density.
    :param fitted: the distribution of the flat real sites, a :class:`Gaussian` or a
        :class:`Mixture`; ``None`` where there are none.
    :return: ``position -> (log q, log p̃)``, of shape (n,) each; and ``(rng_key, n) -> position``.
    """
    flat = integrand.flat_real
    if not flat or fitted is None:
        return (
            integrand.log_densities,
            lambda rng_key, num: draw_base_measure(rng_key, integrand, num, {}),
        )
    _, unflatten = flatten_sites(integrand.placeholder(1), flat)

    def log_densities(position):
        base, density = integrand.log_densities(position)
        return base + fitted.log_prob(flatten_sites(position, flat)[0]), density

    def draw(rng_key, num):
        key_flat, key_rest = jax.random.split(rng_key)
        return draw_base_measure(key_rest, integrand, num, unflatten(fitted.sample(key_flat, num)))

    return log_densities, draw
