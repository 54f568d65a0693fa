# SPDX-License-Identifier: Apache-2.0
r"""Weights of rows in the exchange algorithm: a row of weight w is w rows.

.. math:: \left(\frac{\tilde p(x; θ)}{Z(θ)}\right)^w
    = \prod_{k=1}^w \frac{\tilde p(x; θ)}{Z(θ)}

needs w draws of fictitious data to cancel the w normalizers, so that w is a whole number: a power
of one draw is no estimate of a power of Z.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to
from numpyro.primitives import Messenger

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.sites import is_energy, plates_of, without_masks
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.program.constants import keep_known
from numpyro_ebm.types import Model

__all__ = ["NOT_THE_SAME", "CountedOnce", "check_repeated", "repeat_rows"]

NUM_CHECKS = 2
"""Points at which the repeated rows are held against the rows themselves."""

REMEDY = (
    "Repeat the rows in the data themselves, `jnp.repeat(data, weights, axis=0)`; or take "
    "`normalized`, or `generalized` with `MaximumLikelihood`, which know log Z and take any weight."
)

NOT_THE_SAME = (
    "Exchange: rows of weights above 1 are repeated among the arguments of the model, and the "
    "model is not the same at these: its rows are no arguments, its plate is not as long as its "
    f"data, `len(data)`, or another argument is as long as they are. {REMEDY}"
)


class CountedOnce(Messenger):
    """A model without the scales and masks of its rows.

    :param fn: a model.
    :param str plate: name of its data plate.
    """

    def __init__(self, fn: Model | None = None, plate: str = "data"):
        self.plate = plate
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and self.plate in plates_of(msg):
            msg["scale"] = None
            msg["fn"] = without_masks(msg["fn"], constant=is_energy(msg))


def repeat_rows(
    row_model: RowModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[np.ndarray, tuple[Any, ...], dict[str, Any]] | None:
    """Arguments in which every row stands as often as it counts.

    :param RowModel row_model: the model at its arguments.
    :param tuple args: these.
    :param dict kwargs: keyword arguments.
    :return: indices of the rows, and the arguments; ``None`` if no row counts more than once.
    :raises ModelError: if a weight is no whole number, or not known.
    """
    weights: Any = row_model.row_weights
    if not not_jax_tracer(weights):
        raise ModelError(
            "Exchange: the weights of the rows (`handlers.scale` or `handlers.mask`) have to be "
            f"known, and come from inside a compiled function. {REMEDY}"
        )
    counts = np.asarray(weights)
    if np.any(counts != np.round(counts)):
        raise ModelError(
            "Exchange: the weights of the rows (`handlers.scale`) have to be whole numbers, for a "
            f"power of the density is not simulated by draws of it, and they go from "
            f"{counts.min():.3g} to {counts.max():.3g}. {REMEDY}"
        )
    if counts.max() <= 1:
        return None
    indices = np.repeat(np.arange(len(counts)), counts.astype(int))

    def repeated(x):
        if not hasattr(x, "shape") or x.shape[:1] != counts.shape:
            return x
        with keep_known(x):
            return jnp.asarray(x)[indices]

    return indices, *jax.tree.map(repeated, (args, kwargs))


def check_repeated(row_model: RowModel, repeated: RowModel, indices: np.ndarray) -> None:
    """Raise unless the rows of a model are those of another, repeated.

    An argument may be as long as the plate by chance, and have been repeated with the rows. So
    their log-densities are compared, at the data and at random parameters.

    :param RowModel row_model: the model at its rows.
    :param RowModel repeated: the model at repeated ones.
    :param indices: which rows these should be.
    """
    same = repeated.num_rows == len(indices)
    for seed in range(NUM_CHECKS if same else 0):
        params, other = dict(row_model.parameters), dict(repeated.parameters)
        for i, (name, fn) in enumerate(sorted(row_model.priors.items())):
            with keep_known(fn.support):
                key = jax.random.fold_in(jax.random.key(seed), i)
                transform = biject_to(fn.support)
                z = jax.random.normal(key, transform.inverse_shape(fn.shape()))
                params[name] = other[name] = transform(z)
        values = [{k: x.value for k, x in one.sites.items()} for one in (row_model, repeated)]
        with keep_known(params, other, values):
            rows = row_model.log_density(params, values[0])
            again = repeated.log_density(other, values[1])
        if not_jax_tracer(rows) and not_jax_tracer(again):
            same = same and np.allclose(np.asarray(rows)[indices], again, 1e-4, 1e-4)
    if not same:
        raise ModelError(NOT_THE_SAME)
