# SPDX-License-Identifier: Apache-2.0
r"""Maximum likelihood where log Z is computable: few states, or one or two real coordinates.

.. math:: \mathcal L(θ) = -E \log p(v; θ) = \log Z(θ) - E \log\tilde p(v; θ)

with log Z(θ) by enumeration of discrete visible coordinates and by quadrature over at most two real
ones. The reference every other objective is measured against, and the best choice where it exists.
"""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jax.scipy.special import logsumexp
from numpyro.util import find_stack_level

from numpyro_ebm.errors import ModelError, QuadratureWarning
from numpyro_ebm.normalizer.exact import REACH, grid_nodes, log_sum_over_rows, quadrature_nodes
from numpyro_ebm.objectives.base import Objective
from numpyro_ebm.objectives.discrete import finite_values

__all__ = ["MaximumLikelihood"]

MOST_REAL = 2
TOLERANCE = 1e-3


class MaximumLikelihood(Objective):
    r"""Exact maximum likelihood (ML), with log Z(θ) by enumeration or quadrature.

    .. math:: \mathcal L(θ) = \log Z(θ) - E \log\tilde p(v; θ)

    The value is the negative log-likelihood of a row, in nats.

    :param marginal: how latent sites are integrated out: ``Exact`` or ``Enumerated``.
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

    def __init__(self, marginal=None, *, num_nodes=128, max_states=1_048_576):
        if not isinstance(num_nodes, int) or num_nodes < 4:
            raise ModelError(
                f"MaximumLikelihood: `num_nodes` must be an integer of at least 4: {num_nodes!r}."
            )
        self.num_nodes = num_nodes
        self.max_states = max_states
        super().__init__(marginal)

    def check_sites(self, joint):
        self.check_observed(joint)
        values, num_real = self._coordinates(joint)
        if num_real > MOST_REAL:
            raise ModelError(
                f"MaximumLikelihood integrates over at most {MOST_REAL} real coordinates of a "
                f"row, and the visible sites {sorted(joint.visible)} have {num_real}. Use "
                "ContrastiveDivergence, NCE or a score-based objective."
            )
        states = float(self.num_nodes) ** num_real * np.prod([float(len(x)) for x in values])
        if states > self.max_states:
            raise ModelError(
                f"MaximumLikelihood: log Z is a sum over {states:.3g} states of the visible sites "
                f"{sorted(joint.visible)}, more than max_states={self.max_states}. Use "
                "PseudoLikelihood, RatioMatching, NCE or ContrastiveDivergence."
            )

    def _coordinates(self, joint):
        """Values of every discrete coordinate of a row, and how many coordinates are real."""
        values, num_real = [], 0
        for name, x in sorted(jax.eval_shape(joint.unconstrain_visible).items()):
            size = np.size(x) // joint.num_rows
            if joint.visible[name].is_discrete:
                values += [_values(joint.visible[name])] * size
            else:
                num_real += size
        return values, num_real

    def _nodes(self, joint, every=1, reach=np.inf):
        """Nodes of all coordinates of a row, in the order of the sites, and log-weights.

        Of a real coordinate every ``every``-th node counts, out to ``reach`` standard deviations.
        """
        flat = stop_gradient(joint.flatten(joint.unconstrain_visible()))
        columns, log_weights, start = [], [], 0
        for name, x in sorted(jax.eval_shape(joint.unconstrain_visible).items()):
            size = np.size(x) // joint.num_rows
            for i in range(start, start + size):
                if joint.visible[name].is_discrete:
                    values = _values(joint.visible[name])
                    columns.append(jnp.asarray(values, flat.dtype))
                    log_weights.append(jnp.zeros(len(values), jnp.result_type(float)))
                else:
                    # Of a single row, or equal ones, there is no spread to scale to.
                    spread = jnp.std(flat[:, i])
                    spread = jnp.where(spread > 0, spread, 1.0)
                    center = jnp.mean(flat[:, i])
                    nodes, weights = quadrature_nodes(center, spread, self.num_nodes)
                    inside = jnp.abs(nodes - center) <= reach * spread
                    weights = jnp.where(inside, weights, -jnp.inf)
                    columns.append(nodes[::every])
                    log_weights.append(weights[::every] + np.log(every))
            start += size
        return grid_nodes(columns, log_weights)

    def log_normalizer(self, params, problem, every=1, reach=np.inf):
        """log Z(θ) of every row, of shape (rows,), or a scalar if all rows share it."""
        joint = problem.joint
        estimate = self.estimate(jax.random.key(0), params, problem)
        nodes, log_weights = self._nodes(joint, every, reach)

        at_data = stop_gradient(joint.flatten(problem.unconstrained))
        low, high = jnp.min(at_data, 0), jnp.max(at_data, 0)
        has_real = self._coordinates(joint)[1] > 0

        def log_density(params, flat):
            return estimate.log_density(params, joint.unflatten(flat))

        # Far out an energy may overflow. Such a node counts as zero; among the data there is no
        # excuse for NaN.
        def has_mass(flat, values):
            among = jnp.all((flat >= low) & (flat <= high), -1)
            return (values > -jnp.inf) | (jnp.isnan(values) & among)

        def in_one_pass(params, flat):
            values = log_density(params, flat)
            return jnp.where(has_mass(flat, values), values, -jnp.inf) if has_real else values

        def in_two_passes(params, flat):
            # A weight of zero times an infinite derivative is no number: nodes without mass are
            # moved to the data first.
            massive = has_mass(flat, log_density(stop_gradient(params), flat))
            values = log_density(params, jnp.where(massive[:, None], flat, at_data))
            return jnp.where(massive, values, -jnp.inf)

        if not joint.covariates:
            rows = joint.num_rows
            if not has_real:
                density = partial(in_one_pass, params)
                return log_sum_over_rows(density, nodes, log_weights, rows)
            own = {name: params[name] for name in joint.parameters}
            other = {name: x for name, x in params.items() if name not in own}

            def log_sum(density, own):
                density = partial(density, {**other, **own})
                return log_sum_over_rows(density, nodes, log_weights, rows)

            return _guarded(partial(log_sum, in_one_pass), partial(log_sum, in_two_passes))(own)

        density = in_two_passes if has_real else in_one_pass

        def at_node(node):
            return density(params, jnp.broadcast_to(node, (joint.num_rows, node.size)))

        values = jax.lax.map(jax.checkpoint(at_node), nodes, batch_size=64)
        return logsumexp(values + log_weights[:, None], 0)

    def energy_loss(self, rng_key, params, problem):
        estimate = self.estimate(rng_key, params, problem)
        here = estimate.log_density(params, problem.unconstrained)
        _, log_det = problem.joint.constrain(problem.unconstrained)
        return jnp.mean(self.log_normalizer(params, problem) - here + log_det)

    def statistics(self, rng_key, params, problem):
        """log Z with all nodes, with half of them, and with a reach of half the width."""
        if self._coordinates(problem.joint)[1] == 0:
            return []
        ways = {}, {"every": 2}, {"reach": 0.5 * REACH}
        return [self.log_normalizer(params, problem, **way) for way in ways]

    def review(self, statistics):
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


def _values(site):
    """The values of one coordinate of a discrete site."""
    lowest, num_values = finite_values(site, "MaximumLikelihood")
    return lowest + np.arange(num_values)


def _guarded(fast, safe):
    """A function of parameters whose derivative is that of ``safe`` where ``fast`` has none."""

    def guarded(params):
        # No rule of its own: that would close over values which a `jit` around it has left behind.
        constants = stop_gradient(params)
        value, gradient = jax.value_and_grad(fast)(constants)
        is_finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(gradient)]
        gradient = jax.lax.cond(
            jnp.all(jnp.stack(is_finite)), lambda: gradient, lambda: jax.grad(safe)(constants)
        )
        steps = jax.tree.map(jnp.subtract, params, constants)
        along = jax.tree.map(jnp.vdot, stop_gradient(gradient), steps)
        return stop_gradient(value) + sum(jax.tree.leaves(along))

    return guarded
