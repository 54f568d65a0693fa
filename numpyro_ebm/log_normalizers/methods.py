# SPDX-License-Identifier: Apache-2.0
r"""log Z of a fixed model by the best way there is, and log-likelihoods that rest on it.

.. math:: Z = \int\!\!\int \tilde p(v, h)\, dh\, dv

over visible and latent sites of one row. Exact where the states can be counted or the real
coordinates are few; else annealed from a reference that the model's base measure (or a fitted
Student-t) gives, with an error bar.

Reference: for the annealed ways see :mod:`numpyro_ebm.log_normalizers.ais` and
:mod:`numpyro_ebm.log_normalizers.smc`.
"""

import itertools
import math
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.util import find_stack_level, not_jax_tracer

from numpyro_ebm.errors import ModelError, NormalizerDisagreementWarning, check_integer
from numpyro_ebm.log_normalizers.annealing import annealed
from numpyro_ebm.log_normalizers.enumeration import enumerated, why_not_enumerated
from numpyro_ebm.log_normalizers.quadrature import integrated, why_not_integrated
from numpyro_ebm.log_normalizers.target import read_target

__all__ = ["Options", "log_normalizer", "run_method"]

METHODS = ("enumerate", "quadrature", "ais", "smc")
MOST_ERRORS = 4.0  # combined standard errors that two methods may differ by


def log_normalizer(
    rng_key,
    model,
    *args,
    method=None,
    num_particles=None,
    num_sweeps=None,
    num_temperatures=500,
    num_replicates=16,
    max_states=1_048_576,
    **kwargs,
):
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
                     out                                                  nodes
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
        quadratic.
    :param int num_particles: particles of AIS (1,024 if ``None``), or of each replicate of SMC
        (512), for each log Z.
    :param int num_sweeps: moves at each temperature, 1 for AIS and 5 for SMC if ``None``: a step of
        MALA for real sites, a draw of every block of sites with simple conditionals.
    :param int num_temperatures: of AIS. SMC finds its own.
    :param int num_replicates: independent runs of SMC.
    :param int max_states: the most states that are enumerated.
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
    options = Options(num_particles, num_sweeps, num_temperatures, num_replicates, max_states)
    options.check()
    several = not (method is None or isinstance(method, str))
    methods = tuple(method) if several else (method,)
    for name in methods:
        if name not in METHODS and (several or name is not None):
            raise ModelError(
                f"log_normalizer: `method` must be one of {', '.join(METHODS)}, or a sequence of "
                f"them, got {method!r}."
            )
    if not methods:
        raise ModelError("log_normalizer: `method` is an empty sequence.")
    key_read, *keys = jax.random.split(rng_key, 1 + len(methods))
    target = read_target(key_read, model, args, kwargs)
    results = [
        run_method(key, target, name, options) for key, name in zip(keys, methods, strict=True)
    ]
    return _compared(results) if several else results[0]


class Options(NamedTuple):
    """Numbers that :func:`log_normalizer` takes; ``None`` for what depends on the method."""

    num_particles: int | None = None
    num_sweeps: int | None = None
    num_temperatures: int = 500
    num_replicates: int = 16
    max_states: int = 1_048_576

    def check(self):
        """Raise unless they are numbers that can be worked with."""
        least = dict(num_particles=2, num_sweeps=1, num_temperatures=1, num_replicates=2)
        for name, number in self._asdict().items():
            if number is None and name in ("num_particles", "num_sweeps"):
                continue
            check_integer("log_normalizer", least.get(name, 1), **{name: number})


def run_method(rng_key, target, method, options):
    """log Z of a target by one method, or by the first that is exact enough if ``None``."""
    if method is None:
        method = _choose(target, options)
    if method == "enumerate":
        why_not = why_not_enumerated(target, options.max_states)
        if why_not:
            raise ModelError(f"log_normalizer: method='enumerate' does not apply: {why_not}.")
        result = enumerated(target)
    elif method == "quadrature":
        why_not = why_not_integrated(target)
        if why_not:
            raise ModelError(f"log_normalizer: method='quadrature' does not apply: {why_not}.")
        result = integrated(rng_key, target)
    else:
        result = annealed(rng_key, target, method, options)
    _check_finite(target, result)
    return _shaped(target, result)


def _choose(target, options):
    """The first method that is exact enough."""
    few = target.real and not why_not_integrated(target)
    if few and not target.discrete:
        return "quadrature"
    if not why_not_enumerated(target, options.max_states):
        return "enumerate"
    if few:
        return "quadrature"
    return "smc" if target.is_shared else "ais"  # which needs fewer particles for every row


def _shaped(target, result):
    """One value for all rows, or one for each."""
    if target.is_shared:
        pick = lambda x: jnp.reshape(x, ()) if jnp.ndim(x) else x  # noqa: E731
        return result._replace(
            value=pick(result.value), mcse=pick(result.mcse), ess=pick(result.ess)
        )
    rows = (target.num_problems,)
    spread = {k: jnp.broadcast_to(getattr(result, k), rows) for k in ("value", "mcse", "ess")}
    return result._replace(**spread)


def _check_finite(target, result):
    if not_jax_tracer(result.value) and not np.all(np.isfinite(result.value)):
        raise ModelError(
            f"log_normalizer: the estimate of log Z by {result.method} is {result.value}. The "
            f"energy has no finite integral over {sorted(target.row_model.sites)}, or is itself "
            "not finite where the model lives. Add a term that confines the sites, such as a "
            "proper base measure."
        )


def _compared(results):
    """The result with the smallest error, the others with it; warn where two disagree."""
    for one, other in itertools.combinations(results, 2):
        gap = jnp.abs(one.value - other.value)
        eps = float(jnp.finfo(jnp.result_type(gap, float)).eps)
        rounding = 100 * eps * (1 + jnp.abs(one.value))
        allowed = MOST_ERRORS * jnp.sqrt(jnp.asarray(one.mcse) ** 2 + jnp.asarray(other.mcse) ** 2)
        if not_jax_tracer(gap) and np.any(np.asarray(gap > allowed + rounding)):
            at = int(np.argmax(np.ravel(gap - allowed)))
            values = [
                f"{x.method} gives {np.ravel(x.value)[at]:.6g} ± "
                f"{np.ravel(np.broadcast_to(x.mcse, np.shape(x.value)))[at]:.2g}"
                for x in (one, other)
            ]
            warnings.warn(
                NormalizerDisagreementWarning(
                    f"log_normalizer: {' and '.join(values)}, further apart than their errors "
                    "allow. Annealed estimates that miss a mode are too small: raise "
                    "`num_temperatures`, `num_particles` or `num_sweeps` until they agree."
                ),
                stacklevel=find_stack_level(),
            )
    errors = [float(np.max(x.mcse)) if not_jax_tracer(x.mcse) else math.inf for x in results]
    best = results[int(np.argmin(errors))]
    everyone = {x.method: x for x in results}
    return best._replace(diagnostics={**(best.diagnostics or {}), "results": everyone})
