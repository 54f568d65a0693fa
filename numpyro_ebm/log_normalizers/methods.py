# SPDX-License-Identifier: Apache-2.0
r"""log Z of a fixed model by the best method there is: the registry of methods and the choice.

.. math:: Z = \int\!\!\int \tilde p(v, h)\, dh\, dv

over visible and latent sites of one row. Exact where the states can be counted or the real
coordinates are few; else annealed from a reference that the model's base measure (or a fitted
Student-t) gives, with an error bar.

A method is two functions in a file of its own and an entry in ``METHODS``, from which
:func:`log_normalizer`, log-likelihoods and posteriors take it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike
from numpyro.handlers import substitute

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.language.fixed import fixed
from numpyro_ebm.log_normalizers.ais import run_ais
from numpyro_ebm.log_normalizers.comparison import best_of
from numpyro_ebm.log_normalizers.enumeration import run_enumeration, why_not_enumeration
from numpyro_ebm.log_normalizers.integrand import Integrand, read_integrand
from numpyro_ebm.log_normalizers.options import Options
from numpyro_ebm.log_normalizers.quadrature import (
    quadrature_rank,
    run_quadrature,
    why_not_quadrature,
)
from numpyro_ebm.log_normalizers.result import LogNormalizer
from numpyro_ebm.log_normalizers.smc import run_smc
from numpyro_ebm.log_normalizers.visible_grid import quadrature_of_parameters
from numpyro_ebm.program.devices import leading_sharding
from numpyro_ebm.signatures import explaining
from numpyro_ebm.types import Model

__all__ = ["METHODS", "Method", "MethodName", "log_normalizer", "run_method"]


class Method(NamedTuple):
    """A way to log Z of an :class:`Integrand`.

    - **run** - ``(rng_key, integrand, options) -> LogNormalizer``, its arrays of shape (problems,).
    - **why_not** - ``(integrand, options) -> sentence or None``: why it cannot serve the integrand.
    - **rank** - ``integrand -> int``: of the methods that can serve, that of the lowest rank is
      taken where none is asked for; ``None`` for a method that is taken only where asked for.
    - **of_parameters** - ``(row_model, params, num_nodes, max_states) -> log Z(θ)``, of shape
      (rows,) or a scalar, differentiable in θ; ``None`` if there is no such function. With it the
      method serves :class:`~numpyro_ebm.normalized`.
    """

    run: Callable[..., LogNormalizer]
    why_not: Callable[..., str | None] = lambda integrand, options: None
    rank: Callable[..., float] | None = None
    of_parameters: Callable[..., ArrayLike] | None = None


MethodName: TypeAlias = Literal["enumerate", "quadrature", "ais", "smc"]

METHODS: dict[str, Method] = {
    "enumerate": Method(
        run_enumeration,
        why_not_enumeration,
        rank=lambda integrand: 1 if integrand.discrete else 3,
        of_parameters=lambda *args: _run_at("enumerate", *args),
    ),
    "quadrature": Method(
        run_quadrature,
        why_not_quadrature,
        rank=quadrature_rank,
        of_parameters=quadrature_of_parameters,
    ),
    # AIS needs fewer particles in all where every row has a log Z of its own.
    "ais": Method(run_ais, rank=lambda integrand: 5 if integrand.is_shared else 4),
    "smc": Method(run_smc, rank=lambda integrand: 4 if integrand.is_shared else 5),
}


@explaining
def log_normalizer(
    rng_key: jax.Array,
    model: Model,
    *args: Any,
    method: MethodName | Sequence[MethodName] | None = None,
    num_particles: int | None = None,
    num_sweeps: int | None = None,
    num_temperatures: int = 500,
    num_replicates: int = 16,
    max_states: int = 1_048_576,
    sharding: Mesh | NamedSharding | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> LogNormalizer:
    r"""log Z of a fixed energy-based model, for one row, with its error.

    .. math:: \log Z = \log \int\!\!\int \tilde p(v, h; θ)\, dh\, dv

    over all sites of the row, observed ones included: data only help to find where the mass is.
    Rows share their log Z unless the energy reads covariates (or anything else that differs from
    row to row): then there is one value for each.

    ================ ==================================================== =====================
    method           for                                                  error
    ================ ==================================================== =====================
    ``"enumerate"``  discrete sites, counted (or summed in closed form    none
                     where they factorise); real sites in which the
                     energy is quadratic, in closed form
    ``"quadrature"`` one or two real coordinates, discrete sites summed   last doubling of the
                     out and Gaussian ones integrated                     nodes
    ``"ais"``        anything: independent annealed particles             spread of the weights
    ``"smc"``        anything: tempered sequential Monte Carlo            spread of replicates
    ================ ==================================================== =====================

    The annealed ways start at the model's proper sites, drawn as the model draws them, a uniform
    law of flat discrete sites, and for flat real sites a mixture of Student-t (a Gaussian, where
    they are drawn from Gaussian conditionals), fitted to chains and particles of the model. Given
    that reference both estimate Z without bias. log Z is then too small in expectation (Jensen), by
    about half its variance, and more where a mode was missed, which no error bar tells:
    log-likelihoods are too large. Chains start at data, where the model is given some.

    :param rng_key: random key.
    :param model: a model with fixed parameters, ``fixed(model, params)``.
    :param args: arguments of the model.
    :param method: one of the four, or a sequence of them: all are run and compared, and the one
        with the smallest error is returned. If ``None``, the first of them that is exact enough:
        enumeration, quadrature, SMC (AIS where every row has a log Z of its own). Real sites
        without discrete ones: quadrature up to two coordinates, else enumeration if the energy is
        quadratic, else quadrature if all but two coordinates are Gaussian given these.
    :param int num_particles: particles of AIS (1,024 if ``None``), or of each replicate of SMC
        (512), for each log Z.
    :param int num_sweeps: moves at each temperature, 1 for AIS and 5 for SMC if ``None``: a step of
        MALA for real sites, a draw of every block of sites with simple conditionals.
    :param int num_temperatures: of AIS. SMC finds its own.
    :param int num_replicates: independent runs of SMC; its ``mcse`` is widened to Student's
        quantile for as many.
    :param int max_states: the most states that are enumerated.
    :param sharding: how particles of AIS and SMC are spread over devices: a mesh, or a sharding of
        their axis.
    :param bool progress_bar: show the progress of AIS and SMC, from a second on.
    :param kwargs: keyword arguments of the model.
    :return: :class:`~numpyro_ebm.log_normalizers.LogNormalizer` with ``value``, ``mcse``, ``ess``
        and ``method``; each a scalar, or of shape (rows,) where rows have a log Z of their own. The
        effective sample size is that of AIS's weights, and for SMC that of the replicates' weights
        times their particles. ``diagnostics`` has the number of temperatures, and every result
        where several methods were asked for.
    :raises ModelError: if the model has free parameters or nothing to integrate over; if a method
        that was asked for does not apply; if the integral diverges: the chains, the nodes of a
        quadrature or the variance of a Gaussian run away, and the message names the site. An
        integral that diverges too slowly for that (tails just above 1/v in many dimensions, say)
        is not found.

    Warns :class:`~numpyro_ebm.errors.NormalizerDisagreementWarning` if two methods differ by more
    than four of their combined errors, and :class:`~numpyro_ebm.errors.QuadratureWarning` if the
    last doubling of the nodes still matters.

    Works under ``jax.jit`` and ``jax.vmap`` over keys, without the checks that need values.

    It may be differentiated in whatever the model holds fixed: :math:`∂_θ \log Z = E\,∂_θ \log
    \tilde p` is exact by enumeration, that of the nodes by quadrature, and a mean over the last
    particles by AIS and SMC, whose second derivatives raise.

    Reference: Neal, *Annealed importance sampling*, 2001; Del Moral, Doucet, Jasra, *Sequential
    Monte Carlo samplers*, 2006.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpyro_ebm as ebm
    >>> params = {"W": jnp.ones((5, 4)), "b": jnp.zeros(5), "c": jnp.zeros(4), "scale": jnp.ones(5)}
    >>> model = ebm.fixed(ebm.models.grbm, params)
    >>> log_z = ebm.log_normalizer(jax.random.key(0), model, num_visible=5)
    >>> log_z.method, round(float(log_z.value), 3)
    ('enumerate', 44.595)
    """
    spread = None if sharding is None else leading_sharding("log_normalizer", sharding)
    options = Options(
        num_particles,
        num_sweeps,
        num_temperatures,
        num_replicates,
        max_states,
        spread,
        progress_bar,
    )
    options.check()
    names = (method,) if method is None or isinstance(method, str) else tuple(method)
    if not names:
        raise ModelError("log_normalizer: `method` is an empty sequence.")
    if method is not None and not set(names) <= set(METHODS):
        raise ModelError(
            f"log_normalizer: `method` must be one of {', '.join(METHODS)}, or a sequence of them, "
            f"got {method!r}."
        )
    key_read, *keys = jax.random.split(rng_key, 1 + len(names))
    integrand = read_integrand(key_read, model, args, kwargs)
    results = [
        run_method(key, integrand, name, options) for key, name in zip(keys, names, strict=True)
    ]
    return results[0] if method is None or isinstance(method, str) else best_of(results)


def run_method(
    rng_key: jax.Array, integrand: Integrand, name: str | None, options: Options
) -> LogNormalizer:
    """log Z of an integrand by one method, or by the first of those that can serve if ``None``.

    :param rng_key: random key.
    :param Integrand integrand: the density.
    :param name: a name in ``METHODS``, or ``None``.
    :param Options options: the options of all methods.
    :return: :class:`~numpyro_ebm.log_normalizers.LogNormalizer`; its arrays are scalars, or of
        shape (rows,) where rows have a log Z of their own.
    :raises ModelError: if the method cannot serve, or its result is not finite.
    """
    if name is None:
        ranked = sorted((m.rank(integrand), name) for name, m in METHODS.items() if m.rank)
        name = next(x for _, x in ranked if METHODS[x].why_not(integrand, options) is None)
    else:
        why_not = METHODS[name].why_not(integrand, options)
        if why_not is not None:
            why_not = why_not.removesuffix(".")
            raise ModelError(f"log_normalizer: method={name!r} does not apply: {why_not}.")
    result = METHODS[name].run(rng_key, integrand, options)
    value = jax.lax.stop_gradient(result.value)
    if not_jax_tracer(value) and not np.all(np.isfinite(value)):
        raise ModelError(
            f"log_normalizer: the estimate of log Z by {name!r} is {value}. The energy has "
            f"no finite integral over {sorted(integrand.row_model.sites)}, or is itself not finite "
            "where the model lives. Add a term that confines the sites, such as a proper base "
            "measure."
        )
    shape = () if integrand.is_shared else (integrand.num_problems,)
    return result._replace(
        **{k: _in_shape(getattr(result, k), shape) for k in ("value", "mcse", "ess")}
    )


def _run_at(name, row_model, params, num_nodes, max_states):
    """log Z(θ) by a method whose result is differentiable in the parameters of the model."""
    here = substitute(row_model.model, data=row_model.plates)  # the rows of this subsample
    integrand = read_integrand(
        default_key(),
        fixed(here, params),
        row_model.args,
        row_model.kwargs,
        is_shared=not row_model.covariates,
    )
    return run_method(default_key(), integrand, name, Options(max_states=max_states)).value


def _in_shape(x, shape):
    """One value for all rows, or one for each; a number that is one for all stays as it is."""
    if shape:
        return jnp.broadcast_to(x, shape)
    return jnp.reshape(x, ()) if jnp.ndim(x) else x
