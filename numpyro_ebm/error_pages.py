# SPDX-License-Identifier: Apache-2.0
"""Where the manual says why: what messages say, by the section of its index of errors.

The index, ``docs/errors.md``, has these words in the first columns of its tables.
"""

__all__ = ["INDEX", "PAGE", "PointsToPage"]

PAGE = "https://github.com/numpyro-ebm/numpyro-ebm/blob/main/docs/errors.md"

INDEX: dict[str, tuple[str, ...]] = {
    "data": (
        "but its plates and event shape ask for",
        "and an array of shape",
        "of the model is empty",
        "no numbers in the column(s)",
        "is a masked array",
        "is a sparse",
        "are complex",
        "nothing is masked in silence",
        "leave its support",
        "lie on the boundary of its support",
    ),
    "models": (
        "is outside any plate",
        "Cannot tell the data plate",
        "one energy for each element",
        "not go into its plates",
        "The model has no energy statement",
        "No energy depends on the visible site",
        "takes its name first",
        "Two statements of the model are named",
        "is stated in the body of a loop",
        "is out of reach: the normalizer is that of a whole row",
        "cannot be called with",
        "was given a value of shape",
    ),
    "parameters-and-log-z": (
        "is unnormalised: its density needs",
        "is not resolved (free",
        "no value for the parameter(s)",
        "is an improper base measure and has no draws",
        "no parameter of the model has a prior",
        "every row has a density and a log Z of its own",
        "has no finite integral",
    ),
    "training": (
        "must be an objective such as",
        "must be an optimiser of NumPyro or Optax",
        "takes derivatives in the visible values",
        "sums over the values of discrete sites",
        "The guide does not draw the latent site(s)",
        "and the visible sites of the model are",
        "from its argument, so it would be fitted",
        "is the state of a run",
        "has no state yet",
    ),
    "sampling-and-calls": (
        "a random key, such as",
        "no unobserved site",
        "moves continuous sites",
        "has no field",
        "is not finite at the initial values",
        "`init_params` names",
    ),
}


class PointsToPage(Exception):
    """An error with a note below its message: the section of the index that says why.

    The message itself stays as it is, so that another error may quote it.

    **Example**

    >>> from numpyro_ebm.error_pages import PointsToPage
    >>> PointsToPage("The data of the model is empty.").__notes__
    ['Why, and what helps: https://github.com/numpyro-ebm/numpyro-ebm/blob/main/docs/errors.md#data']
    """

    def __init__(self, *args: object):
        super().__init__(*args)
        message = str(args[0]) if args else ""
        sections = [s for s, words in INDEX.items() if any(x in message for x in words)]
        if sections:
            self.add_note(f"Why, and what helps: {PAGE}#{sections[0]}")
