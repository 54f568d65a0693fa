# SPDX-License-Identifier: Apache-2.0
"""The state of EnergySVI between two rounds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.svi import SVIRunResult

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.svi.summary import as_html, as_text
from numpyro_ebm.types import Params

__all__ = [
    "EnergySVIRunResult",
    "EnergySVIState",
    "is_finite",
    "is_finite_on_host",
    "select",
    "shapes_of",
]


class EnergySVIState(NamedTuple):
    """State of :class:`~numpyro_ebm.EnergySVI`; a pytree of arrays that can be pickled.

    - **optim_state** - optimiser state of the energy's parameters.
    - **guide_optim_state** - optimiser state of the guide's parameters; ``None`` without a guide.
    - **rng_key** - the key of the run; round i uses ``fold_in(rng_key, i)``.
    - **step** - rounds so far, i of the next one: those that were undone count, so that no round
      is tried twice with the same random numbers. A resumed run continues where it stopped.
    - **network_optim_states** - optimiser states of the objective's own networks, in their order.
    - **objective_state** - what the objective keeps from round to round, such as persistent chains.
    - **ema** - exponential moving averages of all parameters, in unconstrained coordinates, a dict
      for each optimiser; ``None`` without.
    - **marginal_state** - what marginals keep of every row, such as persistent particles.
    """

    optim_state: Any
    guide_optim_state: Any
    rng_key: jax.Array
    step: jax.Array
    network_optim_states: tuple[Any, ...] = ()
    objective_state: Any = None
    ema: Any = None
    marginal_state: Any = None

    @property
    def step_key(self) -> jax.Array:
        """Key of the next round."""
        return jax.random.fold_in(self.rng_key, self.step)


class EnergySVIRunResult(SVIRunResult):
    """NumPyro's ``SVIRunResult``, of ``params``, ``state`` and ``losses``.

    - **ema_params** - exponential moving averages of the parameters, by name; ``None`` unless
      ``run`` was asked for them.
    - **objective** - the class of the objective.
    """

    ema_params: Params | None = None
    objective: str = ""

    def __repr__(self) -> str:
        is_known = all(map(not_jax_tracer, jax.tree.leaves(tuple(self))))
        return as_text(self) if is_known else super().__repr__()

    def _repr_html_(self) -> str:
        return as_html(self)


def is_finite(
    state: EnergySVIState, loss: jax.Array, before: EnergySVIState, numpy: Any = jnp
) -> jax.Array:
    """Whether the loss and all numbers of the state are finite, or never were.

    An optimiser whose moments have overflowed never moves its parameters again, at losses that
    are finite; one that keeps the least loss so far begins with infinity.

    :param EnergySVIState state: a state.
    :param loss: the loss, or losses, of the rounds that led to it.
    :param EnergySVIState before: the state before them.
    :param numpy: ``jax.numpy``, or NumPy itself.
    """
    both = zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True)
    looks = [
        numpy.all(numpy.isfinite(x) | ~numpy.isfinite(old))
        for x, old in both
        if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    return numpy.all(numpy.stack([numpy.all(numpy.isfinite(loss)), *looks]))


def is_finite_on_host(state: EnergySVIState, loss: jax.Array, before: EnergySVIState) -> bool:
    """As :func:`is_finite`, with nothing to compile: on a CPU NumPy reads the arrays themselves.

    As a program it is three loops for every array of the state, a second of compilation.
    """
    numbers = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    if all(np.isfinite(x).all() for x in (loss, *numbers)):  # what came before need not be read
        return True
    return bool(is_finite(state, loss, before, np))


def select(condition: jax.Array, new: EnergySVIState, old: EnergySVIState) -> EnergySVIState:
    """The new state where the condition holds, else the old one."""

    def leaf(x, y):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x  # the key of a run never changes
        return jnp.where(condition, x, y)

    return jax.tree.map(leaf, new, old)


def shapes_of(tree: Any) -> Any:
    """The shapes and types of a pytree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
