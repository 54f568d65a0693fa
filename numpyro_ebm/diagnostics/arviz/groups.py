# SPDX-License-Identifier: Apache-2.0
"""Groups of arrays as the data of the installed ArviZ: ``InferenceData``, or from 1 on a tree."""

import warnings
from typing import Any, NamedTuple

import numpy as np

from numpyro_ebm.model.row_model import RowModel

__all__ = [
    "Converted",
    "Likelihood",
    "add_group",
    "dataset_of",
    "group_names",
    "is_tree",
    "path_free",
    "replace_group",
    "to_data",
]


class Converted(NamedTuple):
    """Draws or a fit as arrays, and the model that they are of.

    - **groups** - arrays by group and by name.
    - **dims** - names of the dimensions of an array after chains and draws, by name of the array.
    - **model** - the fixed model; ``None`` for a fit that came without.
    - **row_model** - that model as it was run; ``None`` for a fit, which is no run.
    """

    groups: dict
    dims: dict
    model: object
    row_model: RowModel | None


class Likelihood(NamedTuple):
    """The log-likelihood of observed rows.

    - **name** - of the array.
    - **values** - (chains, draws, rows).
    - **plate** - name of the rows' dimension.
    - **attrs** - what there is to know of its log Z.
    """

    name: str
    values: np.ndarray
    plate: str
    attrs: dict


def to_data(
    groups: dict[str, Any], dims: dict[str, Any], likelihood: Likelihood | None = None
) -> Any:
    """Arrays by group and name, as ArviZ data.

    :param dict groups: what :class:`Converted` has; the group *training* is not one of draws.
    :param dict dims: names of dimensions, also of arrays that are not there.
    :param likelihood: a :class:`Likelihood`, for the group *log_likelihood*.
    """
    of_draws = {group: arrays for group, arrays in groups.items() if group != "training"}
    present = {name for arrays in of_draws.values() for name in arrays}
    data = _convert(of_draws, {name: d for name, d in dims.items() if name in present})
    if likelihood is not None:
        # By itself, because there the name of the site is the name of its rows' log-likelihoods.
        name, values, plate, attrs = likelihood
        rows = _convert({"log_likelihood": {name: values}}, {name: [plate]})["log_likelihood"]
        rows.attrs.update(attrs)
        add_group(data, "log_likelihood", rows)
    if "training" in groups:
        import xarray as xr

        add_group(data, "training", xr.Dataset({"loss": ("step", groups["training"]["loss"])}))
    return data


def _convert(groups, dims):
    import arviz as az

    with warnings.catch_warnings():
        # A guess at transposed axes, wrong for the many persistent chains of a fit.
        warnings.filterwarnings("ignore", "More chains|Found chain dimension", UserWarning)
        if not is_tree():
            return az.from_dict(**groups, dims=dims)
        groups = {
            group: {path_free(k): x for k, x in found.items()} for group, found in groups.items()
        }
        dims = {path_free(name): list(map(path_free, found)) for name, found in dims.items()}
        return az.from_dict(groups, dims=dims)


def is_tree() -> bool:
    """Whether the installed ArviZ is one whose data are a tree, with "/" between its nodes."""
    import arviz as az

    return int(az.__version__.split(".")[0]) >= 1


def path_free(name: str) -> str:
    """A name that is no path in a tree: that of a site in a ``scope``, with dots."""
    return name.replace("/", ".")


def add_group(data: Any, name: str, group: Any) -> None:
    """Add a group, a dataset or one of ArviZ's, to ArviZ data."""
    import xarray as xr

    if hasattr(data, "add_groups"):
        data.add_groups({name: group}, warn_on_custom_groups=False)
    elif isinstance(group, xr.Dataset):
        data[name] = xr.DataTree(group)
    else:
        data[name] = group


def group_names(data: Any) -> list[str]:
    """The groups that ArviZ data have."""
    return list(data.groups()) if hasattr(data, "add_groups") else list(data.children)


def dataset_of(group: Any) -> Any:
    """A group as a dataset, a copy of what it refers to."""
    return group.to_dataset() if hasattr(group, "to_dataset") else group


def replace_group(data: Any, name: str, group: Any) -> None:
    """Put a dataset in the place of a group, or drop it where the dataset has no array."""
    import xarray as xr

    if not group.data_vars:
        del data[name]
    elif hasattr(data, "add_groups"):
        setattr(data, name, group)
    else:
        data[name] = xr.DataTree(group)
