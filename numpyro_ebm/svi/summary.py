# SPDX-License-Identifier: Apache-2.0
r"""What a fit says of itself when it is printed: objective, steps, loss, gradient, verdict.

The verdict compares the two halves of the last half of the losses. With their means over ten
batches each, :math:`\bar a` and :math:`\bar b`, and the standard error s of
:math:`\bar b - \bar a` that their spread gives, the loss is level unless
:math:`|\bar b - \bar a| > 4 s`.
"""

import html
from typing import Any

import jax
import numpy as np

from numpyro_ebm._compat import not_jax_tracer

__all__ = ["as_html", "as_text", "lines_of", "verdict"]

FEWEST = 80
"""Losses that a verdict needs: two halves of ten batches, of two losses at the least."""

BATCHES = 10
SIGNIFICANT = 4.0


def lines_of(result: Any) -> list[tuple[str, str]]:
    """What there is to say of a result, as labels and values.

    :param result: an :class:`~numpyro_ebm.svi.state.EnergySVIRunResult` of concrete arrays.
    """
    losses = np.asarray(result.losses, float)
    lines = [("objective", result.objective or "unknown"), ("steps", f"{len(losses):,}")]
    last = losses[-max(1, len(losses) // 4) :]
    last = last[np.isfinite(last)]
    if len(last):
        lines.append(("loss", f"{last.mean():.5g} (mean of the last {len(last):,})"))
    norm = gradient_norm(result.state)
    if norm is not None:
        lines.append(("gradient", f"{norm:.3g} (norm of the optimiser's running mean)"))
    shapes = [f"{name} {_size_of(x)}" for name, x in result.params.items()]
    if result.ema_params is not None:
        shapes.append("and their averages, `ema_params`")
    return [*lines, ("verdict", verdict(losses)), ("parameters", ", ".join(shapes) or "none")]


def verdict(losses: np.ndarray) -> str:
    """Whether losses have come to an end, in words.

    :param losses: of all rounds, (rounds,).
    """
    if not len(losses) or not np.isfinite(losses[-1]):
        return "stopped: the last loss is not finite"
    finite = losses[np.isfinite(losses)]
    if len(finite) < FEWEST:
        return f"too few steps to tell whether the loss is level ({FEWEST} at the least)"
    half = len(finite) // 4
    means = [
        np.array([x.mean() for x in np.array_split(part, BATCHES)])
        for part in (finite[-2 * half : -half], finite[-half:])
    ]
    change = means[1].mean() - means[0].mean()
    error = np.sqrt(sum(x.var(ddof=1) for x in means) / BATCHES)
    if abs(change) <= SIGNIFICANT * error:
        return "the loss is level"
    word = "still falls" if change < 0 else "rises"
    return f"the loss {word}, by {abs(change):.2g} in the last {half:,} steps"


def gradient_norm(state: Any) -> float | None:
    """Norm of the running mean of the gradients that an Adam keeps; ``None`` where none is kept."""
    parts: Any = _parts(getattr(state, "optim_state", None))
    means = [x.mu for x in parts if hasattr(x, "mu")]
    leaves = [x for x in jax.tree.leaves(means) if hasattr(x, "dtype") and not_jax_tracer(x)]
    if not leaves:
        return None
    return float(np.sqrt(sum(np.sum(np.abs(np.asarray(x, float)) ** 2) for x in leaves)))


def as_text(result: Any) -> str:
    """The lines, one below the other."""
    lines = lines_of(result)
    return "\n".join(["EnergySVI fit", *(f"  {label:<11}{value}" for label, value in lines)])


def as_html(result: Any) -> str:
    """The lines as a table, for notebooks."""
    rows = "".join(
        f"<tr><th style='text-align: left'>{label}</th>"
        f"<td style='text-align: left'>{html.escape(value)}</td></tr>"
        for label, value in lines_of(result)
    )
    return f"<table><caption>EnergySVI fit</caption><tbody>{rows}</tbody></table>"


def _parts(x):
    """An optimiser's state and all states in it."""
    yield x
    if isinstance(x, tuple | list):
        for part in x:
            yield from _parts(part)


def _size_of(x):
    leaves = jax.tree.leaves(x)
    if len(leaves) == 1 and hasattr(leaves[0], "shape"):
        return str(leaves[0].shape)
    return f"({sum(np.size(leaf) for leaf in leaves):,} numbers)"
