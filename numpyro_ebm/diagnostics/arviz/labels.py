# SPDX-License-Identifier: Apache-2.0
"""Names of dimensions, and of what is along them, in ArviZ data."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from numpyro_ebm.diagnostics.arviz.groups import (
    dataset_of,
    group_names,
    is_tree,
    path_free,
    replace_group,
)
from numpyro_ebm.errors import ModelError

__all__ = ["label"]

OF_DRAWS = "chain", "draw"


def label(data: Any, dims: Mapping[str, Sequence[str]], coords: Mapping[str, Any]) -> None:
    """Rename dimensions of arrays, in all groups, and say what is along them.

    :param data: ArviZ data, which are changed.
    :param dict dims: names of all dimensions of an array after chains and draws, by its name.
    :param dict coords: labels by the name of the dimension.
    :raises ModelError: if there is no such array or dimension, or their numbers differ.
    """
    datasets = {name: dataset_of(data[name]) for name in group_names(data)}
    renamed = _renamed(datasets, dims)
    sizes: dict[str, set[int]] = {}  # groups may have other rows
    for group, dataset in datasets.items():
        arrays = {}
        for name, array in dataset.data_vars.items():
            new = renamed.get(name, {})  # a log-likelihood has fewer dimensions than its site
            arrays[name] = array.rename({d: new[d] for d in array.dims if d in new})
        here: dict[str, int] = {}
        for array in arrays.values():
            for dim, size in array.sizes.items():
                if here.setdefault(dim, size) != size:
                    raise ModelError(
                        f"to_arviz: `dims` gives the name '{dim}' to dimensions of {here[dim]} and "
                        f"of {size}."
                    )
        datasets[group] = dataset.drop_vars([*dataset.data_vars, *dataset.coords]).assign(arrays)
        for dim, size in here.items():
            sizes.setdefault(dim, set()).add(size)
    for dim, labels in coords.items():
        if np.size(labels) not in sizes.get(dim, ()):
            found = f"of {sorted(sizes[dim])}" if dim in sizes else f"none of {sorted(sizes)}"
            raise ModelError(
                f"to_arviz: `coords` has {np.size(labels)} labels for the dimension '{dim}', which "
                f"is {found}."
            )
    for group, dataset in datasets.items():
        found = {k: np.asarray(x) for k, x in coords.items() if dataset.sizes.get(k) == np.size(x)}
        replace_group(data, group, dataset.assign_coords(found))


def _renamed(datasets, dims):
    """New names of dimensions by those they have, by array."""
    renamed = {}
    for name, new in dims.items():
        own = path_free(name) if is_tree() else name
        found = [x[own].dims for x in datasets.values() if own in x.data_vars]
        if not found:
            names = sorted({k for x in datasets.values() for k in x.data_vars})
            raise ModelError(f"to_arviz: `dims` names '{name}', and there are {', '.join(names)}.")
        old = max(([d for d in x if d not in OF_DRAWS] for x in found), key=len)
        if isinstance(new, str) or len(new) != len(old) or len({*new, *OF_DRAWS}) != len(old) + 2:
            raise ModelError(
                f"to_arviz: `dims` of '{name}' must be a list of names for {old}, each another, "
                f"got {new!r}."
            )
        renamed[own] = dict(zip(old, new, strict=True))
    return {k: {a: b for a, b in x.items() if a != b} for k, x in renamed.items()}
