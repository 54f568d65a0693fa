# SPDX-License-Identifier: Apache-2.0
"""Which kernel draws the unobserved sites of a fixed model."""

import math
from typing import Any

import jax.numpy as jnp
from numpyro.handlers import condition
from numpyro.infer import Gibbs
from numpyro.infer.mcmc import MCMCKernel

from numpyro_ebm.errors import ModelError
from numpyro_ebm.keys import default_key
from numpyro_ebm.language.handlers import integrated
from numpyro_ebm.marginals import exact_marginal, integrable
from numpyro_ebm.mcmc.block_gibbs import BlockGibbs
from numpyro_ebm.mcmc.discrete_langevin import DiscreteLangevin
from numpyro_ebm.mcmc.langevin import MALA
from numpyro_ebm.model.finite_supports import support_values
from numpyro_ebm.model.reading import read_fixed_model
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.samplers.gibbs_blocks import plan_block
from numpyro_ebm.types import Model

__all__ = ["choose_kernel", "kernel_for_rows"]

MAX_STATES = 65_536  # of an all-discrete model that is drawn without a chain
MAX_SUMMED = 4_096  # of discrete sites that are summed out in every step of a chain
MAX_INTEGRATED = 20  # coordinates of a real site that is integrated out in every step of a chain
MAX_GAUSSIAN = 500  # coordinates of a Gaussian block with a full precision matrix
MAX_SEQUENTIAL = 200  # units that are drawn one after the other


def choose_kernel(model: Model, *args: Any, **kwargs: Any) -> MCMCKernel | None:
    """The kernel of :func:`~numpyro_ebm.sample` for a fixed model, by its supports and energy.

    ==============================================  ==============================================
    sites                                           kernel
    ==============================================  ==============================================
    discrete, few joint states                      none (``None``): drawn from their probabilities
    conditionals all Gaussian, Bernoulli or finite  :class:`~numpyro_ebm.BlockGibbs`
    more than 200 discrete units that all interact  :class:`~numpyro_ebm.DiscreteLangevin` if the
                                                    energy has a gradient in them, else
                                                    ``BlockGibbs``
    continuous                                      :class:`~numpyro_ebm.MALA`
    continuous, others quickly integrated out       ``MALA`` on the exact marginal; the others are
                                                    then drawn from their exact conditional
    continuous, and others                          ``Gibbs([(MALA(model), ...),
                                                    (BlockGibbs(model), ...)])``, with
                                                    ``DiscreteLangevin`` as above
    ==============================================  ==============================================

    Few joint states are 65,536; quickly integrated out are units in a plate, binary units that do
    not interact, up to 4,096 joint states, and real sites of up to 20 coordinates that are jointly
    Gaussian given the rest.

    :param model: a model with fixed parameters, ``fixed(model, params)``.
    :param args: arguments of the model.
    :param kwargs: keyword arguments of the model.
    :return: a NumPyro ``MCMCKernel``, ready for ``MCMC``, or ``None``.
    :raises ModelError: if the model has free parameters or nothing to sample, or a discrete site
        has infinitely many values.

    **Example**

    >>> import jax.numpy as jnp
    >>> import numpyro_ebm as ebm
    >>> from numpyro_ebm.mcmc import choose_kernel
    >>> params = {"W": jnp.ones((2, 4)), "b": jnp.zeros(2), "c": jnp.zeros(4), "scale": jnp.ones(2)}
    >>> type(choose_kernel(ebm.fixed(ebm.models.grbm, params))).__name__
    'BlockGibbs'
    """
    return kernel_for_rows(model, read_fixed_model(model, args, kwargs))


def kernel_for_rows(model: Model, row_model: RowModel) -> MCMCKernel | None:
    """As :func:`choose_kernel`, for a model that has been read."""
    continuous, discrete = sorted(row_model.visible), sorted(row_model.latent)
    if not continuous and _enumerable(row_model, MAX_STATES) and _all_event(row_model):
        return None
    discrete_kernel = _kernel_of_discrete(model, row_model) if discrete else BlockGibbs
    gaussian = _gaussian_blocks(row_model)
    if gaussian is not None and discrete_kernel is BlockGibbs:
        return BlockGibbs(model, [*gaussian, *([name] for name in row_model.latent)])
    if not continuous:
        return discrete_kernel(model)
    latent = integrable(row_model, MAX_INTEGRATED)
    if _enumerable(row_model.with_latent(latent), MAX_SUMMED):
        real = [name for name in latent if name in row_model.visible]
        return MALA(integrated(model, real) if real else model)
    first = MALA(model) if gaussian is None else BlockGibbs(model, gaussian)
    return Gibbs([(first, continuous), (discrete_kernel(model), discrete)])


def _density_of_rows(row_model):
    z = {name: jnp.asarray(site.value) for name, site in row_model.sites.items()}
    return lambda rows: row_model.log_density({}, row_model.from_rows(rows)), row_model.to_rows(z)


def _gaussian_blocks(row_model):
    """Blocks of continuous sites that are Gaussian given the rest; None if some are not."""
    names = sorted(row_model.visible)
    if not all(site.is_real for site in row_model.visible.values()):
        return None
    log_density, rows = _density_of_rows(row_model)
    sizes = {name: math.prod(rows[name].shape[1:]) for name in names}
    partitions = [[names]] if sum(sizes.values()) <= MAX_GAUSSIAN else []
    for blocks in [*partitions, [[name] for name in names]] if names else [[]]:
        try:
            plans = [plan_block(log_density, rows, block, {}) for block in blocks]
        except ModelError:
            continue
        if all(p.is_diagonal or sum(sizes[k] for k in p.names) <= MAX_GAUSSIAN for p in plans):
            return blocks
    return None


def _kernel_of_discrete(model, row_model):
    values = {name: support_values(site, "sample") for name, site in row_model.latent.items()}
    log_density, rows = _density_of_rows(row_model)
    sequential = sum(
        math.prod(rows[name].shape[1:])
        for name in row_model.latent
        if plan_block(log_density, rows, [name], values).kind == "sequential"
    )
    if sequential <= MAX_SEQUENTIAL:
        return BlockGibbs
    z = {name: site.value for name, site in row_model.visible.items()}
    try:  # whether the energy has a gradient
        kernel = DiscreteLangevin(condition(model, z))
        kernel.init(default_key(), 1, None, row_model.args, row_model.kwargs)
    except ModelError:
        return BlockGibbs
    return DiscreteLangevin


def _enumerable(row_model, max_states):
    try:
        return exact_marginal(row_model).num_states(row_model) <= max_states
    except ModelError:
        return False


def _all_event(row_model):
    return all(site.fn.event_shape for site in row_model.latent.values())
