# SPDX-License-Identifier: Apache-2.0
"""Programs with marked values: evaluated with other values in their places, and only as needed.

A function is traced once. What it computes can then be asked for part by part, and any value that
it marked on the way can be replaced, without running the function again.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from numpyro_ebm._compat import eval_jaxpr
from numpyro_ebm.program.jaxprs import needed, renamed, variables

__all__ = ["MarkedProgram", "marked", "signature"]

PREFIX = "numpyro_ebm:"


def marked(name: str, value: Any) -> Any:
    """A value, marked so that :class:`MarkedProgram` can replace it.

    :param str name: its name.
    :param value: a pytree of arrays.
    """
    return checkpoint_name(value, PREFIX + name)


def signature(tree: Any) -> tuple[Any, ...]:
    """What two pytrees have in common that one program can take: structure, shapes and types."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(map(_type, map(jax.typeof, leaves)))


class MarkedProgram:
    """The operations of a function of arrays, some of its values :func:`marked`.

    :param fn: a function of pytrees of arrays that returns a dict of them; it is traced, not run.
    :param args: its arguments, or their shapes and types.

    **Example**

    >>> from numpyro_ebm.program.marks import MarkedProgram, marked
    >>> def fn(x):
    ...     y = marked("y", 2.0 * x)
    ...     return {"square": y**2, "sum": x + y}
    >>> program = MarkedProgram(fn, 0.0)
    >>> float(program("square", (3.0,), {})), float(program("square", (3.0,), {"y": 5.0}))
    (36.0, 25.0)
    """

    def __init__(self, fn: Callable[..., Any], *args: Any):
        self._closed, self._shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        self._marks, self._parts = {}, {}
        for eqn in self._closed.jaxpr.eqns:
            if eqn.primitive.name == "name" and eqn.params["name"].startswith(PREFIX):
                self._marks.setdefault(eqn.params["name"].removeprefix(PREFIX), []).append(eqn)

    def takes(self, replaced: dict[str, Any]) -> bool:
        """Whether all of these values are marked, and of the same shapes and types.

        :param dict replaced: values by name, pytrees of arrays.
        """
        return all(
            [_type(v.aval) for eqn in self._marks.get(name, ()) for v in eqn.outvars]
            == list(signature(x)[1])
            for name, x in replaced.items()
        )

    def reads(self, what: str, replaced: Iterable[str]) -> list[bool]:
        """For every leaf of the arguments, whether a part of the result depends on it.

        :param str what: the part, a key of the function's result.
        :param replaced: names of marked values that are replaced.
        """
        jaxpr = self._part(what, tuple(sorted(replaced)))
        read = {v for eqn in jaxpr.eqns for v in variables(eqn.invars)}
        read.update(variables(jaxpr.outvars))
        return [v in read for v in self._closed.jaxpr.invars]

    def __call__(self, what: str, args: tuple[Any, ...], replaced: dict[str, Any]) -> Any:
        """A part of the result.

        :param str what: the part, a key of the function's result.
        :param tuple args: the arguments; those that the part does not read may be of any shape.
        :param dict replaced: values by name to put in the places of marked ones.
        """
        names = tuple(sorted(replaced))
        others = jax.tree.leaves([replaced[name] for name in names])
        leaves = eval_jaxpr(
            self._part(what, names), self._closed.consts, *jax.tree.leaves(args), *others
        )
        return jax.tree.unflatten(jax.tree.structure(self._shapes[what]), leaves)

    def _part(self, what, names):
        """The operations of a part, as a jaxpr of the arguments and of the replaced values."""
        if (what, names) not in self._parts:
            jaxpr = self._closed.jaxpr
            results = dict.fromkeys(self._shapes)
            leaves = iter(jaxpr.outvars)
            for key in sorted(results):
                results[key] = [next(leaves) for _ in jax.tree.leaves(self._shapes[key])]
            replaced = [v for name in names for eqn in self._marks[name] for v in eqn.outvars]
            same = {
                eqn.outvars[0]: eqn.invars[0]
                for name, eqns in self._marks.items()
                for eqn in eqns
                if name not in names
            }
            marks = {id(eqn) for eqns in self._marks.values() for eqn in eqns}
            jaxpr = renamed(
                jaxpr.replace(
                    eqns=[eqn for eqn in jaxpr.eqns if id(eqn) not in marks],
                    invars=[*jaxpr.invars, *replaced],
                    outvars=results[what],
                ),
                same,
            )
            self._parts[what, names] = jaxpr.replace(eqns=needed(jaxpr))
        return self._parts[what, names]


def _type(aval):
    return aval.shape, aval.dtype, aval.weak_type
