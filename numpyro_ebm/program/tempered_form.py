# SPDX-License-Identifier: Apache-2.0
r"""Two functions of the same states at a temperature between them.

.. math:: (1 - β) f(x) + β g(x)

It is affine in the indicators of every coordinate if f and g are, and its slopes are those of the
two. The temperature is that of a row. Sweeps of annealed particles are drawn from it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_ebm.program.monomials import Monomials
from numpyro_ebm.program.multi_affine import MultiAffine

__all__ = ["Tempered"]


class Tempered(NamedTuple):
    """A :class:`~numpyro_ebm.program.multi_affine.MultiAffine` between two others, for sweeps.

    - **cold** - g; states and coordinates are its own.
    - **hot** - f, or ``None`` where it has no slopes.
    - **beta** - β, a scalar or of shape (rows,).
    """

    cold: MultiAffine
    hot: MultiAffine | None
    beta: Any = 1.0

    def __getattr__(self, name):  # names, values, is_state, is_binary, coordinates, indicators, ...
        return getattr(self.cold, name)

    def secants(self, args: Any, indicators: jax.Array, others: Any = None) -> jax.Array | None:
        """As those of :class:`~numpyro_ebm.program.multi_affine.MultiAffine`."""
        return self._between(lambda form: form.secants(args, indicators, others))

    def monomials(self) -> Monomials | None:
        """Those of g, whose slopes β takes; ``None`` where those of f are not constant."""
        return self.cold.monomials() if self.hot is None or self.hot.degree <= 1 else None

    def constant_slopes(self, indicators: jax.Array) -> jax.Array | None:
        """(1 - β) times the slopes of f, where these are constant; ``None`` for zeros."""
        if self.hot is None:
            return None
        slopes = jnp.asarray(self.hot.secants({}, indicators))
        return (1 - self._beside(slopes)) * slopes

    def slopes_one_by_one(self, others: Any = None) -> Callable[[jax.Array, Any], jax.Array]:
        """As those of :class:`~numpyro_ebm.program.multi_affine.MultiAffine`."""
        ends = [form for form in (self.cold, self.hot) if form is not None]
        slopes = {id(form): form.slopes_one_by_one(others) for form in ends}
        return lambda x, i: self._between(lambda form: slopes[id(form)](x, i))

    def _between(self, slopes):
        cold = slopes(self.cold)
        beta = self._beside(cold)
        return beta * cold if self.hot is None else beta * cold + (1 - beta) * slopes(self.hot)

    def _beside(self, slopes):
        """β of the rows of slopes."""
        return jnp.reshape(self.beta, (-1,) + (1,) * (slopes.ndim - 1))
