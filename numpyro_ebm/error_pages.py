# SPDX-License-Identifier: Apache-2.0
"""Where the manual says why: the section of its index of errors, by the module that raised.

The index, ``docs/errors.md``, has the words of ``ELSEWHERE``, and of other messages, in the first
columns of its tables.
"""

import sys

__all__ = ["PAGE", "PointsToPage", "note", "section"]

PAGE = "https://github.com/numpyro-ebm/numpyro-ebm/blob/main/docs/errors.md"

SECTIONS = {
    "data": ("inputs", "datasets", "model.finite_supports", "model.row_site", "model.row_weights"),
    "models": ("language", "model", "models", "program"),
    "parameters-and-log-z": (
        "language.distributions",
        "language.fixed",
        "language.handlers",
        "language.temper",
        "log_normalizers",
        "model.given",
        "model.priors",
        "model.reading",
    ),
    "latent-sites-and-guides": ("guides", "language.supports", "marginals", "model.provenance"),
    "training": ("objectives", "svi", "model.noise", "model.noise_forms"),
    "sampling": ("mcmc", "model.plain_model", "samplers"),
    "posteriors": ("posteriors",),
    "diagnostics": ("diagnostics",),
    "arguments-of-a-call": ("errors", "signatures"),
}
"""Modules and folders of the package; a module that is named itself is not where its folder is."""

ELSEWHERE = {
    "data": (
        "but its plates and event shape ask for",
        "and an array of shape",
        "of the model is empty",
        "are complex",
    ),
    "models": (
        "cannot be called with",
        "No energy depends on the visible site",
        "is out of reach: the normalizer is that of a whole row",
        "`event_shape` must be a tuple of positive integers",
        "is discrete; use",
        "is empty: its lower bound is not the lower one",
    ),
    "parameters-and-log-z": (
        "every row has a density and a log Z of its own",
        "has no finite integral",
        "no value for the parameter(s)",
    ),
    "training": ("must be an objective such as", "takes derivatives in the visible values"),
}
"""Words of messages that belong to another section than their module."""


class PointsToPage(Exception):
    """An error with a note below its message: the section of the index that says why.

    The message itself stays as it is, so that another error may quote it. What others raise, in a
    model of their own, has no note.

    **Example**

    >>> from numpyro_ebm.errors import check_positive
    >>> try:
    ...     check_positive("MALA", step_size=-1.0)
    ... except PointsToPage as error:
    ...     print(error.__notes__[0])
    Why, and what helps: https://github.com/numpyro-ebm/numpyro-ebm/blob/main/docs/errors.md#arguments-of-a-call
    """

    def __init__(self, *args: object):
        super().__init__(*args)
        module = sys._getframe(1).f_globals.get("__name__", "")
        where = section(module, str(args[0]) if args else "")
        if where:
            self.add_note(note(where))


def note(where: str) -> str:
    """What is said below a message.

    :param str where: a section of the index.
    """
    return f"Why, and what helps: {PAGE}#{where}"


def section(module: str, message: str) -> str:
    """The section of the index for a message.

    :param str module: the name of the module that raised it.
    :param str message: the message.
    :return: the anchor of the section; empty for a module that is not of the package.
    """
    package, *path = module.split(".")
    if package != __package__:
        return ""
    for where, words in ELSEWHERE.items():
        if any(x in message for x in words):
            return where
    of = {part: where for where, parts in SECTIONS.items() for part in parts}
    names = (".".join(path[:n]) for n in (2, 1))
    return next((of[name] for name in names if name in of), "")
