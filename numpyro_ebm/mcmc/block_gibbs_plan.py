# SPDX-License-Identifier: Apache-2.0
"""The blocks of :class:`~numpyro_ebm.BlockGibbs`: reading its arguments, and checking them.

Every unobserved site is in one block, and the energy's operations say how
:mod:`numpyro_ebm.samplers.block_gibbs` draws it. Declared colours say more than they do, and are
tried before they are believed.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from numpyro_ebm.errors import ModelError
from numpyro_ebm.mcmc.discrete_form import discrete_form
from numpyro_ebm.model.finite_supports import support_values
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.samplers.chromatic_gibbs import find_interaction
from numpyro_ebm.samplers.gibbs_blocks import Block, plan_block
from numpyro_ebm.types import LogDensity, SiteValues

__all__ = ["check_colors", "check_order", "plan_blocks", "parse_blocks", "parse_colors"]


def parse_blocks(blocks: Sequence[Sequence[str]] | None) -> tuple[tuple[str, ...], ...] | None:
    """The argument ``blocks`` as tuples of names, ``None`` for a block a site.

    :raises ModelError: if it is something else.
    """
    if blocks is None:
        return None
    if any(isinstance(x, str) or not isinstance(x, Iterable) for x in (blocks, *blocks)):
        raise ModelError(
            "BlockGibbs: `blocks` is a sequence of sequences of site names, such as "
            f'[["v"], ["h"]], got {blocks!r}.'
        )
    return tuple(tuple(names) for names in blocks if names)


def parse_colors(colors: dict[str, Any] | None) -> dict[str, np.ndarray]:
    """The argument ``colors`` as arrays by site name.

    :raises ModelError: if it is something else.
    """
    if colors is not None and not isinstance(colors, dict):
        raise ModelError(
            "BlockGibbs: `colors` is a dict of arrays of integers by site name, got "
            f"{type(colors).__name__}."
        )
    colors = {name: np.asarray(x) for name, x in (colors or {}).items()}
    for name, x in colors.items():
        if x.dtype.kind not in "iu":
            raise ModelError(
                f"BlockGibbs: the `colors` of '{name}' must be integers, got {x.dtype}."
            )
    return colors


def plan_blocks(
    row_model: RowModel,
    log_density: LogDensity,
    rows: SiteValues,
    blocks: tuple[tuple[str, ...], ...] | None,
    colors: dict[str, np.ndarray],
) -> list[Block]:
    """How the blocks are drawn, a list of :class:`~numpyro_ebm.samplers.gibbs_blocks.Block`.

    :param row_model: the model.
    :param log_density: of its rows.
    :param dict rows: values of the unobserved sites, rows leading.
    :param blocks: of :func:`parse_blocks`.
    :param dict colors: of :func:`parse_colors`.
    :raises ModelError: if they do not fit the sites.
    """
    # Sites whose observations were removed start at them, and are drawn after the other sites.
    order = sorted(row_model.sites, key=lambda name: name in row_model.unconditioned)
    blocks = blocks or tuple((name,) for name in order)
    named = [name for names in blocks for name in names]
    wrong = sorted(set(named) ^ set(row_model.sites)) or sorted(
        {name for name in named if named.count(name) > 1}
    )
    if wrong:
        raise ModelError(
            f"BlockGibbs: `blocks` must name each unobserved site once: {sorted(row_model.sites)}; "
            f"{wrong} are missing, unknown or named twice."
        )
    values = {name: support_values(site, "BlockGibbs") for name, site in row_model.latent.items()}
    for name, x in colors.items():
        if name not in row_model.latent:
            raise ModelError(
                f"BlockGibbs: `colors` names '{name}', and the unobserved discrete sites are "
                f"{sorted(row_model.latent)}."
            )
        if x.shape != (expected := rows[name].shape[1:]):
            raise ModelError(
                f"BlockGibbs: the `colors` of '{name}' have shape {x.shape}, and a row of the "
                f"site has shape {expected}."
            )
    plan = []
    for names in blocks:
        apart = colors and set(names) & set(colors)
        for part in [(name,) for name in names] if apart else [names]:
            plan.append(plan_block(log_density, rows, part, values, colors))
    if any(block.kind in ("coloured", "sequential") for block in plan):
        form = discrete_form(row_model, values)
        plan = [block if block.kind == "gaussian" else block._replace(form=form) for block in plan]
    return plan


def check_order(
    row_model: RowModel, blocks: tuple[tuple[str, ...], ...] | None, init_params: Any
) -> None:
    """Check that values which a chain starts from are not redrawn before the other sites.

    :raises ModelError: if they are.
    """
    later = [name for names in blocks or () for name in names]
    while later and row_model.unconditioned:
        name, *later = later
        lost = [
            x for x in later if x not in row_model.unconditioned and x not in (init_params or {})
        ]
        if name in row_model.unconditioned and lost:
            raise ModelError(
                f"BlockGibbs: the chain starts at the data of '{name}', and the block order "
                f"{blocks} draws '{name}' anew before {lost}, which have no start of their own. "
                "Put the latent sites first."
            )


def check_colors(
    rng_key: jax.Array,
    log_density: LogDensity,
    rows: SiteValues,
    plan: list[Block],
    colors: dict[str, np.ndarray],
) -> None:
    """Look for a pair of units of one declared colour that interacts.

    :raises ModelError: if there is one.
    """
    for block in plan:
        if block.kind != "coloured" or block.names[0] not in colors:
            continue
        pair = find_interaction(rng_key, log_density, rows, block)
        if pair is not None:
            (name,) = block.names
            shape = rows[name].shape[1:]
            first, second = (tuple(map(int, np.unravel_index(i, shape))) for i in pair)
            raise ModelError(
                f"BlockGibbs: the units {first} and {second} of '{name}' have the same colour "
                f"in `colors` ({colors[name][first]}), and they interact in the energy, so that "
                "they may not be drawn at once. Give them different colours, or leave "
                f"'{name}' out of `colors`."
            )
