# SPDX-License-Identifier: Apache-2.0
"""Why a run of EnergySVI ended, and what it says of an end before its last round."""

import warnings
from enum import Enum

from numpyro.infer.svi import SVIRunResult

from numpyro_ebm._compat import find_stack_level
from numpyro_ebm.errors import InterruptedWarning, NonFiniteLossWarning

__all__ = ["Why", "warn_of_end", "warn_of_undone"]


class Why(Enum):
    """Why a run ended."""

    DONE = "all rounds are taken"
    NOT_FINITE = "the next round is not finite"
    NO_BATCH = "the batches end, or the next one cannot be read"
    NOT_WRITTEN = "a checkpoint cannot be written"
    CALLBACK = "a callback asked for it"
    INTERRUPTED = "the user interrupted it"


def warn_of_end(
    why: Why, result: SVIRunResult, num_steps: int, error: Exception | None = None
) -> None:
    """Warn if a run ended before its last round, and nobody asked for it.

    :param Why why: why it ended.
    :param result: what it has come to.
    :param int num_steps: rounds that it was to take.
    :param error: what was wrong with the next batch, or with a checkpoint, if anything was.
    """
    if why is Why.NOT_FINITE:
        done = len(result.losses) - 1
        warning: Warning = NonFiniteLossWarning(
            f"EnergySVI stopped: step {done + 1} of {num_steps} gave a loss of "
            f"{float(result.losses[-1])} or parameters, or numbers of an optimiser, that are not "
            f"finite. The result holds the last finite state, after {done} steps. Try a smaller "
            "learning rate, gradient clipping (`optax.chain(optax.clip_by_global_norm(1.0), "
            "...)`), or a bounded parameterisation.",
            result,
        )
    elif why in (Why.INTERRUPTED, Why.NO_BATCH, Why.NOT_WRITTEN):
        done = len(result.losses)
        what = "was interrupted"
        if why is Why.NOT_WRITTEN:
            what = f"cannot write a checkpoint ({type(error).__name__}: {error}) and ended"
        elif error is not None:
            what = f"cannot take the next batch ({type(error).__name__}: {error}) and ended"
        elif why is Why.NO_BATCH:
            what = (
                "has read all batches of its iterator (a function that makes iterators, or an "
                "iterable that can begin anew, is read again and again) and ended"
            )
        warning = InterruptedWarning(
            f"EnergySVI {what} after {done} of {num_steps} rounds. The result holds the state "
            "after them; `init_state=fit.state` goes on from there.",
            result,
        )
    else:
        return
    warning.__cause__ = error
    warnings.warn(warning, stacklevel=find_stack_level())


def warn_of_undone(result: SVIRunResult, undone: int, num_steps: int) -> None:
    """Say how many rounds of a run were undone, if any were."""
    if not undone:
        return
    warning = NonFiniteLossWarning(
        f"EnergySVI: {undone} of {num_steps} rounds were undone (`stable_update`), since a loss, a "
        "parameter or a number of an optimiser was not finite after them; their losses are NaN. "
        "Try a smaller learning rate or gradient clipping.",
        result,
    )
    warnings.warn(warning, stacklevel=find_stack_level())
