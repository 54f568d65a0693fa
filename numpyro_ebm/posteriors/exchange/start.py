# SPDX-License-Identifier: Apache-2.0
"""Initial values of a chain of :class:`~numpyro_ebm.Exchange`, and their checks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.util import initialize_model, potential_energy

from numpyro_ebm._compat import GIBBS_SITES_KWARG, is_prng_key
from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.mcmc.start import check_strategy, started
from numpyro_ebm.posteriors.exchange.target import ExchangeTarget
from numpyro_ebm.types import Params, SiteValues

__all__ = ["check_start", "initial_parameters"]


def initial_parameters(
    rng_key: jax.Array,
    target: ExchangeTarget,
    init_strategy: Callable[..., Any],
    init_params: Params | None,
) -> SiteValues:
    """Initial unconstrained values of the parameters, given ones or those of the strategy.

    :raises ModelError: if values are given of what is no parameter, or of another shape.
    """
    check_strategy(init_strategy, target.row_model.priors)
    info = initialize_model(
        rng_key,
        target.prior,
        init_strategy=init_strategy,
        model_args=target.args,
        model_kwargs=target.kwargs,
        validate_grad=False,
    )
    z, given = dict(info.param_info.z), dict(init_params or {})
    if GIBBS_SITES_KWARG in target.kwargs:  # Gibbs hands over constrained values
        given = target.unconstrain({**target.constrain(z), **given})
    return started(z, given)


def check_start(state: Any, target: ExchangeTarget) -> None:
    """Check the densities of an initial state, and that its rows can accept independently.

    :param ExchangeState state: of one chain, or of several that lead in its arrays.
    :param ExchangeTarget target: the posterior.
    :raises ModelError: if a density is not finite, or the parameters of rows are coupled where
        every row has its own.
    """
    z = state.z
    bad = ~np.isfinite(np.asarray(state.log_prior + state.log_density))
    if not is_prng_key(state.rng_key):  # vectorised chains lead: look at the first bad one
        chain = int(np.argmax(bad.reshape(len(bad), -1).any(-1)))
        z = {name: x[chain] for name, x in z.items()}
    if bad.any():
        params = target.constrain(z)
        rows = np.asarray(target.log_rows(params, target.data))
        where = np.flatnonzero(~np.isfinite(rows))
        shown = {name: np.asarray(x).tolist() for name, x in params.items()}
        what = f"the energy of row(s) {where[:5].tolist()}" if where.size else "the prior"
        raise ModelError(
            f"Exchange: {what} is not finite at the initial parameters {shown}. Pass "
            "`init_params` (unconstrained), or an `init_strategy` such as "
            "`numpyro.infer.init_to_value(values=...)`."
        )
    if target.by_row:
        _check_rows(target, z)


def _check_rows(target, z, num_tries=4):
    """Check that moving the parameters of random rows keeps the densities of all others."""
    flat = target.flatten(z)

    def densities(flat):
        moved = target.unflatten(flat, z)
        total = -potential_energy(target.prior, target.args, target.kwargs, moved)
        return target.log_prior(moved), target.log_density(moved, target.data), total

    prior, rows, total = densities(flat)
    eps = 1_000 * float(jnp.finfo(flat.dtype).eps)
    for key in jax.random.split(default_key(), num_tries):
        key_rows, key_noise = jax.random.split(key)
        moves = jax.random.bernoulli(key_rows, 0.5, (len(flat), 1))
        noise = 0.1 * jax.random.normal(key_noise, flat.shape, flat.dtype)
        new_prior, new_rows, new_total = densities(jnp.where(moves, flat + noise, flat))
        stays = ~moves[:, 0]
        for what, old, new in (("prior", prior, new_prior), ("energy", rows, new_rows)):
            if np.any(stays & (jnp.abs(new - old) > eps * (1 + jnp.abs(old)))):
                raise ModelError(
                    f"Exchange(by_row=True): the {what} of a row depends on the parameters of "
                    "other rows, so that rows cannot accept on their own. Drop `by_row`."
                )
        change = jnp.sum(new_prior - prior) - (new_total - total)
        if abs(float(change)) > eps * (1 + float(jnp.sum(jnp.abs(prior)))):
            raise ModelError(
                "Exchange(by_row=True): outside the data plate other sites depend on the "
                f"parameters {sorted(z)}, and couple the rows. Drop `by_row`, or give those "
                "sites to another block of `Gibbs`."
            )
