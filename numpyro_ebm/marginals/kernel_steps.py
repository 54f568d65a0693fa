# SPDX-License-Identifier: Apache-2.0
"""Steps of a NumPyro kernel on the rows of a batch, at fixed parameters and without a warm-up."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax import lax
from jax.lax import stop_gradient
from numpyro.handlers import block, seed, substitute, trace
from numpyro.infer.mcmc import MCMCKernel

from numpyro_ebm._compat import eval_provenance
from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.fixed import fixed
from numpyro_ebm.language.handlers import uncondition
from numpyro_ebm.language.temper import temper
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import Params, SiteValues

__all__ = [
    "check_kernel_maker",
    "constrain_latents",
    "draw_hidden",
    "hidden_sites",
    "make_kernel",
    "move_latents",
    "take_steps",
]


def check_kernel_maker(who: str, kernel: Any) -> None:
    """Raise unless it is a function from a model to a kernel.

    :param str who: who takes it, for the message.
    :raises ModelError: if it is a kernel itself, or nothing to call.
    """
    if isinstance(kernel, MCMCKernel) or not callable(kernel):
        raise ModelError(
            f"{who}: `kernel` must be a function from a model to a kernel, such as `BlockGibbs` or "
            f"`functools.partial(MALA, step_size=0.01)`, got {kernel!r}."
        )


def make_kernel(
    who: str,
    maker: Callable[..., MCMCKernel],
    row_model: RowModel,
    params: Params,
    free: Iterable[str] = (),
    visible: SiteValues | None = None,
) -> MCMCKernel:
    """A kernel on the latent sites of a batch, and on visible ones that are set free.

    :param str who: who asks, for messages.
    :param maker: a function from a model to a kernel.
    :param RowModel row_model: the model at the batch.
    :param dict params: values of all parameters, by name.
    :param free: names of the visible sites that move as well.
    :param dict visible: values of visible sites, by name; those that were observed if ``None``.
    :raises ModelError: if it is no kernel, or cannot serve such rows.
    """
    own = {name: stop_gradient(params[name]) for name in row_model.parameters}
    data = {**row_model.plates, **({} if visible is None else visible)}
    model = fixed(uncondition(substitute(row_model.model, data=data), free), own)
    kernel = maker(model)
    name = type(kernel).__name__
    if not isinstance(kernel, MCMCKernel):
        raise ModelError(f"{who}: `kernel(model)` returned {kernel!r}, not a NumPyro `MCMCKernel`.")
    _refuse_tempered(who, kernel, model)
    if type(kernel).__module__.split(".")[0] != "numpyro":
        return kernel
    if row_model.num_rows != row_model.total_rows:
        raise ModelError(
            f"{who}: the plate '{row_model.plate}' subsamples itself, and {name} would sample the "
            "density raised to the power of its scale. Drop `subsample_size` and pass `batch_size` "
            "to the run."
        )
    if row_model.row_weights is not None:
        raise ModelError(
            f"{who}: the rows have weights, and {name} of NumPyro would sample the density raised "
            "to their power. Use a kernel of numpyro_ebm, such as `BlockGibbs` or `MALA`."
        )
    return kernel


def _refuse_tempered(who, kernel, model):
    """Raise if the kernel is of the model at another temperature than what is learned has."""
    layer: Any = getattr(kernel, "model", None)
    while layer is not None and layer is not model:
        if isinstance(layer, temper):
            raise ModelError(
                f"{who}: {type(kernel).__name__} is on a tempered model, so that its chains are at "
                "another temperature than what is learned, and nobody is told. Say it, "
                "`ContrastiveDivergence(kernel, temperature=1 / inverse_temperature)`, or temper "
                "the model itself."
            )
        layer = getattr(layer, "fn", None)


def take_steps(
    kernel: MCMCKernel,
    rng_key: jax.Array,
    row_model: RowModel,
    start: SiteValues | None,
    num_steps: int,
) -> SiteValues:
    """Where a kernel takes the sites that it moves in some steps.

    :param kernel: the kernel.
    :param rng_key: random key.
    :param RowModel row_model: the model at the batch.
    :param dict start: unconstrained positions by site; where the kernel puts them, if not given.
    :param int num_steps: how many steps.
    :return: unconstrained positions by site.
    """
    args, kwargs = row_model.args, row_model.kwargs
    state = kernel.init(rng_key, 0, stop_gradient(start), args, kwargs)

    # Without a test a step needs a gradient where it begins, and nobody asks for that where the
    # last one ends: evaluated where it begins it stands in the program once, the others are dead
    # code. A kernel with a memory, such as momenta, has it there already.
    is_refreshed = getattr(type(kernel), "refresh", None) != getattr(MCMCKernel, "refresh", None)
    is_evaluated = (
        is_refreshed
        and not getattr(kernel, "leaves_invariant", True)
        and getattr(state, "memory", None) is None
    )

    def step(_, state):
        if is_evaluated:
            state = kernel.refresh(state, args, kwargs)
        return kernel.sample(state, args, kwargs)

    if num_steps == 1:  # its random numbers are drawn ahead
        state = kernel.sample(state, args, kwargs)
    else:
        state = lax.fori_loop(0, num_steps, step, state)
    return stop_gradient(dict(getattr(state, kernel.sample_field)))


def move_latents(
    who: str,
    maker: Callable[..., MCMCKernel],
    rng_key: jax.Array,
    row_model: RowModel,
    params: Params,
    start: SiteValues | None,
    num_steps: int,
    *,
    visible: SiteValues | None = None,
) -> SiteValues:
    """The latent sites of every row after some steps of a kernel, given the visible ones.

    The arguments are those of :func:`make_kernel` and :func:`take_steps`.

    :return: unconstrained positions by site.
    :raises ModelError: if the kernel sums some of them out.
    """
    kernel = make_kernel(who, maker, row_model, params, visible=visible)
    found = take_steps(kernel, rng_key, row_model, start, num_steps)
    missing = sorted(row_model.latent.keys() - found.keys())
    if missing:
        raise ModelError(
            f"{who}: {type(kernel).__name__} sums the latent site(s) {missing} out, and keeps no "
            "values of them. Draw them in a block of their own, with `numpyro.infer.Gibbs`."
        )
    return {name: found[name] for name in sorted(row_model.latent)}


def constrain_latents(row_model: RowModel, unconstrained: SiteValues) -> SiteValues:
    """Values of latent sites at positions that :func:`move_latents` returns."""
    sites = row_model.latent
    return {
        k: x if sites[k].is_discrete else sites[k].transform(x) for k, x in unconstrained.items()
    }


def hidden_sites(who: str, kernel: MCMCKernel, row_model: RowModel) -> list[str]:
    r"""Visible sites that the kernel's model hides by `numpyro.handlers.block`.

    .. math:: \int \tilde p(x, z; θ)\, dx = \tilde p(z; θ) \quad\text{if}\quad
        \tilde p(x, z; θ) = p(x \mid z; θ)\, \tilde p(z; θ)

    so that a chain on the other sites alone needs to know nothing of them.

    :raises ModelError: if one does not integrate to one given the others.
    """
    layer: Any = getattr(kernel, "model", None)
    blocks = []
    while layer is not None:
        blocks += [layer] if isinstance(layer, block) else []
        layer = getattr(layer, "fn", None)
    names = []
    for name, site in row_model.visible.items():
        message = {**site._asdict(), "type": "sample", "is_observed": False, "infer": {}}
        if any(handler.hide_fn(message) for handler in blocks):
            names.append(name)
    if names:
        readers = row_model.remember(("hidden", names), lambda: _readers(row_model, names))
        for name in names:
            others = sorted(term for term in readers if term != name and name in readers[term])
            if others or row_model.visible[name].is_flat:
                what = f"{others} read it" if others else "its base measure is flat"
                raise ModelError(
                    f"{who}: {type(kernel).__name__} is on a model that hides '{name}', which is "
                    f"right if it integrates to one given the rest, and {what}. Do not hide it; or "
                    f"`numpyro_ebm.integrated(model, ['{name}'])`, where it is Gaussian given "
                    "the rest."
                )
    return names


def _readers(row_model, names):
    """Labels of the hidden sites that every term reads."""
    values = {name: site.value for name, site in row_model.sites.items()}
    data = {**row_model.parameters, **values}
    return eval_provenance(
        lambda **hidden: row_model.terms({**data, **hidden}),
        **{name: values[name] for name in names},
    )


def draw_hidden(
    rng_key: jax.Array,
    row_model: RowModel,
    params: Params,
    position: SiteValues,
    names: Sequence[str],
) -> SiteValues:
    """Draws of :func:`hidden_sites` given the others, unconstrained, by name.

    :param dict position: unconstrained values of the others.
    """
    if not names:
        return {}
    own = {name: params[name] for name in row_model.parameters}
    values, _ = row_model.constrain({k: x for k, x in position.items() if k in row_model.sites})
    model = uncondition(substitute(row_model.model, data=row_model.plates), row_model.visible)
    drawn = substitute(seed(fixed(model, own), rng_key), data=values)
    sites = trace(drawn).get_trace(*row_model.args, **row_model.kwargs)
    return {name: row_model.visible[name].unconstrain_draw(sites[name]["value"]) for name in names}
