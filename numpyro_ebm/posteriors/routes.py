# SPDX-License-Identifier: Apache-2.0
"""Routes to a posterior, run on many data sets: a function of the user's, or a kernel."""

import warnings
from collections.abc import Callable

import jax
import numpy as np
from jax import lax
from numpyro.infer.mcmc import MCMCKernel

from numpyro_ebm._compat import find_stack_level
from numpyro_ebm.errors import ConvergenceWarning, ModelError, check_takes
from numpyro_ebm.model.arguments import Arguments
from numpyro_ebm.posteriors.predictive import side_by_side
from numpyro_ebm.program.progress import Progress
from numpyro_ebm.types import Params

__all__ = ["run_route"]

WHO = "simulation_based_calibration"

AT_ONCE = 100
"""Simulations whose chains run side by side."""

MOST_CORRELATION = 0.2
"""Of neighbouring draws of a route, on average; above, ranks are not uniform by that alone."""


def run_route(
    route: Callable[..., Params] | MCMCKernel,
    keys: jax.Array,
    arrays: dict[str, jax.Array],
    arguments: Arguments,
    params: dict[str, np.ndarray],
    *,
    num_draws: int,
    num_warmup: int,
    thinning: int,
    progress_bar: bool = False,
) -> dict[str, np.ndarray]:
    """Draws of the parameters given each data set, of shape (simulations, draws, ...).

    :param route: the function, or the kernel.
    :param keys: a random key for each data set.
    :param dict arrays: the data sets, by label of the argument that they take the place of.
    :param Arguments arguments: the arguments of the model.
    :param dict params: the parameters that made the data, by name, simulations leading.
    :raises ModelError: if the draws are too few, of other parameters or shapes, or not finite.
    """
    if isinstance(route, type) and issubclass(route, MCMCKernel):
        raise ModelError(
            f"{WHO}: `route` is the class `{route.__name__}`, and a kernel on parameters is "
            "needed, such as `Exchange(model, ...)` or `NUTS(normalized(model))`."
        )
    if not isinstance(route, MCMCKernel):
        words = "`route` is called with (rng_key, *args, **kwargs) of the model"
        check_takes(WHO, words, route, (keys, *arguments.args), arguments.kwargs)
    with Progress("data sets", len(keys), shown=progress_bar) as progress:
        if isinstance(route, MCMCKernel):
            lengths = num_draws, num_warmup, thinning
            draws = _by_kernel(route, keys, arrays, arguments, *lengths, progress)
        else:
            draws = _by_function(route, keys, arrays, arguments, num_draws, progress)
    draws = _checked_draws(draws, params, num_draws)
    _warn_of_correlation(draws, num_draws)
    return draws


def _by_function(route, keys, arrays, arguments, num_draws, progress):
    """Draws of a user's route, simulations leading, thinned evenly."""
    found = []
    for i, key in enumerate(keys):
        here = arguments.with_arrays({label: x[i] for label, x in arrays.items()})
        draws = route(key, *here.args, **here.kwargs)
        if not isinstance(draws, dict):
            raise ModelError(
                f"{WHO}: `route` must return draws of the parameters, a dict of arrays by name, "
                f"got {type(draws).__name__}."
            )
        draws = {name: np.asarray(x) for name, x in draws.items()}
        few = [name for name, x in draws.items() if np.ndim(x) < 1 or len(x) < num_draws]
        if few or not draws:
            raise ModelError(
                f"{WHO}: `route` returned {[len(np.atleast_1d(draws[k])) for k in few]} draws of "
                f"{few}, and `num_draws` is {num_draws}. Return more, or lower it."
            )
        found.append(
            {k: x[np.linspace(0, len(x) - 1, num_draws).astype(int)] for k, x in draws.items()}
        )
        progress.step()
    return jax.tree.map(lambda *xs: np.stack(xs), *found)


def _by_kernel(kernel, keys, arrays, arguments, num_draws, num_warmup, thinning, progress):
    """Draws of a kernel's chains, one on every data set."""

    def chain(rng_key, arrays):
        here = arguments.with_arrays(arrays)
        args, kwargs = here.args, here.kwargs
        state = kernel.init(rng_key, num_warmup, None, args, kwargs)

        def steps(state, num):
            return lax.fori_loop(0, num, lambda _, s: kernel.sample(s, args, kwargs), state)

        def draw(state, _):
            state = steps(state, thinning)
            return state, getattr(state, kernel.sample_field)

        state = steps(state, num_warmup)
        _, z = lax.scan(draw, state, None, num_draws)
        return jax.vmap(kernel.postprocess_fn(args, kwargs))(z)

    size = min(len(keys), AT_ONCE)
    groups = []
    for found in side_by_side(chain, (keys, arrays), size):
        groups.append(jax.tree.map(np.asarray, found))
        progress.step(min(size, len(keys) - size * (len(groups) - 1)))
    return jax.tree.map(lambda *xs: np.concatenate(xs)[: len(keys)], *groups)


def _checked_draws(draws, params, num_draws):
    """Draws of the parameters with priors, of the right shapes and finite."""
    found = {name: draws[name] for name in params if name in draws}
    if not found:
        raise ModelError(
            f"{WHO}: the route returned draws of {sorted(draws)}, and the parameters with priors "
            f"are {sorted(params)}."
        )
    for name, x in found.items():
        shape = (len(params[name]), num_draws, *np.shape(params[name])[1:])
        if x.shape != shape:
            raise ModelError(
                f"{WHO}: the route returned draws of '{name}' of shape {x.shape[1:]}; it should be "
                f"{shape[1:]}, draws leading."
            )
        bad = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(1))
        if len(bad):
            raise ModelError(
                f"{WHO}: draws of '{name}' are not finite in {len(bad)} simulations, the first of "
                f"them number {bad[0]}. Did the route's chains diverge?"
            )
    return found


def _warn_of_correlation(draws, num_draws):
    """Warn if neighbouring draws are correlated, on average over simulations."""
    if num_draws < 3:
        return
    worst, where = 0.0, ""
    for name, x in draws.items():
        z = x - np.mean(x, 1, keepdims=True)
        square = np.maximum(np.sum(z**2, 1), np.finfo(float).tiny)
        each = np.sum(z[:, 1:] * z[:, :-1], 1) / square + np.all(z == 0, 1)
        found = np.max(np.mean(each, 0)) + 1.0 / num_draws  # independent draws have -1/L
        if found > worst:
            worst, where = float(found), name
    if worst > MOST_CORRELATION:
        warnings.warn(
            ConvergenceWarning(
                f"{WHO}: neighbouring draws of '{where}' have a correlation of {worst:.2f} on "
                "average. Ranks are uniform for nearly independent draws only: raise `thinning` "
                "(of a kernel), or return more draws, which are thinned."
            ),
            stacklevel=find_stack_level(),
        )
