# SPDX-License-Identifier: Apache-2.0
"""Data sets drawn from a fitted model, and the model at them in the place of its own data."""

from typing import Any

import jax
import jax.numpy as jnp
from numpyro.handlers import substitute

from numpyro_ebm.language.fixed import fixed
from numpyro_ebm.language.handlers import uncondition
from numpyro_ebm.mcmc.sampling import sample
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.types import Model, Params, SiteValues

__all__ = ["AtValues", "simulate_rows"]


def simulate_rows(
    rng_key: jax.Array,
    model: Model,
    params: Params,
    num: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> SiteValues:
    """Data sets of the shape of the model's own, by :func:`~numpyro_ebm.sample`.

    :param rng_key: random key.
    :param model: a model with energy statements.
    :param dict params: values of its parameters.
    :param int num: how many data sets.
    :param tuple args: its arguments, with its data.
    :param dict kwargs: its keyword arguments.
    :return: values of the visible sites by name, data sets leading.
    """
    row_model = read_model(model, args, kwargs, params, may_observe_outside=True)
    free = fixed(uncondition(model, row_model.visible), params)
    draws = sample(rng_key, free, num, *args, **kwargs)
    return {
        name: draws[name].astype(jnp.result_type(site.value))
        for name, site in row_model.visible.items()
    }


class AtValues:
    """A model, or its guide, with the values of visible sites as its first argument.

    :param fn: the model or the guide.
    :param bool observes: whether it has the visible sites themselves, as a model does.
    """

    def __init__(self, fn: Model, observes: bool = True):
        self.fn, self.observes = fn, observes

    def __call__(self, values: SiteValues, *args: Any, **kwargs: Any) -> Any:
        fn = substitute(self.fn, data=values) if self.observes else self.fn
        return fn(*args, **kwargs)
