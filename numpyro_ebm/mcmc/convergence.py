# SPDX-License-Identifier: Apache-2.0
r"""Whether the chains of a run did their work: rows that did not move, drift, or left the support.

.. math:: \hat R^2 = \frac{W (n - 1) / n + B / n}{W}

over the halves of all chains of a row, of its energy and its coordinates: the larger one of the
values, which sees modes that are apart, and of their ranks (Vehtari, Gelman, Simpson, Carpenter,
Bürkner, *Rank-normalization, folding, and localization*, 2021), which sees chains that run away
where exp(-E) has no integral. It is infinite for a row that did not move. The bound is far above
what is asked of a careful run: it says that the draws of a chain know where they came from, not
that there are few of them.
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._compat import find_stack_level
from numpyro_ebm.errors import ConvergenceWarning
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import SiteValues

__all__ = ["Convergence", "assess_draws", "warn_of_convergence"]

R_HAT_BOUND = 2.0
"""Chains that forget nothing in half a run reach it; after three autocorrelation times none do.

``benchmarks/supports.py``, 100 chains of ten draws: 143 runs with defaults, all with means within
3.2 standard errors, have a largest R-hat of 0.99 to 1.58, and none warns. Of 45 runs with
``--starved --rows 50`` 25 have means 4 or more errors off; their R-hat is 2.02 or more, and all
warn. Of the 20 others 18 have at most 1.76, and the two that warn (8.2, 7.3) are right by chance.
"""

LEAST_DRAWS = 100
"""Draws of a row, over all its chains, from which R-hat and acceptance are judged."""

LEAST_ACCEPTANCE_OF_ROW = 0.02
"""For what R-hat is too few draws to see. In the same runs with defaults the least is 0.69; of the
25 wrong ones 9 are below, and the others have up to 1, where steps are too small."""

MANY_FROZEN = 0.05
"""Share of the chains of a row that may stay where they are, as a row of a tail does at times. In
the same runs it is at most 0.01 with defaults, and 0.15 to 1 in 17 of the 25 wrong ones."""

LARGEST_ERROR = 100.0
"""Nats of rounding of an energy, 1e9 in float32: chains that run away come there first."""

BATCH_OF_DRAWS = 100

MAX_COORDINATES = 16
"""Coordinates of a row, evenly spaced, whose R-hat is taken."""


class Convergence(NamedTuple):
    """What a run says of its rows.

    - **num_chains, num_draws** - chains, and the draws of each.
    - **not_finite** - draws of a row that are not finite, or whose energy is not, (rows,).
    - **unresolved** - draws of a row whose energy is so large that a float knows it to
      ``LARGEST_ERROR`` nats or worse: no ratio of two of them means anything, (rows,).
    - **frozen** - chains of a row whose draws are all the same, (rows,).
    - **acceptance** - mean acceptance probability, (rows,); ``None`` for a kernel without.
    - **diverging** - share of the draws whose proposal diverged; ``None`` for a kernel without.
    - **r_hat** - the largest split R-hat, (rows,); ``None`` for too few draws.
    - **largest** - the largest absolute value of the draws.
    """

    num_chains: int
    num_draws: int
    not_finite: np.ndarray
    unresolved: np.ndarray
    frozen: np.ndarray
    acceptance: np.ndarray | None
    diverging: float | None
    r_hat: np.ndarray | None
    largest: float


def assess_draws(
    row_model: RowModel,
    draws: SiteValues,
    fields: dict[str, Any],
    adjusted: bool = True,
    num_laws: int = 1,
) -> Convergence:
    """What the draws of all chains, and what the kernel collected beside them, say of the rows.

    :param dict draws: values of the sites, (chains, draws, ...).
    :param dict fields: ``accept_prob``, ``diverging`` and ``potential_energy``, (chains, draws,
        rows), as far as there are.
    :param bool adjusted: whether the kernel ever rejects.
    :param int num_laws: how many laws the chains have, those of one law side by side and as many of
        each: R-hat is then that of the mean variances over laws, between chains and within them.
    """
    rows = row_model.num_rows
    draws = {k: x for k, x in draws.items() if not _is_partly_unread(row_model, k)}
    real = [_by_row(row_model, k, x) for k, x in draws.items() if k in row_model.visible]
    other = [_by_row(row_model, k, x) for k, x in draws.items() if k in row_model.latent]
    num_chains, num_draws = np.shape(jax.tree.leaves((draws, fields))[0])[:2]
    fields = {k: np.asarray(x) for k, x in fields.items() if np.shape(x)[2:] == (rows,)}
    energy = _energy(row_model, draws, fields)
    large = [np.abs(x[..., 0]) * np.finfo(x.dtype).eps > LARGEST_ERROR for x in energy]
    bad = [~np.isfinite(x).all(-1) for x in real + energy]
    frozen = np.zeros(rows, int)
    if real and num_draws >= 5:
        same = np.all([np.all(x == x[:, :1], (1, 3)) for x in real], 0)
        frozen = same.sum(0)
    accept = fields.get("accept_prob") if adjusted else None
    enough = num_chains * num_draws >= LEAST_DRAWS
    diverging = fields.get("diverging")
    return Convergence(
        num_chains=num_chains,
        num_draws=num_draws,
        not_finite=np.sum(bad, (0, 1, 2)) if bad else np.zeros(rows, int),
        unresolved=np.sum(large, (0, 1, 2)) if large else np.zeros(rows, int),
        frozen=frozen,
        acceptance=accept.mean((0, 1)) if accept is not None and enough else None,
        diverging=None if diverging is None else float(diverging.mean()),
        r_hat=_r_hat(real + other + energy, frozen == num_chains, num_laws)
        if enough and num_draws >= 4
        else None,
        largest=float(max([np.abs(x).max() for x in real], default=0.0)),
    )


def warn_of_convergence(owner: str, found: Convergence) -> None:
    """Warn :class:`~numpyro_ebm.ConvergenceWarning`, with numbers, if rows did not do their work.

    :param str owner: what drew.
    """
    rows, chains = len(found.frozen), found.num_chains
    said = []
    if found.not_finite.any():
        said.append(
            f"{int(found.not_finite.sum())} draws, of {_count(found.not_finite > 0, rows)}, are "
            "not finite, or lie where the energy is not"
        )
    if found.unresolved.any():
        said.append(
            f"{int(found.unresolved.sum())} draws, of {_count(found.unresolved > 0, rows)}, have "
            f"energies that floats know to {LARGEST_ERROR:g} nats or worse (the largest value is "
            f"{found.largest:.3g})"
        )
    if np.any(found.frozen > MANY_FROZEN * chains):
        of = "" if chains == 1 else f" in {int(found.frozen.max())} of {chains} chains"
        said.append(f"{_count(found.frozen > MANY_FROZEN * chains, rows)} did not move{of}")
    if found.acceptance is not None:
        low = found.acceptance < LEAST_ACCEPTANCE_OF_ROW
        if low.any():
            said.append(
                f"{_count(low, rows)} accept less than {LEAST_ACCEPTANCE_OF_ROW:.0%} of their "
                f"proposals (the median row {np.median(found.acceptance):.2f})"
            )
    if found.r_hat is not None:
        high = found.r_hat > R_HAT_BOUND
        # Two halves of one chain say little of one row, and enough of a share of them.
        if high.mean() > (0.05 if chains < 4 else 0.0):
            said.append(
                f"R-hat is above {R_HAT_BOUND:g} in {_count(high, rows)} (largest "
                f"{found.r_hat.max():.1f}): chains drift, stay in modes of their own, or run away "
                f"(the largest value is {found.largest:.3g})"
            )
    if not said:
        return
    if found.diverging:
        said.append(f"{found.diverging:.1%} of the proposals diverged")
    warnings.warn(
        ConvergenceWarning(
            f"{owner}: {'; '.join(said)}. These draws have not the law of the model. Take more "
            "warm-up steps, start elsewhere (`init_params`), use `numpyro_ebm.ReplicaExchange` "
            "where modes are apart, or smaller steps without a Metropolis test; if values grow "
            "without end, exp(-E) has no integral."
        ),
        stacklevel=find_stack_level(),
    )


def _count(which, rows):
    return f"{int(which.sum())} of {rows} rows"


def _is_partly_unread(row_model, name):
    """Whether a site of ``obs_mask`` has values that data replace, which may go anywhere."""
    observed = name.removesuffix("unobserved") + "observed"
    return name.endswith("_unobserved") and observed in row_model.observed


def _energy(row_model, draws, fields):
    """A list of the energies of the draws, (chains, draws, rows, 1), or of nothing.

    A kernel made of blocks collects none, and they are evaluated.
    """
    if "potential_energy" in fields:
        return [fields["potential_energy"][..., None]]
    if set(draws) != set(row_model.sites):
        return []
    shape = np.shape(jax.tree.leaves(draws)[0])[:2]
    flat = {k: jnp.reshape(x, (-1, *np.shape(x)[2:])) for k, x in draws.items()}
    log_density = jax.lax.map(
        lambda values: row_model.log_density({}, values), flat, batch_size=BATCH_OF_DRAWS
    )
    return [-np.asarray(log_density).reshape(*shape, -1, 1)]


def _by_row(row_model, name, x):
    """Values of a site as (chains, draws, rows, coordinates)."""
    site = row_model.sites[name]
    x = np.asarray(x)
    x = np.moveaxis(x, x.ndim + row_model.dim - site.event_dim, 2)
    return x.reshape(*x.shape[:3], -1)


def _r_hat(arrays, frozen, num_laws=1):
    """The largest split R-hat of every row; infinite where no chain moves."""
    found = []
    for x in arrays:
        picked = np.unique(np.linspace(0, x.shape[-1] - 1, MAX_COORDINATES).astype(int))
        found.append(_split_r_hat(x[..., picked], num_laws).max(-1))
    return np.where(frozen, np.inf, np.max(found, 0))


def _split_r_hat(x, num_laws=1):
    from scipy.special import ndtri
    from scipy.stats import rankdata

    x = np.reshape(x, (num_laws, -1, *np.shape(x)[1:])).astype(float)  # (laws, chains, draws, ...)
    num = len(x[0]) * len(x[0, 0])
    constant = np.all(x == x[:, :1, :1], (0, 1, 2))
    ranks = rankdata(x.reshape(num_laws, num, -1), axis=1).reshape(x.shape)
    normal = ndtri((ranks - 0.375) / (num + 0.25))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        r_hat = np.fmax(_pooled_r_hat(normal), _pooled_r_hat(x))
    return np.where(constant, 1.0, np.where(np.isnan(r_hat), np.inf, r_hat))


def _pooled_r_hat(x):
    """R-hat of the halves of all chains, variances averaged over laws."""
    half = x.shape[2] // 2
    halves = np.concatenate([x[:, :, :half], x[:, :, -half:]], 1)
    within = np.mean(np.var(halves, 2, ddof=1), (0, 1))
    between = np.mean(np.var(np.mean(halves, 2), 1, ddof=1), 0)
    return np.sqrt((half - 1) / half + between / within)
