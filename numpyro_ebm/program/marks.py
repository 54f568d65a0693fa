# SPDX-License-Identifier: Apache-2.0
"""Programs with marked values: evaluated with other values in their places, and only as needed.

A function is traced once. What it computes can then be asked for part by part, and any value that
it marked on the way can be replaced, without running the function again.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from numpyro_ebm._compat import ClosedJaxpr, Literal, eval_jaxpr
from numpyro_ebm.program.constants import evaluate_known
from numpyro_ebm.program.convolutions import has_convolutions
from numpyro_ebm.program.jaxprs import needed, renamed, variables

__all__ = ["MarkedProgram", "Operand", "marked", "signature"]

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


class Operand(NamedTuple):
    """What an argument of a program is.

    - **role** - ``"array"`` of the caller, or the role of a site, or ``None``.
    - **name** - the label of the array, or the name of the site.
    - **value** - the argument.
    """

    role: str | None
    name: str
    value: Any


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

    def marks_read(self, what: str) -> set[str]:
        """Names of the marked values that a part of the result depends on.

        :param str what: the part, a key of the function's result.
        """
        part = self._closed.jaxpr.replace(outvars=self._outvars(what))
        marks = {id(eqn): name for name, eqns in self._marks.items() for eqn in eqns}
        return {marks[id(eqn)] for eqn in needed(part) if id(eqn) in marks}

    def is_one_value(self, what: str) -> bool:
        """Whether all leaves of a part are results of the same operations on the same values."""
        jaxpr = self._part(what, ())
        first, *others = jaxpr.outvars
        made = {v: (eqn, i) for eqn in jaxpr.eqns for i, v in enumerate(eqn.outvars)}

        def same(a, b):
            if a is b:
                return True
            if isinstance(a, Literal) or isinstance(b, Literal):
                both = isinstance(a, Literal) and isinstance(b, Literal)
                return both and np.array_equal(a.val, b.val)
            if a not in made or b not in made:
                return False
            (p, i), (q, j) = made[a], made[b]
            if p.primitive is not q.primitive or i != j or str(p.params) != str(q.params):
                return False
            return len(p.invars) == len(q.invars) and all(map(same, p.invars, q.invars))

        return all(same(first, other) for other in others)

    @property
    def has_convolutions(self) -> bool:
        """Whether there are convolutions among its operations."""
        return has_convolutions(self._closed.jaxpr)

    @property
    def constants(self) -> list[Any]:
        """The arrays that the function closes over."""
        return self._closed.consts

    def __call__(
        self, what: str, args: tuple[Any, ...], replaced: dict[str, Any], *, known: bool = False
    ) -> Any:
        """A part of the result.

        :param str what: the part, a key of the function's result.
        :param tuple args: the arguments; those that the part does not read may be of any shape.
        :param dict replaced: values by name to put in the places of marked ones.
        :param bool known: whether the result is known inside of `jit`, too.
        """
        leaves = jax.tree.leaves((args, [replaced[name] for name in sorted(replaced)]))
        part = self.part(what, replaced)
        if known:
            leaves = evaluate_known(part, leaves)
        else:
            leaves = eval_jaxpr(part.jaxpr, part.consts, *leaves)
        return jax.tree.unflatten(jax.tree.structure(self._shapes[what]), leaves)

    def part(self, what: str, replaced: Iterable[str]) -> ClosedJaxpr:
        """The operations of a part, of the leaves of the arguments and of the replaced values.

        :param str what: the part, a key of the function's result.
        :param replaced: names of marked values that are replaced.
        """
        return ClosedJaxpr(self._part(what, tuple(sorted(replaced))), self._closed.consts)

    def _part(self, what, names):
        """The operations of a part, as a jaxpr of the arguments and of the replaced values."""
        if (what, names) not in self._parts:
            jaxpr = self._closed.jaxpr
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
                    outvars=self._outvars(what),
                ),
                same,
            )
            self._parts[what, names] = jaxpr.replace(eqns=needed(jaxpr))
        return self._parts[what, names]

    def _outvars(self, what):
        leaves = iter(self._closed.jaxpr.outvars)
        results = {
            key: [next(leaves) for _ in jax.tree.leaves(self._shapes[key])]
            for key in sorted(self._shapes)
        }
        return results[what]


def _type(aval):
    return aval.shape, aval.dtype, aval.weak_type
