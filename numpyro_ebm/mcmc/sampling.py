# SPDX-License-Identifier: Apache-2.0
"""Draw the visible and latent sites of a fixed model in one call."""

import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from numpyro.infer import MCMC, DiscreteGibbs, Gibbs
from numpyro.infer.mcmc import MCMCKernel

from numpyro_ebm._compat import not_jax_tracer
from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.marginals import exact_marginal
from numpyro_ebm.mcmc.convergence import assess_draws, warn_of_convergence
from numpyro_ebm.mcmc.kernel_choice import kernel_for_rows
from numpyro_ebm.mcmc.row_kernel import RowKernel
from numpyro_ebm.model.reading import read_fixed_model
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.program.compilation import run_compiled
from numpyro_ebm.program.devices import check_divides, everywhere, leading_sharding, placed
from numpyro_ebm.signatures import explaining
from numpyro_ebm.types import Model, Params, SiteValues

__all__ = ["complete_draws", "name_of_kernel", "pick_kernel", "run_chains", "sample"]

logger = logging.getLogger(__name__)


@explaining
def sample(
    rng_key: jax.Array,
    model: Model,
    num_samples: int,
    *args: Any,
    kernel: MCMCKernel | Callable[..., MCMCKernel] | None = None,
    num_chains: int | None = None,
    num_warmup: int | None = None,
    thinning: int | None = None,
    init_params: Params | None = None,
    sharding: Mesh | NamedSharding | None = None,
    progress_bar: bool = False,
    **kwargs: Any,
) -> dict[str, jax.Array]:
    r"""Draw all unobserved sites of a fixed energy-based model.

    .. math:: (v, h) \sim p(v, h) \propto \tilde p(v, h; θ)

    Many short chains run side by side. :func:`~numpyro_ebm.mcmc.choose_kernel` says what moves
    them, and the logger ``numpyro_ebm.mcmc.sampling`` at level INFO. Sites that the model observes
    stay where they are: ``numpyro.handlers.condition(model, {"v": ...})`` draws the others given
    them.

    :param rng_key: random key.
    :param model: a model with fixed parameters, ``fixed(model, params)``.
    :param int num_samples: number of draws.
    :param args: arguments of the model.
    :param kernel: a NumPyro ``MCMCKernel`` on ``model`` to use instead, or what makes one of a
        model, such as the class ``ebm.MALA``.
    :param int num_chains: number of chains; the smaller of ``num_samples`` and 100 if ``None``.
    :param int num_warmup: warm-up steps of each chain; 500 if ``None``, and none of a kernel whose
        steps are independent draws, :class:`~numpyro_ebm.AnnealedLangevin`.
    :param int thinning: steps between two draws of a chain; 10 if ``None``, or 1 of such a kernel.
    :param init_params: initial unconstrained values, chains leading.
    :param sharding: how the chains are spread over devices: a mesh, or a sharding of their axis.
    :param bool progress_bar: show NumPyro's progress bar.
    :param kwargs: keyword arguments of the model.
    :return: dict of sites, of shape (num_samples, rows, ...) each, draws leading, the model's
        ``deterministic`` sites among them.
    :raises ModelError: if the model has free parameters or nothing to sample, a discrete site has
        infinitely many values, ``kernel`` is no kernel, or the numbers are not positive integers.

    .. note:: Draws of one chain are dependent, and separated modes may be out of its reach: for
       diagnostics run ``MCMC`` with several chains and look at R-hat and the effective sample size.
       Warns :class:`~numpyro_ebm.ConvergenceWarning` where rows did not move or left the support,
       and where R-hat over all chains is above 2: modes that are apart, values that run away.

    **Example**

    >>> import jax, jax.numpy as jnp
    >>> import numpyro_ebm as ebm
    >>> params = {"W": jnp.ones((2, 4)), "b": jnp.zeros(2), "c": jnp.zeros(4), "scale": jnp.ones(2)}
    >>> draws = ebm.sample(jax.random.key(0), ebm.fixed(ebm.models.grbm, params), 200)
    >>> draws["v"].shape, draws["h"].shape
    ((200, 1, 2), (200, 1, 4))
    """
    check_integer("sample", num_samples=num_samples, thinning=1 if thinning is None else thinning)
    num_chains = min(num_samples, 100) if num_chains is None else num_chains
    check_integer("sample", num_chains=num_chains)
    check_integer("sample", 0, num_warmup=0 if num_warmup is None else num_warmup)
    key_chains, key_latent = jax.random.split(rng_key)
    row_model = read_fixed_model(model, args, kwargs)
    kernel = pick_kernel("sample", kernel, model, row_model)
    logger.info("sample: %s", name_of_kernel(kernel))
    if kernel is None:
        return complete_draws(key_latent, row_model, {}, num_samples)
    per_chain, independent = math.ceil(num_samples / num_chains), draws_anew(kernel)
    grouped, fields = run_chains(
        key_chains,
        kernel,
        args,
        kwargs,
        num_chains=num_chains,
        num_warmup=(0 if independent else 500) if num_warmup is None else num_warmup,
        num_draws=per_chain,
        every=(1 if independent else 10) if thinning is None else thinning,
        init_params=init_params,
        sharding=sharding,
        progress_bar=progress_bar,
    )
    if not_jax_tracer(rng_key):
        sites = {name: grouped[name] for name in row_model.sites if name in grouped}
        adjusted = getattr(kernel, "leaves_invariant", True)
        warn_of_convergence(
            f"sample ({name_of_kernel(kernel)})", assess_draws(row_model, sites, fields, adjusted)
        )
    draws = {name: jnp.reshape(x, (-1, *x.shape[2:]))[:num_samples] for name, x in grouped.items()}
    return complete_draws(key_latent, row_model, draws, num_samples)


def draws_anew(kernel: MCMCKernel) -> bool:
    """Whether every step of a kernel is a draw of its own, whatever came before."""
    return getattr(kernel, "draws_anew", False)


def pick_kernel(
    who: str,
    kernel: MCMCKernel | Callable[..., MCMCKernel] | None,
    model: Model,
    row_model: RowModel,
) -> MCMCKernel | None:
    """The kernel that the user gave, or made of the model, or that is chosen; `None` for none.

    :raises ModelError: if it is none.
    """
    if kernel is None:
        kernel = kernel_for_rows(model, row_model)
    elif not isinstance(kernel, MCMCKernel):
        kernel = kernel(model) if callable(kernel) else kernel
        if not isinstance(kernel, MCMCKernel):
            raise ModelError(
                f"{who}: `kernel` must be a NumPyro `MCMCKernel` on the model, or a class of one, "
                f"got {kernel!r}."
            )
    return kernel.unwatched() if isinstance(kernel, RowKernel) else kernel


def run_chains(
    rng_key: jax.Array,
    kernel: MCMCKernel,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    num_chains: int,
    num_warmup: int,
    num_draws: int,
    every: int,
    init_params: Params | None = None,
    sharding: Mesh | NamedSharding | None = None,
    progress_bar: bool = False,
) -> tuple[SiteValues, dict[str, jax.Array]]:
    """Draws of a kernel and what it collects beside them, both of shape (chains, draws, ...).

    :param int every: steps between two draws of a chain.
    """
    vectorized = not isinstance(kernel, Gibbs | DiscreteGibbs)
    chain_method: Any = "vectorized" if vectorized else jax.vmap  # which NumPyro takes as well
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_draws * every,
        thinning=every,
        num_chains=num_chains,
        chain_method=chain_method,
        progress_bar=progress_bar and vectorized,
    )
    spread = None if sharding is None else leading_sharding("sample", sharding)
    check_divides("sample", spread, chains=num_chains)
    if spread is not None and not isinstance(kernel, RowKernel):
        raise ModelError(
            f"sample: `sharding` spreads the chains of this library's kernels, got {kernel!r}. For "
            "others there is `MCMC(..., chain_method='parallel')`."
        )
    return _run(mcmc, rng_key, init_params, spread, args, kwargs)


def complete_draws(
    rng_key: jax.Array, row_model: RowModel, draws: SiteValues, num_samples: int
) -> SiteValues:
    """Draws of all sites, those that no chain moved drawn from their exact conditional.

    :param dict draws: values of the sites that chains moved, draws leading, and of deterministic
        sites if these are all.
    """
    missing = [name for name in row_model.sites if name not in draws]
    if not missing:
        return draws
    rest = row_model.with_latent(missing)
    others = {name: draws[name] for name in rest.visible}
    drawn = exact_marginal(rest).draw(rng_key, rest, {}, others, num_samples)
    return _with_deterministic(row_model, {**draws, **drawn})


def _run(mcmc, rng_key, init_params, spread, args, kwargs):
    """Draws and fields of an ``MCMC`` by chain.

    Where nobody watches the progress of one of our kernels, all its steps are one program that is
    kept; NumPyro makes its loop anew, around the arrays that the model closes over.
    """
    kernel, thinning = mcmc.sampler, mcmc.thinning
    if spread is None and (mcmc.progress_bar or not isinstance(kernel, RowKernel)):
        mcmc.run(rng_key, *args, init_params=init_params, **kwargs)
        return (
            mcmc.get_samples(group_by_chain=True),
            mcmc.get_extra_fields(group_by_chain=True),
        )
    keys = rng_key if mcmc.num_chains == 1 else jax.random.split(rng_key, mcmc.num_chains)
    state = kernel.init(keys, mcmc.num_warmup, init_params, args, kwargs)
    if spread is not None:
        by_chain = [jnp.ndim(x) > 0 and len(x) == mcmc.num_chains for x in jax.tree.leaves(state)]
        state = jax.tree.map(
            lambda x, mine: placed(x, spread if mine else everywhere(spread)),
            state,
            jax.tree.unflatten(jax.tree.structure(state), by_chain),
        )
    names = [name for name in kernel.default_fields if name != kernel.sample_field]

    def run(state):
        values_of = kernel.postprocess_fn(args, kwargs)
        if mcmc.num_chains > 1:
            values_of = jax.vmap(values_of)

        def steps(state, num):
            return lax.fori_loop(0, num, lambda _, s: kernel.sample(s, args, kwargs), state)

        def draw(state, _):
            state = steps(state, thinning)
            fields = {name: getattr(state, name) for name in names}
            return state, (values_of(getattr(state, kernel.sample_field)), fields)

        start = steps(state, mcmc.num_warmup)
        return lax.scan(draw, start, None, mcmc.num_samples // thinning)[1]

    drawn = run_compiled(run, state, unless=(args, kwargs))
    if mcmc.num_chains == 1:
        return jax.tree.map(lambda x: x[None], drawn)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), drawn)


def name_of_kernel(kernel: MCMCKernel | None) -> str:
    """What draws, for messages."""
    if kernel is None:
        return "drawn from the probabilities of all joint states"
    if not isinstance(kernel, Gibbs):
        return type(kernel).__name__
    blocks = (f"({type(block).__name__}, {sites})" for block, sites in kernel.blocks)
    return f"Gibbs([{', '.join(blocks)}])"


def _with_deterministic(row_model, draws):
    """The draws with the values of the model's deterministic sites."""
    values = {name: draws[name] for name in row_model.sites}

    def replay(values):
        return row_model.deterministic({}, values)

    if not jax.eval_shape(replay, {name: x[0] for name, x in values.items()}):
        return draws
    return {**draws, **lax.map(replay, values)}
