# SPDX-License-Identifier: Apache-2.0
"""Kernel steps of the chains of contrastive divergence, at fixed parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from numpyro.infer.mcmc import MCMCKernel

from numpyro_ebm.errors import ModelError
from numpyro_ebm.marginals.kernel_steps import (
    check_kernel_maker,
    draw_hidden,
    hidden_sites,
    make_kernel,
    take_steps,
)
from numpyro_ebm.model.row_groups import in_groups, num_groups
from numpyro_ebm.objectives.plan import Problem
from numpyro_ebm.objectives.summed_sites import draw_summed_sites
from numpyro_ebm.types import Params, SiteValues

__all__ = ["KernelSteps", "joined_rows", "over_chains", "parted_rows"]


def over_chains(
    fn: Callable[..., Any], rng_key: jax.Array, problem: Problem, chains: SiteValues
) -> Any:
    """``fn(rng_key, rows)``, a function of a plate of rows, at any number of chains, rows leading.

    Chains go through the model as many at a time as the batch has rows.
    """
    rows, num = problem.row_model.num_rows, len(jax.tree.leaves(chains)[0])
    if num == rows:
        return fn(rng_key, chains)
    keys = jax.random.split(rng_key, num_groups(num, rows))
    return in_groups(lambda x, key: fn(key, x), rows, chains, keys=keys)


def joined_rows(problem: Problem, visible: SiteValues) -> SiteValues:
    """Unconstrained rows of the batch and chains after them, rows leading."""
    data = problem.row_model.to_rows(problem.unconstrained)
    return {name: jnp.concatenate([data[name], x]) for name, x in visible.items()}


def parted_rows(problem: Problem, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values at the rows of the batch, and at the chains after them."""
    return values[: problem.row_model.num_rows], values[problem.row_model.num_rows :]


class KernelSteps:
    """k steps of a kernel.

    :param kernel: a function of a model that returns a NumPyro ``MCMCKernel``.
    :param int num_steps: k.
    :param bool weighted: whether the chains have weights.
    :raises ModelError: if ``kernel`` is none; when used, if it does not fit the rows.
    """

    def __init__(self, kernel: Callable[..., MCMCKernel], num_steps: int, weighted: bool):
        check_kernel_maker("ContrastiveDivergence", kernel)
        self.kernel, self.num_steps, self.weighted = kernel, num_steps, weighted

    def __call__(
        self, rng_key: jax.Array, params: Params, problem: Problem, start: SiteValues
    ) -> SiteValues:
        """Where chains are after the steps, unconstrained values by site, rows leading."""
        row_model = problem.row_model

        def rows(rng_key, start):
            start = row_model.from_rows(start)
            return row_model.to_rows(self._move(rng_key, params, problem, start))

        return over_chains(rows, rng_key, problem, start)

    def _move(self, rng_key, params, problem, start):
        row_model = problem.row_model
        own = {name: stop_gradient(params[name]) for name in row_model.parameters}
        who, visible = "ContrastiveDivergence", row_model.visible
        kernel = make_kernel(who, self.kernel, row_model, own, visible)
        self._check_weighted(kernel)
        hidden = hidden_sites(who, kernel, row_model)
        start = {name: x for name, x in start.items() if name not in hidden}
        key_init, key_summed = jax.random.split(rng_key)
        position = take_steps(kernel, key_init, row_model, start, self.num_steps)
        key_hidden = jax.random.fold_in(key_summed, 1)
        position |= draw_hidden(key_hidden, row_model, own, position, hidden)
        name = type(kernel).__name__
        self._check_latents(name, row_model, position)
        return stop_gradient(
            position | draw_summed_sites(key_summed, name, row_model, own, position)
        )

    def _check_weighted(self, kernel):
        """Raise if chains with weights would not stand for the model."""
        name = type(kernel).__name__
        numpyros = type(kernel).__module__.split(".")[0] == "numpyro"
        if self.weighted and (numpyros or not getattr(kernel, "leaves_invariant", True)):
            why = "accepts all rows together" if numpyros else "does not leave it invariant"
            raise ModelError(
                "ContrastiveDivergence: weighted chains stand for the model if their kernel leaves "
                f"it invariant row by row, and {name} {why}. Use `BlockGibbs`, `MALA` or another "
                "adjusted kernel of numpyro_ebm."
            )

    def _check_latents(self, name, row_model, position):
        """Raise if weighted chains would have no density."""
        drawn = row_model.latent.keys() & position.keys()
        if self.weighted and 0 < len(drawn) < len(row_model.latent):
            raise ModelError(
                f"ContrastiveDivergence: {name} draws the latent site(s) {sorted(drawn)} and sums "
                f"{sorted(row_model.latent.keys() - drawn)} out, and weighted chains have a "
                "density if all latent sites are drawn, or all are summed out. Use `BlockGibbs`."
            )
