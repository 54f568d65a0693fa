# SPDX-License-Identifier: Apache-2.0
r"""Functions of finite states that are affine in the indicators of every coordinate.

.. math:: f(x) = g(X), \quad X_{ck} = [x_c = k], \qquad
    f(x^{c \to k}) - f(x) = \frac{∂g}{∂X_{ck}} - \frac{∂g}{∂X_{c x_c}}

Nearly all energies of discrete sites are of this kind: whatever reads one coordinate is a table
over its states, and tables of different coordinates are multiplied and summed. Then one gradient of
g is what every coordinate would change at every state, exactly, at any degree.

That f is a polynomial in tables follows from the operations of its program. That no coordinate
meets itself, :math:`∂^2 g / ∂X_c^2 = 0`, is an identity between polynomials, which is tried at
random indicators and random parameters: a polynomial that is not zero is zero there with
probability zero.

Reference: the identity test, Schwartz, *Fast probabilistic algorithms for verification of
polynomial identities*, Journal of the ACM 1980.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from numpyro_ebm._compat import Tracer
from numpyro_ebm.program.coloring import greedy_colors
from numpyro_ebm.program.interactions import interactions
from numpyro_ebm.program.monomials import Monomials, monomials
from numpyro_ebm.program.quadratic import quadratic_form
from numpyro_ebm.program.state_rules import StateWalker
from numpyro_ebm.program.state_tables import NotMultiAffine, Relaxation, Unknown, constant

__all__ = ["MultiAffine", "multi_affine", "tell_general", "value_table"]

logger = logging.getLogger(__name__)

AT_ONCE = 2_000_000  # indicators of the points at which the identity is tried together
MOST_OF_ALL_ROWS = 3_000_000  # indicators, where rows are not of one program
MOST_INDICATORS = 4_096  # of a row, for a matrix of second derivatives to be written down
MOST_PROVED = 64
PROVED: dict[Any, Any] = {}
"""What was found of the last programs: a kernel or a loss reads the same one several times."""

SIGNS = ((1.0, 0.0), (0.0, 1.0), (0.0, -1.0))
"""Of random parameters and of their sizes: some are positive, others are used by their sign."""


def multi_affine(
    fn: Callable[..., jax.Array],
    args: Any,
    rows: Mapping[str, Any],
    values: Mapping[str, ArrayLike],
    *,
    in_pairs: bool = False,
) -> "MultiAffine | None":
    """A function of the states of rows in the form above, where it can be shown to have it.

    Where it cannot, that is told in the log, once for a program.

    :param fn: ``(args, rows) -> (rows,)``, row by row; it is traced, not run.
    :param args: pytree of parameters: it is shown for all their values. What ``fn`` closes over
        counts with its values, or as a parameter where these are not known (under `jit`).
    :param dict rows: arrays (or shapes with dtypes) of shape (rows, ...) by site.
    :param dict values: the possible values of one coordinate, of shape (states,), of each site
        with finitely many. It is shown for all values of the others.
    :param bool in_pairs: a form of degree two will do that is not affine, where a coordinate meets
        itself.
    :return: the :class:`MultiAffine`; ``None`` where it cannot be shown.

    **Example**

    >>> import jax, jax.numpy as jnp
    >>> from numpyro_ebm.program.multi_affine import multi_affine
    >>> def potts(J, x):
    ...     o = jax.nn.one_hot(x["s"], 3)
    ...     return jnp.einsum("nia,ab,nib->n", o[:, 1:], J, o[:, :-1])
    >>> J, x = jnp.arange(9.0).reshape(3, 3), jnp.array([[0, 2, 1]])
    >>> form = multi_affine(potts, J, {"s": x}, {"s": [0, 1, 2]})
    >>> form.degree, form.is_affine
    (2, True)
    >>> slopes = jax.grad(lambda X: jnp.sum(form(J, X)))(form.indicators(x))
    >>> (slopes[0, 1] - slopes[0, 1, 2]).tolist()  # the middle one at 0, 1, and 2 as it is
    [-8.0, -4.0, 0.0]
    >>> multi_affine(lambda J, x: jnp.max(x["s"], -1) * 1.0, J, {"s": x}, {"s": [0, 1, 2]})
    """
    form = MultiAffine(fn, args, rows, values)
    try:
        form.prove()
        if not (form.is_affine or (in_pairs and form.degree == 2)):
            raise NotMultiAffine(form.why_not_affine)
    except NotMultiAffine as error:
        tell_general(form.names, str(error), form.program)
        return None
    return form


def tell_general(names: Iterable[str], why: str, program: str = "") -> None:
    """Say in the log what takes the general path, and what it costs.

    :param names: the discrete sites.
    :param str why: the reason.
    :param str program: of the log-density; it is said once for each.
    """
    _tell_once(tuple(sorted(names)), why, hash(program))


@lru_cache(maxsize=1_024)
def _tell_once(names, why, program):
    logger.info(
        "The energy is not seen to be affine in the indicators of each coordinate of %s: %s. "
        "So it is evaluated at every value of a coordinate that is compared or drawn, where one "
        "gradient would tell all of them.",
        list(names),
        why,
    )


class MultiAffine:
    """A function of the states of rows, at relaxed indicators. Made by :func:`multi_affine`.

    - **values** - the values of every coordinate of a row, (coordinates, states), the last one
      repeated where a site has fewer.
    - **is_state** - which of them are states, of the same shape.
    - **is_binary** - whether all coordinates have two states. Then the indicators of a row are
      those of the second state, (coordinates,), and else (coordinates, states).
    - **degree** - a bound of its degree in the indicators.
    - **why_not_affine** - a coordinate that meets itself; empty where it is affine in all.
    - **names** - the sites of the coordinates, one after the other.
    """

    def __init__(
        self,
        fn: Callable[..., jax.Array],
        args: Any,
        rows: Mapping[str, Any],
        values: Mapping[str, ArrayLike],
    ):
        self._shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in rows.items()}
        self.num_rows = next(iter(self._shapes.values())).shape[0]
        self.names = [name for name in rows if name in values]
        self._others = [name for name in rows if name not in values]
        self.values, self.is_state = value_table(rows, {name: values[name] for name in self.names})
        self.is_binary = self.values.shape[1] == 2 and bool(np.all(self.is_state))
        self._shape = self.values.shape[:1] if self.is_binary else self.values.shape
        self._args, self._fn = jax.tree.map(jnp.asarray, args), fn
        names = list(rows)
        self._closed = jax.make_jaxpr(lambda a, *xs: fn(a, dict(zip(names, xs, strict=True))))(
            self._args, *self._shapes.values()
        )
        self.degree, self.why_not_affine = 0, "that is not tried"

    def __call__(self, args: Any, indicators: jax.Array, others: Any = None) -> jax.Array:
        """The function at relaxed indicators.

        :param args: its arguments.
        :param indicators: of shape (rows, coordinates, states), or (rows, coordinates) where all
            coordinates have two states; the rows of the program any number of times over.
        :param dict others: values of the other sites, (rows, ...).
        :return: array of shape (rows,).
        """
        consts, others = self._closed.consts, {name: others[name] for name in self._others}

        def grouped(x):
            return jnp.reshape(x, (-1, self.num_rows, *x.shape[1:]))

        if len(indicators) == self.num_rows > 1:
            return self._walk(args, consts, indicators, others)
        walk = jax.vmap(lambda x, others: self._walk(args, consts, x, others))
        return jnp.ravel(walk(grouped(indicators), jax.tree.map(grouped, others)))

    @property
    def is_affine(self) -> bool:
        """Whether it is affine in every coordinate."""
        return not self.why_not_affine

    @property
    def is_known(self) -> bool:
        """Whether all its constants have values: what it closes over is not traced."""
        return not any(isinstance(x, Tracer) for x in self._closed.consts)

    def interactions(self) -> Any:
        """The graph of the coordinates that interact (:mod:`numpyro_ebm.program.interactions`)."""
        graph = interactions(lambda x: self._fn(self._args, x), self._shapes)
        sizes = {name: math.prod(x.shape[1:]) for name, x in self._shapes.items()}
        own = np.concatenate([np.full(n, name in self.names) for name, n in sizes.items()])
        return graph if graph is None or np.all(own) else graph[own][:, own]

    def name_of(self, coordinate: int) -> str:
        """The name of a coordinate, its site and its index in a row."""
        for name in self.names:
            own = self.coordinates([name])
            if own[0] <= coordinate <= own[-1]:
                index = np.unravel_index(coordinate - own[0], self._shapes[name].shape[1:])
                return f"'{name}'" + (str(list(map(int, index))) if index else "")
        raise IndexError(coordinate)

    def coordinates(self, names: Iterable[str]) -> np.ndarray:
        """The numbers of the coordinates of some sites, one after the other."""
        sizes = {name: math.prod(self._shapes[name].shape[1:]) for name in self.names}
        starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
        return np.concatenate([starts[name] + np.arange(sizes[name]) for name in names])

    def indicators(self, flat: jax.Array) -> jax.Array:
        """The indicators of states.

        :param flat: values of the coordinates, site after site, of shape (rows, coordinates).
        """
        values = jnp.asarray(self.values, flat.dtype)
        if self.is_binary:
            return jnp.asarray(flat == values[:, 1], float)
        return jnp.asarray((flat[..., None] == values) & self.is_state, float)

    def secants(self, args: Any, indicators: jax.Array, others: Any = None) -> jax.Array | None:
        """What a change of state adds to the function, for every coordinate at once.

        The difference between two states of a coordinate is that of their secants, exactly: where
        the function is affine they are its gradient, and else its gradient without what a
        coordinate adds to its own.

        :param args: its arguments.
        :param indicators: of states, as :meth:`indicators` returns them.
        :param dict others: values of the other sites, (rows, ...).
        :return: an array of their shape; ``None`` where the function is not affine, and the matrix
            of its second derivatives has no simple form.
        """
        form = self.coefficients(args)
        if form is None and not self.is_affine:
            return None
        if form is None:
            return jax.grad(lambda x: jnp.sum(self(args, x, others)))(indicators)
        b, H = form
        flat = jnp.reshape(indicators, (len(indicators), -1))
        slopes = flat @ H if b is None else b + flat @ H
        return jnp.reshape(slopes, indicators.shape)

    def slopes_one_by_one(self, others: Any = None) -> Callable[[jax.Array, Any], jax.Array]:
        """As :meth:`secants` of one coordinate, a function of indicators and of its number.

        :param dict others: values of the other sites, (rows, ...).
        """
        form = self.coefficients({})
        if form is None:
            return lambda x, i: self.secants({}, x, others)[:, i]  # pyright: ignore
        b, H = form
        H = jnp.reshape(H, (len(H), *self._shape))
        b = jnp.zeros(self._shape) if b is None else jnp.reshape(b, self._shape)
        return lambda x, i: b[i] + jnp.reshape(x, (len(x), -1)) @ H[:, i]

    def coefficients(self, args: Any) -> tuple[jax.Array | None, jax.Array] | None:
        """b, which may be ``None`` for zeros, and H, of secants that are ``b + X H``.

        ``None`` where the degree is higher, or H has no simple form
        (:func:`~numpyro_ebm.program.quadratic.quadratic_form`).
        """
        size = math.prod(self._shape)
        if self.degree > 2 or self.num_rows > 1 or self._others or size > MOST_INDICATORS:
            return None

        def log_density(flat):
            return jnp.sum(self(args, jnp.reshape(flat, (-1, *self._shape))))

        form = quadratic_form(jax.grad(log_density), np.zeros(size, jnp.result_type(float)))
        if form is None or self.is_affine:
            return form
        b, H = form
        own = np.kron(np.eye(len(self.values)), np.ones((size // len(self.values),) * 2))
        half = 0.5 * jnp.diagonal(H)
        return half if b is None else b + half, H * (1.0 - own).astype(H.dtype)

    def monomials(self) -> Monomials | None:
        """The function as a sum of products of indicators, in the order of a flat array of them.

        ``None`` where it is not written out: rows that differ, or read other sites, too many
        products, and degrees up to two, which :meth:`coefficients` are made for.
        """
        if self.num_rows > 1 or self._others or self.degree < 3 or not self.is_affine:
            return None
        consts, shape = self._closed.consts, (1, *self._shape)

        def log_density(flat):
            return jnp.sum(self._walk({}, consts, jnp.reshape(flat, shape), {}))

        width = 1 if self.is_binary else self.values.shape[1]
        return monomials(log_density, math.prod(shape), width)

    def logits(self, slopes: jax.Array) -> jax.Array:
        """The function at all states of each coordinate, up to a constant: (..., states).

        :param slopes: its gradient in the indicators. States that a site does not have have -inf.
        """
        if self.is_binary:
            return jnp.stack([jnp.zeros_like(slopes), slopes], -1)
        return jnp.where(self.is_state, slopes, -jnp.inf)

    def prove(self) -> None:
        """Find the degree, and whether the function is affine in every coordinate.

        :raises NotMultiAffine: if its operations do not tell, with the reason.
        """
        if self.num_rows * self.values.size > MOST_OF_ALL_ROWS:
            raise NotMultiAffine("its rows are not of one program, and too many for its tables")
        signature = self.signature
        if signature not in PROVED:
            while len(PROVED) >= MOST_PROVED:
                PROVED.pop(next(iter(PROVED)))
            PROVED[signature] = self._find_degree()
        found = PROVED[signature]
        if isinstance(found, str):
            raise NotMultiAffine(found)
        self.degree, self.why_not_affine = found

    @property
    def program(self) -> str:
        """Its operations, without the values of constants."""
        return str(self._closed.jaxpr)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What the proof depends on: the program, the states, and the constants that are known."""
        consts = [
            (x.shape, x.dtype, None if isinstance(x, Tracer) else np.asarray(x).tobytes())
            for x in self._closed.consts
        ]
        program = self.program, tuple(self._others), str(jnp.result_type(float))
        return *program, self.values.tobytes(), self.is_state.tobytes(), tuple(consts)

    def _find_degree(self):
        """The degree and what meets itself, or why that is not shown."""
        own = jax.ShapeDtypeStruct((self.num_rows, *self._shape), jnp.result_type(float))
        try:
            jax.eval_shape(self, self._args, own, self._shapes)
            return self.degree, self._meets_itself()
        except NotMultiAffine as error:
            return str(error)

    def _walk(self, args, consts, indicators, others, draw=None):
        size, width = self.values.shape
        indicators = jnp.reshape(indicators, (-1, *self._shape[1:]))
        walker = StateWalker(Relaxation(indicators, width), draw)
        inputs, start = [], 0
        for name, like in self._shapes.items():
            if name in self._others:
                inputs.append(constant(others[name]))
                continue
            number = math.prod(like.shape[1:])
            labels = np.arange(self.num_rows)[:, None] * size + start + np.arange(number)
            labels = np.asarray(labels.reshape(1, *like.shape), np.int32)
            table = self.values[start : start + number].T.astype(like.dtype)
            table = table.reshape(width, 1, *like.shape[1:])
            table = np.broadcast_to(table, (width, *like.shape))
            inputs.append(walker.of_table(labels, partial(np.asarray, table)))
            start += number
        closed = self._closed.replace(consts=list(consts))
        (result,) = walker.walk(closed, [*map(constant, jax.tree.leaves(args)), *inputs])
        self.degree = result.degree
        return result.relaxed()

    def _meets_itself(self):
        """A coordinate along which its own slope changes, at random points and parameters."""
        found = []
        own, structure = jax.tree.flatten((self._args, {k: self._shapes[k] for k in self._others}))
        both = [*own, *self._closed.consts]
        is_free = [i < len(own) or isinstance(x, Tracer) for i, x in enumerate(both)]
        is_random = [f and _is_real(x) for f, x in zip(is_free, both, strict=True)]
        known = [
            Unknown(x.shape) if f and not r else x
            for f, r, x in zip(is_free, is_random, both, strict=True)
        ]

        def slopes(drawn, sign, point, direction, step):
            drawn = iter(drawn)
            values = [next(drawn) if r else x for r, x in zip(is_random, known, strict=True)]
            args, others = jax.tree.unflatten(structure, values[: len(own)])

            def fn(x):  # the same numbers whenever it is called
                rng = np.random.default_rng(73)
                draw = lambda shape: _signed(sign, rng.normal(size=shape))  # noqa: E731
                return self._walk(args, values[len(own) :], x, others, draw)

            return self._slopes(fn, point, direction, step, colors)

        colors, rng = self._colors(), np.random.default_rng(72)
        point, direction = rng.normal(size=(2, self.num_rows, *self._shape))
        likes = [x for x, r in zip(both, is_random, strict=True) if r]
        program = None
        for sign in SIGNS:
            drawn = [_signed(sign, rng.normal(size=x.shape)).astype(x.dtype) for x in likes]
            arguments = drawn, sign, point, direction, 2.0 + rng.normal()
            if program is None:  # not called, so that what is known is no program of its own
                program = jax.jit(slopes).lower(*arguments).compile()
            before, after = map(np.asarray, program(*arguments))
            if np.all(np.isfinite(before)) and np.all(np.isfinite(after)):
                size = np.sqrt(np.mean(before**2))
                allowed = 1e-4 * (abs(before) + abs(after)) + 1e-5 * size
                found.append(np.all(abs(after - before) <= allowed, 0))
        if not found:
            raise NotMultiAffine("it has infinite values")  # to which no number is added
        is_constant = np.all(found, 0)
        return (
            "" if all(is_constant) else f"{self.name_of(int(np.argmin(is_constant)))} meets itself"
        )

    def _slopes(self, fn, point, direction, step, colors):
        """Slopes along directions of every coordinate, at two of its points each.

        Coordinates of one colour do not interact, and are moved together; where they do, slopes
        change, and nothing is shown.
        """
        gradient = jax.grad(lambda x: jnp.sum(fn(x)))

        def along(x):
            return jnp.sum(jnp.reshape(gradient(x) * direction, (*shape, -1)), -1)

        def of_color(color):
            own = jnp.reshape(colors == color, (-1, *[1] * (len(self._shape) - 1)))
            return along(point + step * own * direction)

        shape, number = (self.num_rows, len(self.values)), int(colors.max(initial=0)) + 1
        batch_size = min(number, max(1, AT_ONCE // max(1, point.size)))
        after = jax.lax.map(of_color, jnp.arange(number), batch_size=batch_size)
        return along(point), after[colors, :, np.arange(len(colors))].T

    def _colors(self):
        """Colours of the coordinates: those of one do not interact."""
        graph = self.interactions()
        return np.arange(len(self.values)) if graph is None else greedy_colors(graph)


def value_table(
    position: Mapping[str, Any], values: Mapping[str, ArrayLike]
) -> tuple[np.ndarray, np.ndarray]:
    """Values of every coordinate of some sites, padded to (coordinates, K), and their mask."""
    num_values = max(np.size(x) for x in values.values())
    table, is_value = [], []
    for name, x in values.items():
        x, size = np.asarray(x), np.prod(position[name].shape[1:], dtype=int)
        padded = np.concatenate([x, np.repeat(x[-1:], num_values - len(x))])
        table.append(np.tile(padded, (size, 1)))
        is_value.append(np.tile(np.arange(num_values) < len(x), (size, 1)))
    return np.concatenate(table), np.concatenate(is_value)


def _is_real(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def _signed(sign, x):
    return sign[0] * x + sign[1] * abs(x)
