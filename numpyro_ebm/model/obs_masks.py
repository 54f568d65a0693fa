# SPDX-License-Identifier: Apache-2.0
"""Sites that are observed in part: `numpyro.sample(name, fn, obs=..., obs_mask=...)`.

NumPyro makes two sites of such a one, ``<name>_observed`` and ``<name>_unobserved``, each masked
where the other counts, and a deterministic site with the values of both.
"""

from typing import Any

from numpyro.primitives import Messenger

from numpyro_ebm.language.sites import masks_of
from numpyro_ebm.model.data_plate import DataPlate
from numpyro_ebm.model.row_site import placeholder
from numpyro_ebm.types import Model, Trace

__all__ = ["RowsObserved", "row_observed"]


def row_observed(data_plate: DataPlate, model_trace: Trace) -> str | None:
    """The name of the site that is observed in whole rows or not at all.

    :param DataPlate data_plate: the data plate.
    :param model_trace: a trace of the model.
    :return: its name; ``None`` if there is none, or the rows have other visible sites.
    """
    visible = [
        name
        for name, site in model_trace.items()
        if data_plate.owns(site) and site["is_observed"] and site["fn"].event_shape != (0,)
    ]
    if len(visible) != 1 or visible[0] not in data_plate.obs_masked:
        return None
    masks = [x for x in masks_of(model_trace[visible[0]]["fn"]) if not isinstance(x, bool)]
    if not all(map(data_plate.is_by_row, masks)):
        return None
    return visible[0].removesuffix("_observed")


class RowsObserved(Messenger):
    """Let the rows of a model count where its one visible site is observed, and not elsewhere.

    A row of which nothing is observed integrates to one. So it may have any value, which is then
    that of ``<name>_observed``; nothing reads ``<name>_unobserved``, and it is hidden.

    :param fn: a model.
    :param str name: name of the site.
    """

    def __init__(self, fn: Model | None = None, name: str = ""):
        self.name = name
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["name"] == f"{self.name}_observed":
            msg["infer"] = {**msg["infer"], "obs_mask": True}
        elif msg["type"] == "sample" and msg["name"] == f"{self.name}_unobserved":
            msg["value"], msg["stop"] = placeholder({**msg, "value": None}), True
        elif msg["type"] == "deterministic" and msg["name"] == self.name:
            msg["value"] = self.observed

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["name"] == f"{self.name}_observed":
            self.observed = msg["value"]
