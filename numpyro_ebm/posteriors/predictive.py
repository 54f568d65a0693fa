# SPDX-License-Identifier: Apache-2.0
r"""Posterior predictive draws of an energy-based model: its law at every draw of the parameters.

.. math:: θ_s \sim π(θ \mid x), \qquad (v_s, h_s) \sim p(v, h; θ_s) \propto \tilde p(v, h; θ_s)

Every draw of the parameters is a law of its own, with chains of its own; all of them are one
compiled program. Where the states of a row can be counted there is no chain, and draws are exact.
"""

import logging
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.mcmc import MCMCKernel

from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.language.fixed import fixed
from numpyro_ebm.language.handlers import uncondition
from numpyro_ebm.marginals import exact_marginal
from numpyro_ebm.marginals.kernel_steps import check_kernel_maker
from numpyro_ebm.mcmc.convergence import Convergence, assess_draws, warn_of_convergence
from numpyro_ebm.mcmc.sampling import complete_draws, name_of_kernel, pick_kernel, run_chains
from numpyro_ebm.model.priors import UnsetParams
from numpyro_ebm.model.reading import read_fixed_model, read_model
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.posteriors.exchange.repeat import CountedOnce
from numpyro_ebm.program.compilation import constants_as_arguments
from numpyro_ebm.signatures import explaining
from numpyro_ebm.types import Model, Params

__all__ = ["predictive"]

logger = logging.getLogger(__name__)

AT_ONCE = 100
"""Draws of the parameters whose chains run side by side."""

MOST_STATES = 2**26
"""States of all rows of all draws that are weighed together."""

KEPT = 10
"""Draws of each chain that are looked at; the last one is handed on."""


@explaining
def predictive(
    rng_key: jax.Array,
    model: Model,
    posterior_samples: Params,
    *args: Any,
    observed: Collection[str] = (),
    kernel: Callable[..., MCMCKernel] | None = None,
    num_chains: int = 2,
    num_warmup: int = 500,
    thinning: int = 10,
    **kwargs: Any,
) -> dict[str, jax.Array]:
    r"""Draw the visible and latent sites of an energy-based model at draws of its parameters.

    .. math:: (v_s, h_s) \sim p(v, h; θ_s), \qquad s = 1, \dots, S

    What NumPyro's ``Predictive`` is to an ordinary model: with draws of a posterior, posterior
    predictive draws; with draws of :func:`~numpyro_ebm.prior`, prior predictive ones. NumPyro's
    would ignore the energy, and is stopped.

    The model is run with its data, which give the number of rows and the shapes: its visible sites
    are drawn anew all the same, at the covariates of the data, each row once whatever its weight.
    Kernels are chosen as by :func:`~numpyro_ebm.sample`, and every draw of the parameters has
    chains of its own.

    :param rng_key: random key.
    :param model: a model with energy statements, not fixed.
    :param dict posterior_samples: draws of its parameters by name, with one leading axis or more:
        ``mcmc.get_samples()``, or those of a guide; other names are ignored. Thin them: each draw
        has a warm-up of its own.
    :param args: arguments of the model.
    :param observed: names of visible sites that stay at their data; the others, and the latent
        sites, are then drawn given these.
    :param kernel: what makes a kernel of a fixed model, such as the class ``ebm.MALA``; chosen if
        ``None``.
    :param int num_chains: chains at each draw of the parameters; two or more tell whether modes are
        apart. The first one is handed on.
    :param int num_warmup: warm-up steps of each chain.
    :param int thinning: steps between the ten states of a chain that are looked at; the last one is
        the draw.
    :param kwargs: keyword arguments of the model.
    :return: dict of sites, with the leading axes of the parameters' draws and then the shape of the
        site, deterministic sites among them.
    :raises ModelError: if parameters are missing or their shapes are not those of the model, a name
        in ``observed`` is no visible site, nothing is left to draw, or a kernel does not serve.

    Warns :class:`~numpyro_ebm.ConvergenceWarning` as :func:`~numpyro_ebm.sample` does; R-hat
    compares the chains at one draw of the parameters, and averages over the draws.

    **Example**

    >>> import jax, jax.numpy as jnp
    >>> import numpyro, numpyro.distributions as dist
    >>> import numpyro_ebm as ebm
    >>> def bits(data):
    ...     logit = numpyro.sample("logit", dist.Normal(0.0, 1.0))
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Counting(event_shape=(3,)), obs=data)
    ...         ebm.energy("E", -logit * jnp.sum(v, -1))
    >>> posterior = {"logit": jnp.array([-9.0, 9.0])}
    >>> draws = ebm.predictive(jax.random.key(0), bits, posterior, jnp.zeros((200, 3), int))
    >>> draws["v"].shape, draws["v"].mean((1, 2)).round()
    ((2, 200, 3), Array([0., 1.], dtype=float32))
    """
    check_integer("predictive", num_chains=num_chains, thinning=thinning)
    if kernel is not None:
        check_kernel_maker("predictive", kernel)
    if isinstance(observed, str):
        raise ModelError(f"predictive: `observed` is a sequence of names, got {observed!r}.")
    unset = UnsetParams(model)
    row_model = read_model(unset, args, kwargs, may_observe_outside=True)
    params, leading = _draws_of(row_model, posterior_samples, unset.names)
    strange = sorted(set(observed) - row_model.visible.keys())
    if strange:
        raise ModelError(
            f"predictive: `observed` names {', '.join(map(repr, strange))}, and the model observes "
            f"{sorted(row_model.visible) or 'nothing'}."
        )
    drawn = [name for name in row_model.visible if name not in observed]
    if row_model.row_weights is not None:  # each row is drawn, and once
        model = CountedOnce(model, row_model.plate)
    free = uncondition(model, drawn, start_there=False)
    first = jax.tree.map(lambda x: x[0], params)
    there = read_fixed_model(fixed(free, first), args, kwargs)
    num = len(jax.tree.leaves(params)[0])
    seen: list[MCMCKernel | None] = []

    def one(rng_key, params):
        key_chains, key_rest = jax.random.split(rng_key)
        here = fixed(free, params)
        rows = read_fixed_model(here, args, kwargs)
        chosen = pick_kernel("predictive", kernel, here, rows)
        seen[:] = [chosen]
        chains, fields = {}, {}
        if chosen is not None:
            lengths: dict[str, Any] = {
                "num_chains": num_chains,
                "num_warmup": num_warmup,
                "num_draws": KEPT,
            }
            chains, fields = run_chains(key_chains, chosen, args, kwargs, **lengths, every=thinning)
        last = {name: x[0, -1:] for name, x in chains.items()}
        found = complete_draws(key_rest, rows, last, 1)
        sites = {name: chains[name] for name in rows.sites if name in chains}
        return jax.tree.map(lambda x: x[0], found), sites, fields

    draws, looks = [], []
    keys = jax.random.split(rng_key, num)
    for found, sites, fields in side_by_side(one, (keys, params), _at_once(there, num)):
        draws.append(jax.tree.map(np.asarray, found))
        if seen[0] is not None:
            looks.append(_assess(there, sites, fields, getattr(seen[0], "leaves_invariant", True)))
    name = name_of_kernel(seen[0])
    logger.info("predictive: %s", name)
    if looks:
        warn_of_convergence(f"predictive ({name})", _of_all(looks))
    every = jax.tree.map(lambda *xs: jnp.concatenate(xs)[:num], *draws)
    return {
        name: jnp.reshape(_in_type_of_data(row_model, name, x), (*leading, *x.shape[1:]))
        for name, x in every.items()
    }


def side_by_side(fn: Callable[..., Any], trees: tuple[Any, ...], size: int) -> Any:
    """A function of every element of the leading axis, so many side by side, compiled once.

    :param fn: a function of the elements.
    :param trees: its arguments, elements leading.
    :param size: how many at once.
    :return: what it returned, group by group; the last group is filled up with its last element.
    """
    num = len(jax.tree.leaves(trees)[0])
    groups = [np.minimum(np.arange(i, i + size), num - 1) for i in range(0, num, size)]
    parts = [jax.tree.map(lambda x, group=group: x[group], trees) for group in groups]
    program, constants = constants_as_arguments(lambda *xs: jax.vmap(fn)(*xs), *parts[0])
    compiled = jax.jit(program)
    return (compiled(constants, *part) for part in parts)


def _draws_of(row_model: RowModel, samples, unset):
    """Draws of all parameters with one leading axis, and the leading axes that they had."""
    if not isinstance(samples, dict):
        raise ModelError(
            "predictive: `posterior_samples` must be a dict of draws by site name, such as "
            f"`mcmc.get_samples()`, got {type(samples).__name__}."
        )
    own = row_model.parameters
    missing = sorted({k for k in own if k in row_model.priors or k in unset} - samples.keys())
    if missing:
        raise ModelError(
            f"predictive: `posterior_samples` lacks {', '.join(map(repr, missing))} (it has "
            f"{sorted(samples) or 'nothing'}). One value of a `numpyro.param` for all draws is "
            "given by `numpyro.handlers.substitute(model, data=...)`."
        )
    axes = {name: _leading(name, samples[name], own[name]) for name in own if name in samples}
    if len(set(axes.values())) != 1 or 0 in next(iter(axes.values())):
        raise ModelError(
            f"predictive: the parameters have draws of the leading axes {axes or 'of none'}; they "
            "should be the same for all, and not empty. For a model without parameters: "
            "`numpyro_ebm.sample(rng_key, fixed(model, {}), num_samples)`."
        )
    (leading,) = set(axes.values())

    params = {
        name: jax.tree.map(
            lambda x: jnp.reshape(jnp.asarray(x), (-1, *np.shape(x)[len(leading) :])), x
        )
        for name, x in ((name, samples[name]) for name in axes)
    }
    num = math.prod(leading)
    params |= {
        name: jax.tree.map(lambda x: jnp.broadcast_to(x, (num, *jnp.shape(x))), x)
        for name, x in own.items()
        if name not in axes  # the model itself has its value
    }
    return params, leading


def _leading(name, draws, like):
    """The leading axes of draws of one parameter, an array or the arrays of a network."""
    leaves, likes = jax.tree.leaves(draws), jax.tree.leaves(like)
    fits = [
        np.ndim(x) > np.ndim(y) and np.shape(x)[np.ndim(x) - np.ndim(y) :] == np.shape(y)
        for x, y in zip(leaves, likes, strict=False)
    ]
    found = {np.shape(x)[: np.ndim(x) - np.ndim(y)] for x, y in zip(leaves, likes, strict=False)}
    if len(leaves) != len(likes) or not all(fits) or len(found) != 1:
        shapes = [np.shape(x) for x in leaves]
        raise ModelError(
            f"predictive: the draws of '{name}' have the shapes {shapes}; they should be (draws, "
            f"...) with that of the parameter at the end, {[np.shape(x) for x in likes]}."
        )
    return next(iter(found))


def _at_once(rows: RowModel, num: int) -> int:
    """How many draws of the parameters are taken together."""
    states = 1.0
    if not rows.visible:
        try:
            states = exact_marginal(rows).num_states(rows)
        except ModelError:
            pass
    return int(np.clip(MOST_STATES // (states * rows.num_rows), 1, min(num, AT_ONCE)))


def _assess(rows, sites, fields, adjusted):
    """What the chains of one group say; chains and draws of the parameters in one axis."""
    laws = len(jax.tree.leaves((sites, fields))[0])
    sites, fields = jax.tree.map(lambda x: np.reshape(x, (-1, *x.shape[2:])), (sites, fields))
    return assess_draws(rows, sites, fields, adjusted, laws)


def _of_all(looks: list[Convergence]) -> Convergence:
    """What all groups say together."""

    def over(name, fn) -> Any:
        found = [getattr(x, name) for x in looks]
        return None if found[0] is None else fn(np.stack(found), 0)

    return Convergence(
        num_chains=sum(x.num_chains for x in looks),
        num_draws=looks[0].num_draws,
        not_finite=over("not_finite", np.sum),
        unresolved=over("unresolved", np.sum),
        frozen=over("frozen", np.sum),
        acceptance=over("acceptance", np.mean),
        diverging=over("diverging", np.mean),
        r_hat=over("r_hat", np.max),
        largest=over("largest", np.max),
    )


def _in_type_of_data(row_model, name, x):
    """Draws of a visible site in the type that its data have in the model."""
    if name not in row_model.visible:
        return x
    return x.astype(jnp.result_type(row_model.visible[name].value))
