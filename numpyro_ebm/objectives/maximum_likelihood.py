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

from numpyro_ebm.errors import ModelError, QuadratureWarning, check_integer
from numpyro_ebm.log_normalizers.nodes import (
    NODES_AT_ONCE,
    REACH,
    log_sum_over_rows,
    sinh_nodes,
    weighted_grid,
)
from numpyro_ebm.model.finite_supports import finite_values
from numpyro_ebm.model.resize import with_rows
from numpyro_ebm.objectives.base import Objective

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
        check_integer("MaximumLikelihood", 4, num_nodes=num_nodes)
        self.num_nodes = num_nodes
        self.max_states = max_states
        super().__init__(marginal)

    def check_sites(self, row_model):
        self.check_observed(row_model)
        values, num_real = self._coordinates(row_model)
        if num_real > MOST_REAL:
            raise ModelError(
                f"MaximumLikelihood integrates over at most {MOST_REAL} real coordinates of a "
                f"row, and the visible sites {sorted(row_model.visible)} have {num_real}. Use "
                "ContrastiveDivergence, NCE or a score-based objective."
            )
        states = float(self.num_nodes) ** num_real * np.prod([float(len(x)) for x in values])
        if states > self.max_states:
            raise ModelError(
                f"MaximumLikelihood: log Z is a sum over {states:.3g} states of the visible sites "
                f"{sorted(row_model.visible)}, more than max_states={self.max_states}. Use "
                "PseudoLikelihood, RatioMatching, NCE or ContrastiveDivergence."
            )

    def _coordinates(self, row_model):
        """Values of every discrete coordinate of a row, and how many coordinates are real."""
        values, num_real = [], 0
        for name, x in sorted(jax.eval_shape(row_model.unconstrain_visible).items()):
            size = np.size(x) // row_model.num_rows
            if row_model.visible[name].is_discrete:
                values += [_values(row_model.visible[name])] * size
            else:
                num_real += size
        return values, num_real

    def _nodes(self, row_model, every=1, reach=np.inf):
        """Nodes of all coordinates of a row, in the order of the sites, and log-weights.

        Of a real coordinate every ``every``-th node counts, out to ``reach`` standard deviations.
        """
        at, log_weights = sinh_nodes(self.num_nodes)
        log_weights = np.where(np.abs(at) <= reach, log_weights, -np.inf) + np.log(every)
        columns, is_real = [], []
        for name, x in sorted(jax.eval_shape(row_model.unconstrain_visible).items()):
            site, size = row_model.visible[name], np.size(x) // row_model.num_rows
            is_real += [not site.is_discrete] * size
            if site.is_discrete:
                values = _values(site)
                columns += [(values, np.zeros(len(values)))] * size
            else:
                columns += [(at[::every], log_weights[::every])] * size
        columns, log_weights = (jax.tree.map(jnp.asarray, x) for x in zip(*columns, strict=True))
        nodes, log_weights = weighted_grid(columns, log_weights, jnp)
        flat = stop_gradient(row_model.flatten(row_model.unconstrain_visible()))
        nodes = jnp.asarray(nodes, flat.dtype)
        log_weights = jnp.asarray(log_weights, jnp.result_type(float))
        if any(is_real):
            spread = jnp.std(flat, 0)
            # Of a single row, or equal ones (but for rounding), there is no spread to scale to.
            rounding = 8 * jnp.finfo(flat.dtype).eps * jnp.max(jnp.abs(flat), 0)
            spread = jnp.where(np.array(is_real) & (spread > rounding), spread, 1.0)
            nodes = jnp.where(np.array(is_real), jnp.mean(flat, 0), 0.0) + spread * nodes
            log_weights = log_weights + jnp.sum(jnp.log(spread))
        return nodes, log_weights

    def log_normalizer(self, params, problem, every=1, reach=np.inf):
        """log Z(θ) of every row, of shape (rows,), or a scalar if all rows share it."""
        nodes, log_weights = self._nodes(problem.row_model, every, reach)
        at_data = stop_gradient(problem.row_model.flatten(problem.unconstrained))
        low, high = jnp.min(at_data, 0), jnp.max(at_data, 0)
        if not problem.row_model.covariates:  # a plate of as many rows as there are nodes
            row_model = with_rows(problem.row_model, min(len(nodes), NODES_AT_ONCE))
            if row_model is not None:
                problem = problem._replace(
                    row_model=row_model, unconstrained=row_model.unconstrain_visible()
                )
                at_data = jnp.broadcast_to(at_data[:1], (row_model.num_rows, at_data.shape[1]))
        row_model, rows = problem.row_model, problem.row_model.num_rows
        estimate = self.estimate(jax.random.key(0), params, problem)
        has_real = self._coordinates(row_model)[1] > 0

        def log_density(params, flat):
            return estimate.log_density(params, row_model.unflatten(flat))

        def with_mass(params, flat):
            # Far out an energy may overflow. Such a node counts as zero; among the data there is
            # no excuse for NaN. A weight of zero times an infinite derivative is no number: nodes
            # without mass are moved to the data first.
            values = log_density(stop_gradient(params), flat)
            among = jnp.all((flat >= low) & (flat <= high), -1)
            massive = (values > -jnp.inf) | (jnp.isnan(values) & among)
            values = log_density(params, jnp.where(massive[:, None], flat, at_data))
            return jnp.where(massive, values, -jnp.inf)

        if not row_model.covariates:

            def log_sum(density, params):
                return log_sum_over_rows(partial(density, params), nodes, log_weights, rows)

            if not has_real:
                return log_sum(log_density, params)
            own = {name: params[name] for name in row_model.parameters}
            other = {name: x for name, x in params.items() if name not in own}
            fast = lambda own: log_sum(log_density, {**other, **own})  # noqa: E731
            safe = lambda own: log_sum(with_mass, {**other, **own})  # noqa: E731
            return _guarded(fast, safe)(own)

        density = with_mass if has_real else log_density

        def at_node(node):
            return density(params, jnp.broadcast_to(node, (rows, node.size)))

        values = jax.lax.map(jax.checkpoint(at_node), nodes, batch_size=64)
        return logsumexp(values + log_weights[:, None], 0)

    def energy_loss(self, rng_key, params, problem):
        estimate = self.estimate(rng_key, params, problem)
        here = estimate.log_density(params, problem.unconstrained)
        _, log_det = problem.row_model.constrain(problem.unconstrained)
        return jnp.mean(self.log_normalizer(params, problem) - here + log_det)

    def statistics(self, rng_key, params, problem):
        """log Z with all nodes, with half of them, and with a reach of half the width."""
        if self._coordinates(problem.row_model)[1] == 0:
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
    """A function of parameters: ``fast``, or ``safe`` where that or its derivative is no number.

    With a rule for its derivative, which can be differentiated in turn. The rule may be asked for
    after a `jit` around it has left; so what the functions close over goes with the arguments.
    """

    def guarded(params):
        programs = [jax.make_jaxpr(fn)(params) for fn in (fast, safe)]

        def run(which, consts, params):
            leaves = jax.tree.leaves(params)
            return jax.core.eval_jaxpr(programs[which].jaxpr, consts[which], *leaves)[0]

        def checked(derive, consts, params):
            found = derive(partial(run, 0, consts))(params)
            is_finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(found)]
            again = lambda: derive(partial(run, 1, consts))(params)  # noqa: E731
            return jax.lax.cond(jnp.all(jnp.stack(is_finite)), lambda: found, again)

        @jax.custom_jvp
        def value(consts, params):
            return checked(lambda fn: fn, consts, params)

        @value.defjvp
        def value_and_slope(primals, tangents):
            found, gradient = checked(jax.value_and_grad, *primals)
            along = jax.tree.map(jnp.vdot, gradient, tangents[1])
            return found, sum(jax.tree.leaves(along))

        return value(stop_gradient([program.consts for program in programs]), params)

    return guarded
