# SPDX-License-Identifier: Apache-2.0
r"""What all kernels on the rows of a fixed model share: NumPyro's protocol for ``MCMCKernel`` s.

Every row of the data plate is a chain of its own: accepting or rejecting all rows together, as a
kernel on the whole plate does, fails once there are more than a few. Rows share one evaluation of
the model. Unobserved discrete sites are summed out exactly, as NumPyro's HMC does, unless the
kernel or another block of ``numpyro.infer.Gibbs`` draws them. An ordinary NumPyro model is one
chain over all its latent sites (:mod:`numpyro_ebm.model.plain_model`).
"""

import copy
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.infer.mcmc import MCMCKernel

from numpyro_ebm._compat import is_prng_key, not_jax_tracer
from numpyro_ebm.errors import ModelError
from numpyro_ebm.inputs import as_arrays
from numpyro_ebm.marginals import exact_marginal
from numpyro_ebm.mcmc.start import MAX_DRAWS, given_values, redrawn, unconstrained_values
from numpyro_ebm.mcmc.watch import Watch
from numpyro_ebm.model.plain_model import PlainModel, read_plain_model
from numpyro_ebm.model.reading import bind_fixed, read_fixed_model
from numpyro_ebm.program.compilation import run_compiled
from numpyro_ebm.signatures import Checked
from numpyro_ebm.types import LogDensity, Model, SiteValues

__all__ = ["RowKernel"]


class KernelNeededError(ModelError, AttributeError):
    """A class of kernels stands where a kernel is needed; to `hasattr` the class has no field."""


class OfKernel(property):
    """A property that `numpyro.infer.MCMC` asks for first, and asks a class for in vain."""

    def __get__(self, kernel: Any, owner: type | None = None) -> Any:
        if kernel is None:
            name = getattr(owner, "__name__", "kernel")
            raise KernelNeededError(
                f"`{name}` is a class, and a kernel on a model is needed: "
                f"`MCMC({name}(model), ...)`."
            )
        return super().__get__(kernel, owner)


class RowKernel(Checked, MCMCKernel):
    """NumPyro's protocol for a kernel on the unobserved sites of the rows of a fixed model.

    What a kernel is, it says by these attributes, which others ask for:

    - **leaves_invariant** - whether its steps leave the law of the model invariant.
    - **is_reversible** - whether they are reversible with respect to it.
    - **moves_discrete** - whether it draws discrete sites; otherwise they are summed out.
    - **needs_warmup** - whether it has to be adapted before it can be used.
    - **takes_any_model** - whether it runs on models without an energy statement as well.
    """

    leaves_invariant = True
    is_reversible = False
    moves_discrete = False
    needs_warmup = False
    takes_any_model = False

    _draw_start = staticmethod(unconstrained_values)  # of the sites that it moves
    _for_discrete = ""  # what to use instead, first of all, where all sites are discrete

    def __init__(self, model: Model, init_strategy: Callable[..., Any]):
        self._model = model
        self._init_strategy = init_strategy
        self._num_warmup = 0
        self._sample_fn = None  # looked at by `MCMC`: whether `init` has run
        self._watch: Watch | None = None  # of a run that starts untraced
        self._is_watched = True
        self._redraws = False  # whether `_initial_values` draws bad rows anew
        self._traced = None  # of the model, at arguments that it was read at

    def __getstate__(self) -> dict[str, Any]:
        # What was read of the model is read again; where it stands is in the state, not here.
        return {**self.__dict__, **dict.fromkeys(("_sample_fn", "_traced", "_watch"))}

    @property
    def model(self) -> Model:
        return self._model

    @OfKernel
    def sample_field(self) -> str:
        return "z"

    @property
    def default_fields(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ("z", "potential_energy", "energy", "accept_prob", "diverging")

    def init(
        self,
        rng_key: jax.Array,
        num_warmup: int,
        init_params: Any,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any] | None,
    ) -> Any:
        model_args, model_kwargs = as_arrays(model_args, model_kwargs)
        self._num_warmup = num_warmup
        self._check_warmup()
        self._sample_fn = self._step

        def init_one(rng_key, init_params):
            return self._init(rng_key, init_params, model_args, model_kwargs), None

        state, _ = self._init_chains(init_one, rng_key, init_params)
        if not_jax_tracer(state.potential_energy):
            self._check_energy(state, model_args, model_kwargs)
        self._start_watch(state, num_warmup, model_args, model_kwargs)
        return state

    def sample(
        self, state: Any, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> Any:
        model_args, model_kwargs = as_arrays(model_args, model_kwargs)
        if is_prng_key(state.rng_key):
            state = self._step(state, model_args, model_kwargs)
        else:  # all are at the same step, so that what few steps do costs the others nothing
            state = jax.vmap(
                lambda s, i: self._step(s._replace(i=i), model_args, model_kwargs), (0, None)
            )(state, state.i[0])
        return self._watched(state, model_args, model_kwargs)

    def unwatched(self) -> Self:
        """The same kernel for a caller that looks at the draws itself."""
        kernel = copy.copy(self)
        kernel._is_watched = False
        return kernel

    def wrap_model(self, wrapper: Callable[[Model], Model]) -> Self:
        kernel = copy.copy(self)
        kernel._model = wrapper(self._model)
        kernel._sample_fn = None
        return kernel

    def get_constrain_fn(
        self, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> Callable[..., SiteValues]:
        model_args, model_kwargs = as_arrays(model_args, model_kwargs)
        if self.moves_discrete:
            return lambda z: z  # real and discrete sites are unconstrained
        row_model = self._read_model(self._model, model_args, model_kwargs)
        return lambda z: row_model.constrain(z)[0]

    def postprocess_fn(
        self, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> Callable[..., SiteValues]:
        model_args, model_kwargs = as_arrays(model_args, model_kwargs)
        row_model = self._read_model(self._model, model_args, model_kwargs)
        if self.moves_discrete:
            return lambda z: {**z, **row_model.deterministic({}, z)}
        if row_model.latent:
            return lambda z: row_model.constrain(z)[0]

        def constrain_and_replay(z):
            values, _ = row_model.constrain(z)
            return {**values, **row_model.deterministic({}, values)}

        return constrain_and_replay

    def get_diagnostics_str(self, state: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ""

    # For subclasses

    def _init(self, rng_key, init_params, model_args, model_kwargs) -> Any:
        """The state of one chain at its start."""
        raise NotImplementedError

    def _step(self, state, model_args, model_kwargs) -> Any:
        """The state of one chain a step later."""
        raise NotImplementedError

    # Inside

    @property
    def _name(self):
        return type(self).__name__

    def _start_watch(self, state, num_warmup, model_args, model_kwargs):
        """Watch the run that begins, unless its start is traced: then nobody would read of it."""
        self._watch = None
        if self._is_watched and not_jax_tracer(state.potential_energy):
            moves = self.leaves_invariant and not self.moves_discrete
            unit = self._read_model(self._model, model_args, model_kwargs).unit
            self._watch = Watch(self._name, num_warmup, moves, unit)

    def _watched(self, state, model_args, model_kwargs):
        """A state that the watch, if there is one, has looked at."""
        if self._watch is not None:
            self._watch.after(state, lambda: self._sums(state, model_args, model_kwargs))
        return state

    def _init_chains(self, init_one, rng_key, init_params) -> tuple[Any, Any]:
        """A state and what comes with it, of one chain or many, with rows that can start.

        Whether rows have to be drawn anew is seen from a first try; where that is traced, the loop
        that does it is compiled in any case.
        """
        num_chains = None if is_prng_key(rng_key) else len(rng_key)
        init_params = given_values(init_params, num_chains)
        if num_chains is not None:
            init_one = jax.vmap(init_one, (0, None if init_params is None else 0))
        self._redraws = init_params is None and not not_jax_tracer(jax.tree.leaves(rng_key)[0])
        # Compiled as a whole: operation by operation it takes seconds.
        result = run_compiled(init_one, rng_key, init_params)
        energy = result[0].potential_energy
        if init_params is None and not_jax_tracer(energy) and not np.all(np.isfinite(energy)):
            self._redraws = True
            result = run_compiled(lambda key: init_one(key, None), rng_key)
        return result

    def _sums(self, state, model_args, model_kwargs):
        """The sum of the coordinates of every row, of one chain or of many."""
        row_model = self._read_model(self._model, model_args, model_kwargs)

        def of_chain(z):
            return jnp.sum(row_model.flatten(z), -1)

        return (of_chain if is_prng_key(state.rng_key) else jax.vmap(of_chain))(state.z)

    def _check_warmup(self):
        """Raise if a warm-up of ``_num_warmup`` steps is not enough."""

    def _read_model(self, model, model_args, model_kwargs) -> Any:
        """The row model; the kernel's own is traced once for arguments of the same shapes.

        A model without an energy is a :class:`~numpyro_ebm.model.plain_model.PlainModel`, of one
        row.
        """
        known = self._traced and self._traced.rebound(model, model_args, model_kwargs)
        if known is not None:
            return bind_fixed(known)
        if self.takes_any_model:
            plain = read_plain_model(model, model_args, model_kwargs)
            if plain is not None:
                return plain
        row_model = read_fixed_model(model, model_args, model_kwargs)
        if model is self._model:
            self._traced = row_model.traced
        return row_model

    def _read(self, model, model_args, model_kwargs) -> tuple[Any, LogDensity]:
        """The row model, and the row log-density of unconstrained rows."""
        row_model = self._read_model(model, model_args, model_kwargs)
        if not row_model.visible:
            raise ModelError(
                f"{self._name} moves continuous sites, and {sorted(row_model.latent)} are "
                f"discrete. Use {self._for_discrete}`numpyro_ebm.DiscreteLangevin`, "
                "`numpyro_ebm.BlockGibbs`, `numpyro.infer.DiscreteGibbs`, or `numpyro_ebm.sample`, "
                "which chooses one."
            )
        if isinstance(row_model, PlainModel):
            return row_model, row_model.log_density
        try:
            marginal = exact_marginal(row_model)
        except ModelError as error:
            raise ModelError(
                f"{self._name} sums discrete sites out, and cannot here. Draw them in a block "
                f"of their own: `numpyro.infer.Gibbs([({self._name}(model), "
                f"{sorted(row_model.visible)}), (DiscreteGibbs(model), "
                f"{sorted(row_model.latent)})])`, with `DiscreteLangevin` or `BlockGibbs` "
                f"beside `DiscreteGibbs`. ({error})"
            ) from None

        def log_density(rows):
            return marginal.unconstrained_log_density(row_model, {}, row_model.from_rows(rows))

        return row_model, log_density

    def _initial_values(self, rng_key, row_model, init_params):
        """Where the rows start: drawn until their energies are finite, if they are not given."""

        def draw(key):
            return self._draw_start(key, row_model, self._init_strategy, init_params)

        if not self._redraws or isinstance(row_model, PlainModel):  # NumPyro redraws by itself
            return draw(rng_key)
        _, log_density = self._read(self._model, row_model.args, row_model.kwargs)
        return redrawn(
            rng_key, row_model, draw, lambda z: jnp.isfinite(log_density(row_model.to_rows(z)))
        )

    def _check_energy(self, state, model_args, model_kwargs):
        """Say which rows and sites make the initial energy, or its gradient, not finite."""
        bad = ~np.isfinite(np.asarray(state.potential_energy))
        if not bad.any():
            gradients = {k: ~np.isfinite(np.asarray(g)) for k, g in state.z_grad.items()}
            broken = [name for name, g in gradients.items() if g.any()]
            if broken:
                raise ModelError(
                    f"{self._name}: the energy is finite at the initial values, but its gradient "
                    f"in {broken} is not, so that no proposal could be accepted. Look for roots, "
                    "norms and divisions at zero in the energy, or start elsewhere with "
                    "`init_params`."
                )
            return
        row_model, _ = self._read(self._model, model_args, model_kwargs)
        z, where = state.z, np.argwhere(bad)
        for _ in range(bad.ndim - len(row_model.rows_shape)):  # chains lead: look at a bad one
            z = {name: x[where[0][0]] for name, x in z.items()}
        with numpyro.validation_enabled(False):  # of values that are not finite
            values, _ = row_model.constrain(z)
            terms = row_model.terms(values)
        sites = [k for k, x in terms.items() if not np.all(np.isfinite(np.asarray(x)))]
        rows = sorted({int(row[-1]) if len(row) else 0 for row in where})
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        raise ModelError(
            f"{self._name}: the energy is not finite at the initial values of {int(bad.sum())} of "
            f"{bad.size} {row_model.unit} ({row_model.unit} {shown}"
            + (f"; the terms of {sites})" if sites else ")")
            + (f", drawn {MAX_DRAWS} times" if self._redraws else "")
            + ". Pass `init_params`, or an `init_strategy` such as "
            "`numpyro.infer.init_to_value(values=...)`."
        )
