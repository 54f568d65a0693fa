# SPDX-License-Identifier: Apache-2.0
"""The state of EnergySVI between two rounds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.infer.svi import SVIRunResult

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.svi.summary import as_html, as_text
from numpyro_ebm.types import Params

__all__ = ["EnergySVIRunResult", "EnergySVIState", "select", "shapes_of"]


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
