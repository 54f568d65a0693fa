# SPDX-License-Identifier: Apache-2.0
"""What the operations of a program make of tables over states, and of polynomials in them.

Operations on elements that read one coordinate, or two, have tables again, whatever they are. Sums,
products and linear operations are applied to the values at relaxed indicators; for the others
:class:`~numpyro_ebm.program.state_tables.NotMultiAffine` is raised.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from numpyro_ebm._compat import Tracer, not_jax_tracer
from numpyro_ebm.program.constants import keep_known
from numpyro_ebm.program.jaxprs import (
    CUSTOM_RULES,
    ELEMENTWISE,
    called,
    interpret,
    is_integer,
    keeps_values,
    moved_operands,
    scan_parts,
)
from numpyro_ebm.program.state_moves import (
    element,
    look_up,
    move_elements,
    stacked,
)
from numpyro_ebm.program.state_tables import (
    FREE,
    NOT_KNOWN,
    NotMultiAffine,
    Relaxation,
    StateArray,
    Unknown,
    constant,
    evaluate_floats,
    evaluate_states,
    merged_slots,
    tabulated,
)

__all__ = ["StateWalker"]

MAX_ENTRIES = 4_000_000  # of a table that is written down
MAX_STEPS = 512  # of a loop that is written out

LINEAR = {"add", "add_any", "convert_element_type", "copy", "copy_p", "name", "neg", "sub"}
SUMS = {"cumsum", "reduce_window_sum"}
POWERS = {"integer_pow", "pow", "square"}


class StateWalker:
    """Walks through a program; its values are of :class:`StateArray`.

    :param relaxation: the indicators.
    :param draw: returns numbers of a shape, the same in every walk, where the program is tried at
        parameters that are traced. They stand for what is made of integers and of comparisons of
        parameters, which are :class:`~numpyro_ebm.program.state_tables.Unknown` then.
    """

    def __init__(
        self, relaxation: Relaxation, draw: Callable[[tuple[int, ...]], Any] | None = None
    ):
        self.relaxation, self._is_trial = relaxation, draw is not None
        self._draw: Callable[..., Any] = draw or Unknown

    def walk(self, closed: Any, arguments: list[StateArray]) -> list[StateArray]:
        """The results of a closed jaxpr."""
        return interpret(closed, self._apply, arguments, constant)

    def of_table(
        self,
        labels: np.ndarray,
        table: Callable[[], Any],
        relaxed: Callable[[], Any] | None = None,
        degree: int | None = None,
    ) -> StateArray:
        """An array with a table, which is also what it is at relaxed indicators."""
        if relaxed is None:
            relaxed = lambda: self.relaxation.of_table(labels, result.table())  # noqa: E731
        result = StateArray(labels, table, relaxed, len(labels) if degree is None else degree)
        return result

    def _apply(self, eqn, operands):
        """Values of all outputs of one operation."""
        try:
            return self._results(eqn, operands)
        except NotMultiAffine as error:
            why = str(error) or f"`{eqn.primitive.name}` is no sum or product of tables"
            raise NotMultiAffine(why) from None

    def _results(self, eqn, operands):
        name = eqn.primitive.name
        if not eqn.outvars:  # an effect, such as printing
            return []
        if any(x.is_unknown for x in operands):
            return self._of_unknown(eqn, operands)
        if all(x.is_constant for x in operands):
            return self._of_constants(eqn, operands)
        inner = called(eqn)
        if inner is not None:
            results = self.walk(inner, operands)
            return self._by_custom_rule(eqn, operands, results) if name in CUSTOM_RULES else results
        if name == "scan":
            return self._loop(eqn, operands)
        if name == "gather" and operands[0].is_constant:
            return [look_up(self, eqn, operands)]
        moved = moved_operands(eqn)
        if moved is not None and name != "select_n":
            return move_elements(self, eqn, operands, moved)
        if name.startswith("reduce_") or name in ("argmax", "argmin"):
            return [self._reduce(eqn, operands[0])]
        if name in ("dot_general", "conv_general_dilated"):
            return [self._contract(eqn, operands)]
        if name == "scatter-add" and operands[1].is_constant:
            return [self._sum_of(eqn, operands, (0, 2))]
        if name in SUMS and keeps_values(eqn):
            return [self._sum_of(eqn, operands, (0,))]
        if name in ELEMENTWISE or name in LINEAR:
            return [self._elementwise(eqn, operands)]
        raise NotMultiAffine

    def _of_constants(self, eqn, operands):
        values = [x.table() for x in operands]
        is_tried = self._is_trial and any(isinstance(x, Tracer) for x in values)
        inner = called(eqn)
        if is_tried and inner is not None:
            return self.walk(inner, operands)
        with keep_known(values):
            results = evaluate_states(eqn, values)
        is_unknown = [is_tried and not _holds_reals(v) for v in eqn.outvars]
        both = zip(is_unknown, results, strict=True)
        return [constant(Unknown(x.shape) if u else x) for u, x in both]

    def _of_unknown(self, eqn, operands):
        """Results of what is not known: any numbers, where they are real."""
        name, inner = eqn.primitive.name, called(eqn)
        if all(x.is_constant for x in operands):
            found = [
                (self._draw if _holds_reals(v) else Unknown)(v.aval.shape) for v in eqn.outvars
            ]
            return [*map(constant, found)]
        if inner is not None and name not in CUSTOM_RULES:
            return self.walk(inner, operands)
        if name != "select_n" or len(operands) != 3 or is_integer(eqn.outvars[0]):
            raise NotMultiAffine(f"`{name}` reads states beside what is {NOT_KNOWN}")
        (which, *cases), shape = operands, eqn.outvars[0].aval.shape
        weight = self._draw(which.table().shape)
        mixed = lambda a, b: a + weight * (b - a)  # noqa: E731
        relaxed = lambda: mixed(*(x.relaxed() for x in cases))  # noqa: E731
        degree = max(x.degree for x in cases)
        if any(x.labels is None for x in cases):
            return [StateArray(None, None, relaxed, degree)]
        labels, places = merged_slots([x.labels for x in cases], shape)
        if not self.has_table(labels):
            return [StateArray(None, None, relaxed, degree)]
        table = lambda: tabulated(mixed, [x.table() for x in cases], places)  # noqa: E731
        return [self.of_table(labels, table, relaxed, degree)]

    def _by_custom_rule(self, eqn, operands, results):
        """A function with a derivative of its own, of elements that read one coordinate each."""
        if all(x.is_constant for x in results):
            return results
        if any(x.labels is None or len(x.labels) > 1 for x in [*operands, *results]):
            raise NotMultiAffine
        places = [[0] * len(x.labels) for x in operands]

        def table(i):
            tables = [x.table() for x in operands]
            return tabulated(lambda *xs: evaluate_states(eqn, xs)[i], tables, places)

        def result(i, x):
            labels = x.labels if len(x.labels) else np.full((1, *x.labels.shape[1:]), FREE)
            return self.of_table(labels, lambda: table(i))

        return [result(i, x) for i, x in enumerate(results)]

    def _reduce(self, eqn, x):
        name, axes = eqn.primitive.name, eqn.params["axes"]
        labels = None if x.labels is None else _common_labels(x.labels, axes)
        relaxed = None
        if name == "reduce_sum" and keeps_values(eqn) and not _may_wrap_around(eqn):
            relaxed = lambda: evaluate_floats(eqn, [x.relaxed()])[0]  # noqa: E731
        elif labels is None and name == "reduce_prod":
            number = math.prod(eqn.invars[0].aval.shape[i] for i in axes)
            product = lambda: jnp.prod(x.relaxed(), axes)  # noqa: E731
            return StateArray(None, None, product, x.degree * number)
        if labels is not None:
            return self.of_table(labels, lambda: self._own_table(eqn, x), relaxed)
        if relaxed is None:
            raise NotMultiAffine
        return StateArray(None, None, relaxed, x.degree)

    def _own_table(self, eqn, x):
        return tabulated(
            lambda a: evaluate_states(eqn, [a])[0], [x.table()], [range(len(x.labels))]
        )

    def _contract(self, eqn, operands):
        """Products that are summed."""
        if _may_wrap_around(eqn):
            raise NotMultiAffine
        first, second = operands
        relaxed = lambda: evaluate_floats(eqn, [x.relaxed() for x in operands])[0]  # noqa: E731
        labels = self._contracted_labels(eqn, operands)
        if labels is None:
            return StateArray(None, None, relaxed, first.degree + second.degree)
        places = [range(len(x.labels)) for x in operands]

        def table():
            fn = lambda *xs: evaluate_states(eqn, xs)[0]  # noqa: E731
            return tabulated(fn, [x.table() for x in operands], places)

        return self.of_table(labels, table, relaxed)

    def _contracted_labels(self, eqn, operands):
        """Labels of sums over elements of one coordinate, with constant factors."""
        if eqn.primitive.name != "dot_general" or not any(x.is_constant for x in operands):
            return None
        own = 0 if operands[1].is_constant else 1
        labels = operands[own].labels
        if labels is None:
            return None
        contracted, batch = (x[own] for x in eqn.params["dimension_numbers"])
        labels = _common_labels(labels, contracted, keep=True)
        if labels is None:
            return None
        free = [i for i in range(labels.ndim - 1) if i not in (*contracted, *batch)]
        order = [0, *(i + 1 for i in (*batch, *free, *contracted))]
        labels = labels.transpose(order)[..., *([0] * len(contracted))]
        out = eqn.outvars[0].aval.shape
        others = len(out) - len(batch) - len(free)
        sizes = list(labels.shape)
        at = 1 + len(batch) + (len(free) if own == 0 else 0)
        sizes[at:at] = [1] * others
        return np.broadcast_to(labels.reshape(sizes), (len(labels), *out))

    def _sum_of(self, eqn, operands, linear):
        """An operation that is linear in some operands, the others constant."""
        if any(not x.is_constant for i, x in enumerate(operands) if i not in linear):
            raise NotMultiAffine

        def relaxed():
            values = [x.relaxed() if i in linear else x.table() for i, x in enumerate(operands)]
            return evaluate_floats(eqn, values, {*range(len(values))} - {*linear})[0]

        return StateArray(None, None, relaxed, max(x.degree for x in operands))

    def _elementwise(self, eqn, operands):
        name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
        labels, places = None, []
        if all(x.labels is not None for x in operands):
            labels, places = merged_slots([x.labels for x in operands], shape)
            if not self.has_table(labels):
                labels = None
        rule = self._polynomial(eqn, operands, labels)
        if labels is None:
            if rule is None:
                raise NotMultiAffine
            return StateArray(None, None, *rule)

        def table():
            fn = lambda *xs: evaluate_states(eqn, xs)[0]  # noqa: E731
            return tabulated(fn, [x.table() for x in operands], places)

        meets = len(labels) == 2 and np.any((labels[0] == labels[1]) & (labels[0] != FREE))
        varying = [x for x in operands if not x.is_constant]
        many = len(varying) > 1 or name == "select_n"  # of cases that may be infinite
        is_table = many and (len(labels) == 1 or meets) and name not in LINEAR
        relaxed, degree = (None, None) if rule is None or is_table else rule
        return self.of_table(labels, table, relaxed, degree)

    def _polynomial(self, eqn, operands, labels):
        """What it is at relaxed indicators, and its degree, for sums, products and powers."""
        name, params = eqn.primitive.name, eqn.params
        degrees = [x.degree for x in operands]
        is_float = not is_integer(eqn.outvars[0])
        if _may_wrap_around(eqn):
            return None
        relaxed = lambda: evaluate_floats(eqn, [x.relaxed() for x in operands])[0]  # noqa: E731
        if name in LINEAR and keeps_values(eqn) and eqn.outvars[0].aval.dtype != bool:
            return relaxed, max(degrees)
        if name == "mul" and eqn.outvars[0].aval.dtype != bool:
            return relaxed, sum(degrees)
        if name == "div" and operands[1].is_constant and is_float:
            return relaxed, degrees[0]
        if name == "select_n":
            return self._choice(eqn, operands)
        if name in POWERS and labels is None:
            power = params.get("y", 2)
            if name == "pow":
                power = operands[1].table() if operands[1].is_constant else math.nan
                power = power if not_jax_tracer(power) and np.ndim(power) == 0 else math.nan
            power = float(power)
            if power >= 1 and power == int(power):
                return lambda: operands[0].relaxed() ** int(power), degrees[0] * int(power)
        return None

    def _choice(self, eqn, operands):
        """One of two cases: by a constant, or by what an element that has a table says."""
        which, *cases = operands
        degree = max(x.degree for x in cases)
        if which.is_constant:

            def chosen():
                values = [which.table(), *(x.relaxed() for x in cases)]
                return evaluate_floats(eqn, values, {0})[0]

            return chosen, degree
        if which.labels is None or len(cases) != 2:
            return None

        def mixed():
            weight, (first, second) = which.relaxed(), (x.relaxed() for x in cases)
            return first + weight * (second - first)

        return mixed, which.degree + degree

    def _loop(self, eqn, operands):
        """A loop over a fixed number of steps, written out."""
        length, reverse = eqn.params["length"], eqn.params["reverse"]
        if length > MAX_STEPS:
            raise NotMultiAffine(f"a loop of it has more than {MAX_STEPS} steps")
        num_consts, num_carry = scan_parts(eqn)
        consts, carry = operands[:num_consts], operands[num_consts : num_consts + num_carry]
        xs, outputs = operands[num_consts + num_carry :], [None] * length
        for step in reversed(range(length)) if reverse else range(length):
            slices = [element(self, x, step) for x in xs]
            results = self.walk(eqn.params["jaxpr"], [*consts, *carry, *slices])
            carry, outputs[step] = results[:num_carry], results[num_carry:]
        return [*carry, *(stacked(self, x) for x in zip(*outputs, strict=True))]

    def has_table(self, labels: np.ndarray) -> bool:
        """Whether a table of elements that read so many coordinates is written down."""
        pairs = self.relaxation.num_states**2
        return len(labels) < 2 or (len(labels) == 2 and labels[0].size * pairs <= MAX_ENTRIES)


def _holds_reals(v):
    return jnp.issubdtype(v.aval.dtype, jnp.floating)


def _may_wrap_around(eqn):
    """Whether the result holds integers of few bits, which are added and multiplied modulo 2ᵇ."""
    dtype = eqn.outvars[0].aval.dtype
    return is_integer(eqn.outvars[0]) and dtype.kind != "b" and dtype.itemsize < 4


def _common_labels(labels, axes, keep=False):
    """Labels after a reduction of elements that read the same; ``None`` where they do not."""
    places = tuple(i + 1 for i in axes)
    largest = np.max(labels, places, keepdims=True, initial=FREE)
    if not np.all((labels == largest) | (labels == FREE)):
        return None
    if keep:
        return np.broadcast_to(largest, labels.shape)
    return np.squeeze(largest, places)
