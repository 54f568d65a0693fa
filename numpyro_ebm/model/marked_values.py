# SPDX-License-Identifier: Apache-2.0
"""Values of the sites of a model that is being traced: marked, remembered, and given back."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.primitives import Messenger

from numpyro_ebm._compat import Tracer
from numpyro_ebm.language.sites import is_energy
from numpyro_ebm.model.network_state import held_state
from numpyro_ebm.program.marks import marked

__all__ = ["frozen", "mark_values"]


class mark_values(Messenger):
    """Mark the values of all sites of a model that is being traced, and remember them."""

    def __init__(self) -> None:
        self.values, self.has_loops = {}, False
        super().__init__()

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "control_flow":
            self.has_loops = True  # its sites have their values already, inside of it
        if msg["type"] == "sample" and (is_energy(msg) or msg["fn"].event_shape == (0,)):
            return  # an energy, or a `numpyro.factor`
        if msg["type"] == "mutable":
            msg["value"] = held_state(msg)
        if msg["type"] in ("sample", "param", "plate", "mutable", "deterministic"):
            if msg["type"] == "sample" and msg["is_observed"] and not msg["fn"].support.is_discrete:
                msg["value"] = _with_dtype(msg["value"], jnp.result_type(msg["value"], float))
            if msg["type"] == "param":
                msg["value"] = jax.tree.map(_strongly_typed, msg["value"])
            self.values[msg["name"]] = msg["value"]
            msg["value"] = marked(msg["name"], msg["value"])


def frozen(*dicts: dict[str, Any]) -> tuple[Callable[[list[Any]], list[dict[str, Any]]], list[Any]]:
    """Dicts of pytrees in two parts: a function of their tracers that puts others there, and these.

    The order of the dicts is kept, in which sites are drawn and summed; a pytree would sort them.
    """
    names = [list(x) for x in dicts]
    leaves, structure = jax.tree.flatten([list(x.values()) for x in dicts])
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tracer)]
    arrays = [leaves[i] for i in places]
    known = {i: x for i, x in enumerate(leaves) if i not in places}

    def thaw(arrays):
        found = {**known, **dict(zip(places, arrays, strict=True))}
        values = structure.unflatten([found[i] for i in range(len(found))])
        return [dict(zip(*pair, strict=True)) for pair in zip(names, values, strict=True)]

    return thaw, arrays


def _with_dtype(x, dtype):
    if isinstance(x, Tracer):
        return jnp.asarray(x, dtype)
    with jax.ensure_compile_time_eval():  # data stay known, for who checks them
        return jnp.asarray(x, dtype)


def _strongly_typed(x):
    """An initial value that is a number of Python, as an optimiser makes it."""
    if isinstance(x, Tracer):
        return x
    with jax.ensure_compile_time_eval():
        return jax.lax.convert_element_type(x, jnp.result_type(x))
