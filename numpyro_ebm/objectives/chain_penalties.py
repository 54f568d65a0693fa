# SPDX-License-Identifier: Apache-2.0
r"""What contrastive divergence may add to its loss: penalties of energies, and what it leaves out.

Penalties of the energy and of its gradient, at the rows and at the chains,

.. math:: α\, (E_{\text{data}} E^2 + E_{v^-} E^2)
    + β\, (E_{\text{data}} \|∇_v E\|^2 + E_{v^-} \|∇_v E\|^2),

and the dependence of the chains themselves on θ. With :math:`q_θ` the law of the chains, the
gradient of contrastive divergence lacks :math:`∇_θ` of

.. math:: \mathrm{KL}(q_θ \,\|\, p_{\bar θ}) = E_{q_θ} E(v; \barθ) - H(q_θ) + \text{const}

where :math:`\bar θ` is held and :math:`q_θ` is differentiated: here through one more step of
Langevin dynamics, :math:`v' = v^- - ε ∇E(v^-; θ) + \sqrt{2ε}\, ξ`, with its entropy by nearest
neighbours. It is minimised, as Du et al. do: chains come to low energies, and stay apart. In the
gradient of :math:`\mathrm{KL}(p_{\text{data}} \| p_θ) - \mathrm{KL}(q_θ \| p_θ)`, the difference
that contrastive divergence is named after, the same term has the other sign, so that the sum is
that of no such difference: it is a regulariser, and moves the minimum if q is not p.

Reference: Du, Mordatch, *Implicit generation and modeling with energy-based models*, NeurIPS 2019
(energies); Kumar, Ozair, Goyal, Courville, Bengio, *Maximum entropy generators for energy-based
models*, 2019 (gradients); Du, Li, Tenenbaum, Mordatch, *Improved contrastive divergence training
of energy-based models*, ICML 2021 (the term of the chains).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from numpyro_ebm.model.row_groups import in_groups
from numpyro_ebm.objectives.chain_moves import joined_rows
from numpyro_ebm.objectives.nearest_neighbours import neighbour_entropy
from numpyro_ebm.objectives.plan import Problem
from numpyro_ebm.types import Params, SiteValues

__all__ = ["chain_divergence", "energy_penalties"]


def energy_penalties(
    params: Params,
    problem: Problem,
    visible: SiteValues,
    temperature: float,
    of_energy: float,
    of_gradient: float,
) -> jax.Array:
    """Penalties of the rows of the batch and of the chains after them, each by itself.

    :param dict params: parameter values by name.
    :param Problem problem: the batch.
    :param dict visible: unconstrained visible values of the chains, rows leading.
    :param float temperature: T; energies of the model are those over T.
    :param float of_energy: α.
    :param float of_gradient: β, of gradients in unconstrained coordinates.
    :return: array of shape (rows + chains,).
    """
    row_model = problem.row_model

    def energies(rows):
        values, _ = row_model.constrain(row_model.from_rows(rows))
        terms = row_model.terms({**params, **values})
        total = sum(terms[name] for name in row_model.energies)
        return jnp.broadcast_to(temperature * total, (row_model.num_rows,))

    def penalties(rows):
        if not of_gradient:
            return of_energy * energies(rows) ** 2
        energy, gradient = _value_and_gradient(energies, rows)
        squares = sum(jnp.sum(g**2, tuple(range(1, g.ndim))) for g in jax.tree.leaves(gradient))
        return of_energy * energy**2 + of_gradient * squares

    return in_groups(penalties, row_model.num_rows, joined_rows(problem, visible))


def chain_divergence(
    rng_key: jax.Array,
    log_density: Callable[[Params, SiteValues], jax.Array],
    params: Params,
    problem: Problem,
    visible: SiteValues,
    step_size: float,
) -> jax.Array:
    r"""KL(q_θ ‖ p) of chains a step on, up to a constant, with its derivative in θ through q alone.

    :param rng_key: random key.
    :param log_density: ``(params, visible) -> log p̃``, (chains,), of unconstrained visible values.
    :param dict params: parameter values by name.
    :param Problem problem: the batch.
    :param dict visible: unconstrained visible values of the chains, rows leading.
    :param float step_size: ε.
    :return: a scalar.
    """
    _, scores = _value_and_gradient(partial(log_density, params), visible)
    keys = jax.random.split(rng_key, len(visible))
    moved = {
        name: visible[name]
        + step_size * scores[name]
        + (2 * step_size) ** 0.5 * jax.random.normal(key, scores[name].shape, scores[name].dtype)
        for key, name in zip(keys, sorted(visible), strict=True)
    }
    log_p = log_density(stop_gradient(params), moved)
    row_model = problem.row_model
    return -jnp.mean(log_p) - neighbour_entropy(row_model.flatten(row_model.from_rows(moved)))


def _value_and_gradient(fn, rows):
    """Values of rows, and the gradient of each in its own coordinates."""
    values, pullback = jax.vjp(fn, rows)
    return values, pullback(jnp.ones_like(values))[0]
