# SPDX-License-Identifier: Apache-2.0
r"""Maximum likelihood where log Z is computable: few states, or one or two real coordinates.

.. math:: \mathcal L(θ) = -E \log p(v; θ) = \log Z(θ) - E \log\tilde p(v; θ)

with log Z(θ) by enumeration of discrete visible coordinates and by quadrature over at most two real
ones. The reference every other objective is measured against, and the best choice where it exists.
"""

import warnings
from typing import Any

import jax
import numpy as np

from numpyro_ebm._compat import find_stack_level
from numpyro_ebm.errors import ModelError, QuadratureWarning, check_integer
from numpyro_ebm.log_normalizers.nodes import REACH
from numpyro_ebm.log_normalizers.visible_grid import (
    has_real_coordinates,
    sum_over_visible,
    why_not_visible_grid,
)
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.objectives.base import Objective, Problem
from numpyro_ebm.types import Params

__all__ = ["MaximumLikelihood"]

TOLERANCE = 1e-3


class MaximumLikelihood(Objective):
    r"""Exact maximum likelihood (ML), with log Z(θ) by enumeration or quadrature.

    .. math:: \mathcal L(θ) = \log Z(θ) - E \log\tilde p(v; θ)

    The value is the negative log-likelihood of a row, in nats.

    :param marginal: how latent sites are integrated out, by a marginal with exact values.
    :param int num_nodes: quadrature nodes for each real coordinate. They are centred on the batch
        and scaled to it (in unconstrained coordinates), and reach out to a hundred of its standard
        deviations. The spacing at the centre is 11/num_nodes standard deviations: an energy with
        finer structure needs more.
    :param int max_states: the most nodes (states times quadrature nodes).
    :raises ModelError: when used, if the visible sites have more than two real coordinates, or more
        nodes than ``max_states``; if the marginal has no exact values.

    Warns :class:`~numpyro_ebm.errors.QuadratureWarning` at the end of a run if half the nodes give
    another log Z, or mass lies at the border of the nodes' reach.

    **Example**

    >>> import jax.numpy as jnp
    >>> import jax, numpyro
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data):
    ...     precision = numpyro.param("precision", 1.0)
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> data = jnp.array([-1.0, 3.0])
    >>> objective = ebm.MaximumLikelihood()
    >>> float(objective.loss(jax.random.key(0), {"precision": 1.0}, gaussian, None, data))
    3.418938...
    """

    order = 1
    needs = "value"

    def __init__(
        self, marginal: Marginal | None = None, *, num_nodes: int = 128, max_states: int = 1_048_576
    ):
        check_integer("MaximumLikelihood", 4, num_nodes=num_nodes)
        self.num_nodes = num_nodes
        check_integer("MaximumLikelihood", max_states=max_states)
        self.max_states = max_states
        super().__init__(marginal)

    def check_sites(self, row_model: RowModel) -> None:
        self.check_observed(row_model)
        why_not = why_not_visible_grid(
            row_model, self.num_nodes, self.max_states, "MaximumLikelihood"
        )
        if why_not is not None:
            others = "PseudoLikelihood, RatioMatching, NCE or ContrastiveDivergence"
            if not any(site.is_discrete for site in row_model.visible.values()):
                others = "ContrastiveDivergence, NCE or a score-based objective"
            raise ModelError(f"MaximumLikelihood: {why_not}. Use {others}.")

    def log_normalizer(
        self, params: Params, problem: Problem, every: int = 1, reach: float = np.inf
    ) -> jax.Array:
        """log Z(θ) of every row, of shape (rows,), or a scalar if all rows share it.

        Of a real coordinate every ``every``-th node counts, out to ``reach`` standard deviations.
        """
        row_model, marginal = problem.row_model, problem.marginal
        return sum_over_visible(
            params, row_model, marginal, self.num_nodes, every=every, reach=reach
        )

    def energy_loss(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        estimate = self.estimate(rng_key, params, problem)
        here = estimate.log_density(params, problem.unconstrained)
        values, log_det = problem.row_model.constrain(problem.unconstrained)
        here = here - problem.row_model.log_reference(values)
        return problem.row_model.mean(self.log_normalizer(params, problem) - here + log_det)

    def statistics(
        self, rng_key: jax.Array, params: Params, problem: Problem, state: Any = None
    ) -> list[jax.Array]:
        """log Z with all nodes, with half of them, and with a reach of half the width."""
        if not has_real_coordinates(problem.row_model):
            return []
        ways: tuple[dict[str, Any], ...] = {}, {"every": 2}, {"reach": 0.5 * REACH}
        return [self.log_normalizer(params, problem, **way) for way in ways]

    def review(self, statistics: Any) -> None:
        if not statistics:
            return
        full, *others = map(np.asarray, statistics)
        names = "half of them", "those of the inner half of their reach"
        for other, which in zip(others, names, strict=True):
            if np.max(np.abs(full - other)) < TOLERANCE:
                continue
            warnings.warn(
                QuadratureWarning(
                    f"MaximumLikelihood: log Z is {np.max(full):.6g} with all quadrature nodes and "
                    f"{np.max(other):.6g} with {which}. Raise `num_nodes` (now {self.num_nodes}), "
                    "or keep the energy from becoming so narrow, or flat, against the data."
                ),
                stacklevel=find_stack_level(),
            )
            return
