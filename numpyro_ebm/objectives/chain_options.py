# SPDX-License-Identifier: Apache-2.0
"""How many chains contrastive divergence has, where they begin and what is kept of them."""

from typing import Any, NamedTuple

from numpyro_ebm.errors import ModelError, check_integer, check_positive
from numpyro_ebm.model.noise_forms import check_noise
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.objectives.chain_history import Remembers
from numpyro_ebm.objectives.chain_starts import OWNER, check_initial

__all__ = ["ChainOptions"]


class ChainOptions(NamedTuple):
    """Options of :class:`~numpyro_ebm.ContrastiveDivergence`, by the names they have there."""

    persistent: bool
    num_chains: int | None
    buffer: int | None
    initial: Any
    reset_probability: float
    adjusted_resets: bool
    weighted: bool
    energy_penalty: float
    history: Remembers
    temperature: float
    gradient_penalty: float
    kl_weight: float
    kl_step_size: float | None

    def num_moving(self, row_model: RowModel) -> int:
        """How many persistent chains move in a round."""
        return row_model.num_rows if self.num_chains is None else self.num_chains

    def check(self) -> None:
        """Raise if they are out of range or contradict each other."""
        for name in ("reset_probability", "energy_penalty", "gradient_penalty", "kl_weight"):
            if getattr(self, name) != 0:
                check_positive(OWNER, **{name: getattr(self, name)})
        if self.reset_probability > 1:
            raise ModelError(
                f"{OWNER}: `reset_probability` must be between 0 and 1, got "
                f"{self.reset_probability}."
            )
        check_positive(OWNER, temperature=self.temperature)
        if self.kl_step_size is not None:
            check_positive(OWNER, kl_step_size=self.kl_step_size)
        if (self.kl_step_size is None) == bool(self.kl_weight):
            raise ModelError(
                f"{OWNER}: `kl_weight` and `kl_step_size` go together: the weight of the "
                "divergence of the chains, and the step that it is differentiated through."
            )
        for name in ("num_chains", "buffer"):
            if getattr(self, name) is not None:
                check_integer(OWNER, **{name: getattr(self, name)})
        if not isinstance(self.initial, str):
            check_noise(OWNER, initial=self.initial)
        elif self.initial not in ("data", "gaussian", "uniform"):
            raise ModelError(
                f'{OWNER}: `initial` must be "data", "gaussian", "uniform" or a noise such as a '
                f"NumPyro distribution, got {self.initial!r}."
            )
        self._check_together()

    def _check_together(self):
        of_persistent = ("reset_probability", "num_chains", "buffer", "weighted")
        given = [name for name in of_persistent if getattr(self, name)]
        if given and not self.persistent:
            raise ModelError(
                f"{OWNER}: without `persistent=True` every row of the batch has a chain, which "
                f"begins anew in every round, and {_listed(given)} means nothing."
            )
        if self.buffer is not None and self.buffer < (self.num_chains or 1):
            raise ModelError(
                f"{OWNER}: `num_chains` of the chains in the buffer move in a round, and "
                f"{self.num_chains} are more than the {self.buffer} of `buffer`."
            )
        if self.adjusted_resets and not self.reset_probability:
            raise ModelError(f"{OWNER}: `adjusted_resets` wants a `reset_probability`, 1 at best.")
        if self.adjusted_resets and isinstance(self.initial, str) and self.initial == "data":
            raise ModelError(
                f"{OWNER}: `adjusted_resets` are tested against the density of where chains begin, "
                'and the data have none. Set `initial="gaussian"`, `"uniform"` or a NumPyro '
                "distribution that covers the rows."
            )
        if self.weighted and self.kl_weight:
            raise ModelError(
                f"{OWNER}: chains with `weighted=True` stand for the model: drop `kl_weight`."
            )
        if self.weighted and (self.buffer is not None or self.reset_probability):
            raise ModelError(
                f"{OWNER}: chains with `weighted=True` all move in every round and never begin "
                "anew: drop `buffer` and `reset_probability`, and set `num_chains`."
            )
        if self.weighted and isinstance(self.initial, str) and self.initial == "data":
            raise ModelError(
                f"{OWNER}: chains with `weighted=True` begin at a distribution whose density is "
                'known, and the data have none. Set `initial="gaussian"`, `"uniform"` or a NumPyro '
                "distribution."
            )

    def check_model(self, row_model: RowModel) -> None:
        """Raise if a model does not go with them."""
        check_initial(self.initial, row_model, self.weighted or self.adjusted_resets)
        given = [name for name in ("num_chains", "buffer", "weighted") if getattr(self, name)]
        if self.persistent and row_model.covariates and given:
            raise ModelError(
                f"{OWNER}: every row has a density and a log Z of its own, because its energy "
                f"reads what differs from row to row: {', '.join(row_model.covariates)}. Each row "
                f"of the data then has one persistent chain: drop {_listed(given)}."
            )
        if self.buffer is not None and self.buffer < self.num_moving(row_model):
            raise ModelError(
                f"{OWNER}: as many chains as the batch has rows, {self.num_moving(row_model)}, "
                f"move in a round, more than the {self.buffer} of `buffer`. Set `num_chains`."
            )
        if self.weighted and row_model.priors:
            raise ModelError(
                f"{OWNER}: chains with `weighted=True` follow the parameters from value to value, "
                f"and {sorted(row_model.priors)} have priors, which a guide may draw anew in every "
                "round. Write them with `numpyro.param`."
            )
        for name in ("energy_penalty", "gradient_penalty"):
            if getattr(self, name) and row_model.latent:
                raise ModelError(
                    f"{OWNER}: `{name}` is of the energies of rows, and with the latent site(s) "
                    f"{sorted(row_model.latent)} a row has none of its own. Bound the energy in "
                    "the model, or regularise its parameters."
                )
        discrete = [name for name, site in row_model.visible.items() if site.is_discrete]
        for name in ("gradient_penalty", "kl_weight"):
            if getattr(self, name) and discrete:
                raise ModelError(
                    f"{OWNER}: `{name}` takes derivatives in the visible values, and {discrete} "
                    "are discrete. Drop it."
                )
        if self.kl_weight and row_model.covariates:
            raise ModelError(
                f"{OWNER}: `kl_weight` wants the entropy of chains of one law, and every row has "
                "its own, because its energy reads what differs from row to row: "
                f"{', '.join(row_model.covariates)}. Drop it."
            )
        if self.kl_weight and (self.num_moving(row_model) if self.persistent else 2) < 2:
            raise ModelError(f"{OWNER}: `kl_weight` compares chains, and there is one.")


def _listed(names):
    return ", ".join(f"`{name}`" for name in names)
