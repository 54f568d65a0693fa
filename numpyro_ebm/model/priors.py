# SPDX-License-Identifier: Apache-2.0
r"""Models whose parameters have priors: the part outside the data plate, and the rows inside it.

.. math:: π(θ) \prod_n \frac{\tilde p(v_n; θ)}{Z(θ)}

The rows are :mod:`numpyro_ebm.model.row_model`'s. What is outside the data plate,
:func:`prior_part`, is an ordinary NumPyro model of the parameters, with which NumPyro's own tools
(``potential_energy``, ``constrain_fn``, ``initialize_model``) are right.
"""

from collections.abc import Iterable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.distributions import ImproperUniform, MaskedDistribution
from numpyro.primitives import Messenger

from numpyro_ebm._compat import mask_of
from numpyro_ebm.errors import ModelError
from numpyro_ebm.language.explained import wrong_value
from numpyro_ebm.language.handlers import refuse_energies_in_loops
from numpyro_ebm.language.questions import NORMALIZER
from numpyro_ebm.language.sites import layers, plates_of
from numpyro_ebm.model.arguments import Arguments
from numpyro_ebm.model.reading import read_model
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.model.row_site import placeholder
from numpyro_ebm.model.traced_model import trace_model
from numpyro_ebm.signatures import checked
from numpyro_ebm.types import Model, Params, SiteValues

__all__ = [
    "OutsidePlate",
    "UnsetParams",
    "isolated",
    "check_priors",
    "data_plate",
    "prior",
    "prior_part",
    "read_with_priors",
    "run_prior",
]


class isolated(Messenger):
    """Run models inside of a running model, hidden from all handlers around.

    Unlike NumPyro's ``block`` it hides requests for random keys as well.
    """

    def process_message(self, msg: dict[str, Any]) -> None:
        msg["stop"] = True


class UnsetParams(Messenger):
    """Collect the `param` sites of a model to which no handler in it gives a value."""

    def __init__(self, fn: Model | None = None):
        self.names: set[str] = set()
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "param" and msg["value"] is None:
            self.names.add(msg["name"])


class OutsidePlate(Messenger):
    """Hide what is inside the data plate, and collect the parameters.

    Hidden latent sites take a placeholder on their support; visible sites keep their data, and
    energies their values, which are not part of the log-density then.

    :param fn: a model.
    :param str plate: name of the data plate.
    :param keep: names of sites inside the plate that are not hidden.
    """

    def __init__(self, fn: Model | None = None, plate: str = "data", keep: Iterable[str] = ()):
        self.plate, self.keep = plate, frozenset(keep)
        self.params, self.values, self.indices = {}, {}, None
        self._is_enumerated = False
        self._asked: dict[int, tuple[str, str, bool]] = {}  # before handlers around change it
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        refuse_energies_in_loops(msg)
        if msg["type"] in ("param", "plate", "sample"):
            self._asked[id(msg)] = msg["type"], msg["name"], self._is_inside(msg)
        if msg["type"] == NORMALIZER:
            msg["value"], msg["stop"] = "prior", True
        elif msg["type"] in ("sample", "deterministic") and self._hides(msg):
            msg["stop"] = True
            if msg["type"] == "sample" and msg["value"] is None:
                msg["value"] = placeholder(msg)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        kind, name, is_inside = self._asked.pop(id(msg), (None, "", False))
        if kind == "plate" and name == self.plate:
            self.indices = msg["value"]
        elif kind in ("param", "sample"):  # observed ones too: a handler may condition them
            kept = self.values if is_inside else self.params
            kept[name] = msg["value"]
            self._check_value(msg, is_inside)

    def _check_value(self, msg, is_inside):
        """Raise if a parameter has another shape than its prior, with which it may broadcast."""
        if msg["type"] != "sample" or msg["is_observed"] or is_inside:
            return
        shape, num_dims = msg["fn"].shape(), np.ndim(msg["value"])
        if msg["fn"].support.is_discrete:
            self._is_enumerated |= num_dims > len(shape)
            return
        if self._is_enumerated:  # the values of sites that this one depends on lead its shape
            shape = shape[max(len(shape) - num_dims, 0) :]
        why = wrong_value(msg["name"], msg["value"], shape)
        if why is not None:
            raise ModelError(why)

    def _is_inside(self, msg):
        return self.plate in plates_of(msg)

    def _hides(self, msg):
        return self._is_inside(msg) and msg["name"] not in self.keep


@checked
def prior(model: Model) -> Model:
    """The prior of an energy-based model, as a separate NumPyro model.

    It is the model without the sites of its data plate, energies included, so that no normalizer is
    missing. NumPyro's AutoGuides over the parameters are made of it, and ``Predictive`` draws the
    parameters of it.

    :param model: a NumPyro model with energy statements, some of whose parameters have priors:
        unobserved sample sites outside the data plate.
    :return: a NumPyro model with the same arguments.
    :raises ModelError: when run, if the model cannot be read.

    **Example**

    >>> import jax, jax.numpy as jnp
    >>> import numpyro, numpyro.distributions as dist
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data):
    ...     precision = numpyro.sample("precision", dist.Gamma(2.0, 1.0))
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> draws = numpyro.infer.Predictive(ebm.prior(gaussian), num_samples=100)
    >>> draws(jax.random.key(0), jnp.zeros(3))["precision"].shape
    (100,)
    >>> guide = numpyro.infer.autoguide.AutoNormal(ebm.prior(gaussian))
    """
    seen = None

    @wraps(model)
    def prior_model(*args, **kwargs):
        nonlocal seen  # the plate has one name, unless arguments that are not arrays change it
        if seen is None or not seen.arguments.have_form_of(Arguments(args, kwargs)):
            with isolated():
                seen = trace_model(model, args, kwargs)
        run_prior(model, args, kwargs, seen.data_plate.plate)

    return prior_model


def prior_part(model: Model, plate: str, keep: Iterable[str] = ()) -> Model:
    """The model without the sites of its data plate: priors, and what depends on them.

    :param model: a model with energy statements.
    :param str plate: name of the data plate.
    :param keep: names of sites inside the data plate that stay.
    :return: a NumPyro model with the same arguments.
    """
    return OutsidePlate(model, plate, keep)


def run_prior(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    plate: str,
    keep: Iterable[str] = (),
) -> tuple[SiteValues, SiteValues, jax.Array | None]:
    """Run the prior part of a model in place, inside the handlers around.

    :return: values of the sites outside the plate by name, those of the sites kept, the indices of
        the data plate.
    """
    handler = OutsidePlate(model, plate, keep)
    handler(*args, **kwargs)
    kept = {name: handler.values[name] for name in keep}
    return handler.params, kept, handler.indices


def read_with_priors(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    who: str,
    *,
    params: Params | None = None,
    rng_key: jax.Array | None = None,
) -> RowModel:
    """Read a model, hidden from handlers around, and check that its parameters have proper priors.

    :param str who: the caller, for messages.
    :return: a :class:`~numpyro_ebm.model.row_model.RowModel`.
    :raises ModelError: if no parameter has a prior, or one of the priors is improper.
    """
    with isolated():
        row_model = read_model(
            model, args, kwargs, params, rng_key=rng_key, may_observe_outside=True
        )
    check_priors(row_model, who)
    return row_model


def check_priors(row_model: RowModel, who: str) -> None:
    """Raise unless the parameters of a model have proper priors."""
    if not row_model.priors:
        params = sorted(row_model.parameters)
        what = f"its parameter(s) {params} are `numpyro.param` sites" if params else "it has none"
        raise ModelError(
            f"{who}: no parameter of the model has a prior ({what}), so there is no posterior. "
            "Declare it outside the data plate, "
            '`theta = numpyro.sample("theta", dist.Normal(0, 1))`, or learn a point estimate with '
            "`EnergySVI`."
        )
    for name, fn in row_model.priors.items():
        if is_improper(fn):
            raise ModelError(
                f"{who}: the prior of '{name}' is improper, and with an energy nothing says that "
                "its posterior is not. Give it a proper prior, such as a wide `dist.Normal` or "
                "`dist.HalfNormal`."
            )


def is_improper(fn: Any) -> bool:
    """Whether a distribution is an improper prior: flat on an unbounded set, or masked out."""
    return any(
        isinstance(x, ImproperUniform)
        or (isinstance(x, MaskedDistribution) and mask_of(x) is False)
        for x in layers(fn)
    )


def data_plate(row_model: RowModel, indices: jax.Array | None = None) -> Any:
    """Enter the data plate of a model again, with the rows it had.

    :param row_model: the model.
    :param indices: indices of the subsampled rows.
    :return: a NumPyro plate.
    """
    size = row_model.total_rows
    subsample = None if indices is None or jnp.size(indices) == size else indices
    return _SamePlate(row_model.plate, size, subsample, row_model.dim)


class _SamePlate:
    def __init__(self, name, size, indices, dim):
        self.args, self.indices = (name, size), indices
        self.dim = dim

    def __enter__(self):
        data: dict[str, Any] = {} if self.indices is None else {self.args[0]: self.indices}
        self.handler = numpyro.handlers.substitute(data=data)
        with self.handler:
            size = None if self.indices is None else len(self.indices)
            self.plate = numpyro.plate(*self.args, subsample_size=size, dim=self.dim)
        return self.plate.__enter__()

    def __exit__(self, *details):
        return self.plate.__exit__(*details)
