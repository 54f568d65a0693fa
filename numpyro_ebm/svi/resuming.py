# SPDX-License-Identifier: Apache-2.0
"""Whether a state that a run resumes from is one of this run's model, optimisers and objective."""

from typing import Any

import jax
from numpyro.infer.svi import SVIRunResult

from numpyro_ebm.errors import ModelError
from numpyro_ebm.svi.saved import SavedState
from numpyro_ebm.svi.state import EnergySVIState, shapes_of

__all__ = ["check_is_state", "check_optimizers", "check_part", "restored", "steps_of"]


def check_is_state(state: Any) -> None:
    """That it is a state at all.

    :raises ModelError: if it is not.
    """
    if isinstance(state, EnergySVIState | SavedState):
        return
    whole = "; this is the whole result" if isinstance(state, SVIRunResult) else ""
    raise ModelError(
        "EnergySVI: `init_state` is the state of a run, `fit.state`, and got a "
        f"{type(state).__name__}{whole}."
    )


def steps_of(state: Any) -> int:
    """Rounds before a state to resume from; 0 without one.

    :raises ModelError: if it is no state.
    """
    if state is None:
        return 0
    check_is_state(state)
    return int(state.arrays["step"] if isinstance(state, SavedState) else state.step)


def restored(fresh: EnergySVIState, saved: SavedState, objective: Any) -> EnergySVIState:
    """The state that was read from a file, put together as a fresh one is.

    :param EnergySVIState fresh: of the run that resumes.
    :param SavedState saved: as it was read; for what the objective keeps, and for averages, it
        stands itself until their structure is known.
    :param objective: that of the run.
    :raises ModelError: if another class of objective trained it.
    """
    mine = type(objective).__name__
    if saved.objective not in ("", mine):
        raise ModelError(
            f"EnergySVI: the saved state was trained by {saved.objective}, and this is {mine}. "
            "Start anew at its parameters: `init_params=fit.params`."
        )
    later: dict[str, Any] = {
        name: saved if saved.has(name) else None
        for name in ("objective_state", "ema", "marginal_state")
    }
    parts = {k: saved.part(k, like) for k, like in fresh._asdict().items() if k not in later}
    return EnergySVIState(**parts, **later)


def check_optimizers(expected: EnergySVIState, state: EnergySVIState) -> None:
    """That all optimisers and their parameters are those of this run.

    :param expected: the shapes of a state of this run.
    :raises ModelError: if they are not.
    """
    for part, owner in (
        ("optim_state", "the energy's parameters and their optimiser"),
        ("guide_optim_state", "the guide's parameters and their optimiser"),
        ("network_optim_states", "the objective's networks and their optimisers"),
    ):
        check_part(part, owner, getattr(expected, part), getattr(state, part))


def check_part(part: str, owner: str, expected: Any, state: Any) -> None:
    """That a part of the state has the shapes and types it should.

    :param str part: its name.
    :param str owner: whose it is.
    :raises ModelError: if it has not; it says what differs.
    """
    wanted, found = (
        {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(shapes_of(tree))}
        for tree in (expected, state)
    )
    differ = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if jax.tree.structure(expected) == jax.tree.structure(state) and not differ:
        return
    raise ModelError(
        f"EnergySVI: `init_state.{part}` does not belong to {owner} in this run: "
        + "; ".join(
            f"{name} is {_in_words(found.get(name))} and should be {_in_words(wanted.get(name))}"
            for name in differ[:3]
        )
        + f"{' ...' if len(differ) > 3 else ''}. Resume with the model, guide, optimisers and "
        "objective that the state comes from, or start anew at its parameters: "
        "`init_params=fit.params`."
    )


def _in_words(x):
    return "absent" if x is None else f"{x.dtype}{list(x.shape)}"
