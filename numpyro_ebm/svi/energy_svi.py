# SPDX-License-Identifier: Apache-2.0
"""EnergySVI: NumPyro's ``SVI`` for energy-based models and their guides.

:mod:`~numpyro_ebm.svi.start` finds the parameters of model, guide and objective and their initial
values; :mod:`~numpyro_ebm.svi.round` holds the equations of a round, and its steps.
:meth:`EnergySVI.run` compiles whole chunks of rounds, minibatches included, and shows its progress
between chunks; see :mod:`~numpyro_ebm.svi.loop`.
"""

import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from numpyro.distributions import biject_to
from numpyro.infer import SVI
from numpyro.infer.util import transform_fn

from numpyro_ebm.errors import ModelError, check_fraction, check_integer
from numpyro_ebm.guides.losses import check_guide_loss
from numpyro_ebm.inputs import as_arrays
from numpyro_ebm.language.fixed import FIT_TEMPERATURE
from numpyro_ebm.model.arguments import Arguments
from numpyro_ebm.objectives.base import Objective
from numpyro_ebm.program.compilation import is_traced
from numpyro_ebm.program.devices import partitioned_by_compiler
from numpyro_ebm.signatures import checked, explaining
from numpyro_ebm.svi.checkpoints import Checkpoint
from numpyro_ebm.svi.compiled import CompiledRounds
from numpyro_ebm.svi.ctrl_c import CtrlC
from numpyro_ebm.svi.loop import Callback
from numpyro_ebm.svi.resuming import check_is_state, check_optimizers, restored
from numpyro_ebm.svi.round import Round
from numpyro_ebm.svi.running import Run, opened
from numpyro_ebm.svi.saved import SavedState
from numpyro_ebm.svi.sources import find_source
from numpyro_ebm.svi.start import Optimizers, as_optimizer, find_start, same_bounds
from numpyro_ebm.svi.state import EnergySVIRunResult, EnergySVIState, is_finite, select, shapes_of
from numpyro_ebm.types import Model, Optimizer, Params

__all__ = ["EnergySVI"]


class EnergySVI(SVI):
    r"""Learn an energy-based (latent variable) model, and a guide beside it.

    A subclass of :class:`numpyro.infer.SVI` with the same ``init``, ``update``, ``run``,
    ``evaluate`` and ``get_params``.

    The model's parameters are ``numpyro.param`` sites, or have priors: sample sites outside the
    data plate. With N rows, the objective :math:`\mathcal L` and the prior π, the target is then
    the generalised posterior :math:`π(θ)\, e^{-N \mathcal L(θ)}`:

    - If the guide does not draw them, they are estimated at its mode, by the loss
      :math:`\mathcal L(θ) - \log π(θ) / N`, in unconstrained coordinates but without a Jacobian (as
      NumPyro's ``AutoDelta``). They start at the medians of their priors, and a fit's ``params``
      hold them by name.
    - If the guide draws all of them outside the data plate, as ``AutoNormal(prior(model))`` does
      (see :func:`~numpyro_ebm.prior`), it is fitted to that posterior, by the loss
      :math:`E_q[\mathcal L(θ) + (\log q(θ) - \log π(θ)) / N]` with one reparameterised draw a
      round. ``Predictive(guide, params=fit.params, num_samples=...)`` draws from the result. The
      same guide may go on to draw h; that part sees θ as a constant.

    Parameters without a prior, those of an objective (log Z of NCE) included, are point estimates.

    :param model: a NumPyro model with energy statements.
    :param guide: a NumPyro guide q(h | v) reading v through :func:`~numpyro_ebm.visible`, or q(θ)
        outside the data plate, or both; ``None`` where neither is needed.
    :param optim: optimiser of the energy's parameters, and of those of q(θ): a NumPyro or an Optax
        one.
    :param loss: an objective, such as :class:`~numpyro_ebm.DenoisingScoreMatching`.
    :param guide_loss: loss of the guide: any NumPyro ELBO, :class:`~numpyro_ebm.RelaxedELBO` or
        :class:`~numpyro_ebm.PosteriorScore`. If ``None``: ``Trace_ELBO`` for continuous latents,
        ``RelaxedELBO`` for Bernoulli guides, ``TraceGraph_ELBO`` for other discrete latents.
    :param guide_optim: optimiser of the parameters of q(h | v); a copy of ``optim`` if ``None``.
    :param int num_guide_steps: K, the guide steps in each round.
    :param int num_rows: N, against which priors are weighed. If ``None``: the rows that ``run`` is
        given, or in ``update`` and ``evaluate`` the data plate's, before it subsamples. Give it
        where you call these with minibatches of your own.
    :param static_kwargs: static keyword arguments of model and guide.
    :raises ModelError: if ``loss`` is not an objective of this library, or ``num_guide_steps`` or
        ``num_rows`` is not a positive integer; from ``init`` and ``run``, if model, guide and
        objective do not go together, a prior is improper or discrete, or the guide draws only some
        of the parameters; from ``update`` and ``evaluate``, if the number of rows under a prior
        has changed and ``num_rows`` was not given.

    Reference: Bao et al., *Variational (gradient) estimate of the score function in energy-based
    latent variable models*, ICML 2021.

    **Example**

    >>> import jax.numpy as jnp
    >>> import jax, numpyro, optax
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data):
    ...     positive = numpyro.distributions.constraints.positive
    ...     precision = numpyro.param("precision", 1.0, constraint=positive)
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> data = 0.5 * jax.random.normal(jax.random.key(0), (1_000,))
    >>> svi = ebm.EnergySVI(gaussian, None, optax.adam(0.05), ebm.ScoreMatching())
    >>> fit = svi.run(jax.random.key(1), 500, data, progress_bar=False)
    >>> bool(abs(fit.params["precision"] * jnp.var(data) - 1) < 0.05)
    True

    A posterior of the precision instead:

    >>> from numpyro.infer import Predictive
    >>> from numpyro.infer.autoguide import AutoNormal
    >>> def bayesian(data):
    ...     precision = numpyro.sample("precision", numpyro.distributions.HalfNormal(10.0))
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> guide = AutoNormal(ebm.prior(bayesian))
    >>> svi = ebm.EnergySVI(bayesian, guide, optax.adam(0.01), ebm.ScoreMatching())
    >>> fit = svi.run(jax.random.key(2), 1_000, data, progress_bar=False)
    >>> predictive = Predictive(guide, params=fit.params, num_samples=1_000)
    >>> draws = predictive(jax.random.key(3), data)["precision"]
    >>> bool(abs(draws.mean() * jnp.var(data) - 1) < 0.05)
    True
    """

    @checked
    def __init__(
        self,
        model: Model,
        guide: Model | None,
        optim: Optimizer,
        loss: Objective,
        guide_loss: Any = None,
        guide_optim: Optimizer | None = None,
        num_guide_steps: int = 1,
        *,
        num_rows: int | None = None,
        **static_kwargs: Any,
    ):
        if not isinstance(loss, Objective):
            raise ModelError(
                "EnergySVI: `loss` must be an objective such as `DenoisingScoreMatching(0.05)`, "
                f"got {loss!r}. A NumPyro ELBO belongs in `guide_loss`."
            )
        check_guide_loss("EnergySVI", guide_loss)
        check_integer("EnergySVI", num_guide_steps=num_guide_steps)
        if num_rows is not None:
            check_integer("EnergySVI", num_rows=num_rows)
        optim = as_optimizer("optim", optim)
        super().__init__(loss.learned(model), guide, optim, loss, **as_arrays((), static_kwargs)[1])
        self.guide_loss = guide_loss
        self.guide_optim = (
            self.optim if guide_optim is None else as_optimizer("guide_optim", guide_optim)
        )
        self.num_guide_steps = num_guide_steps
        self.num_rows = num_rows
        self._plan: Any = None  # of the latest `init` or `run`, and so the others
        self._chosen_guide_loss = None
        self._posterior: Any = None  # the part of the guide that draws parameters
        self._bounds = {}  # of the supports of penalised parameters
        self._shapes: Any = None  # of the state of the latest `init` or `run`
        self.network_optims = tuple(
            self.optim if p.optim is None else as_optimizer("network_optim", p.optim)
            for p in loss.networks
        )
        self._length = 16  # rounds in the next chunk; follows the time they take
        self._compiled = CompiledRounds(self._round)

    @property
    def _optimizers(self):
        return Optimizers(self.optim, self.guide_optim, self.network_optims)

    # NumPyro's SVI protocol

    @explaining
    def init(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, rng_key: jax.Array, *args: Any, init_params: Params | None = None, **kwargs: Any
    ) -> EnergySVIState:
        """Initial state.

        :param rng_key: random key of the run.
        :param args: arguments of model and guide.
        :param dict init_params: initial values of parameters, instead of their own.
        :param kwargs: keyword arguments of model and guide.
        :return: :class:`EnergySVIState`.
        """
        args, kwargs = _arguments("init", args, kwargs)
        state = self._init(rng_key, init_params, args, kwargs)
        if not self.loss.keeps:
            return state
        return self._compiled.with_objective_state(state, args, kwargs)

    @explaining
    def get_params(self, svi_state: EnergySVIState) -> dict[str, Any]:
        """Values of all `param` sites of model and guide, and of penalised parameters, by name.

        :param EnergySVIState svi_state: a state.
        :return: dict of them; with the temperature of an objective that has another than one, as
            ``"fit_temperature"``, which :func:`~numpyro_ebm.fixed` reads.
        """
        return self._stated(self._round().params(svi_state))

    def _stated(self, params):
        """Parameters with the temperature that they were fitted at."""
        temperature = self.loss.temperature
        if temperature is None or temperature == 1:
            return params
        if FIT_TEMPERATURE in params:
            raise ModelError(
                f"EnergySVI: the parameter '{FIT_TEMPERATURE}' has the name by which a fit says at "
                "which temperature its chains were; rename it."
            )
        return {**params, FIT_TEMPERATURE: jnp.asarray(temperature, float)}

    @explaining
    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        svi_state: EnergySVIState,
        *args: Any,
        forward_mode_differentiation: bool = False,
        **kwargs: Any,
    ) -> tuple[EnergySVIState, jax.Array]:
        """One round: ``num_guide_steps`` steps of the guide, then one of the energy.

        :param EnergySVIState svi_state: current state.
        :param args: arguments of model and guide, for instance a minibatch.
        :param bool forward_mode_differentiation: differentiate the energy's loss forward.
        :param kwargs: keyword arguments of model and guide.
        :return: the next state and the loss of the energy, a mean over rows.
        """
        args, kwargs = _arguments("update", args, kwargs)
        return self._round().take(
            svi_state.step_key, svi_state, args, kwargs, forward_mode_differentiation
        )

    def stable_update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        svi_state: EnergySVIState,
        *args: Any,
        forward_mode_differentiation: bool = False,
        **kwargs: Any,
    ) -> tuple[EnergySVIState, jax.Array]:
        """Like :meth:`update`, but keeps the current state where the next one is not finite.

        The round counts: the next one has other random numbers.

        :param EnergySVIState svi_state: current state.
        :param args: arguments of model and guide.
        :param bool forward_mode_differentiation: as in :meth:`update`.
        :param kwargs: keyword arguments of model and guide.
        :return: the next state and the loss.
        """
        new_state, loss = self.update(
            svi_state, *args, forward_mode_differentiation=forward_mode_differentiation, **kwargs
        )
        finite = is_finite(new_state, loss, svi_state)
        kept = select(finite, new_state, svi_state)._replace(step=new_state.step)
        return kept, jnp.where(finite, loss, jnp.nan)

    @explaining
    def evaluate(self, svi_state: EnergySVIState, *args: Any, **kwargs: Any) -> jax.Array:
        """The objective at the current parameters, with the random numbers of the next round.

        :param EnergySVIState svi_state: current state.
        :param args: arguments of model and guide.
        :param kwargs: keyword arguments of model and guide.
        :return: scalar loss.
        """
        args, kwargs = _arguments("evaluate", args, kwargs)
        return self._round().evaluate(svi_state.step_key, svi_state, args, kwargs)

    @explaining
    def run(
        self,
        rng_key: jax.Array,
        num_steps: int,
        *args: Any,
        batch_size: int | None = None,
        progress_bar: bool = True,
        stable_update: bool = False,
        forward_mode_differentiation: bool = False,
        init_state: EnergySVIState | None = None,
        init_params: Params | None = None,
        callback: Callback | None = None,
        every: int | None = None,
        ema: float | None = None,
        checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
        sharding: Mesh | NamedSharding | None = None,
        **kwargs: Any,
    ) -> EnergySVIRunResult:
        """Run ``num_steps`` rounds.

        ``run(key, n, ...)`` followed by ``run(key, m, ..., init_state=result.state)`` gives the
        same result, bit for bit, as ``run(key, n + m, ...)``.

        :param rng_key: random key; unused where ``init_state`` is given.
        :param int num_steps: number of rounds.
        :param args: arguments of model and guide, with all rows; or, in the place of the first,
            batches: an iterator, an iterable that is no pytree (a data loader), or a function
            without parameters that makes one. A batch is an array, a pytree, or a tuple or list of
            several arguments; those after it are the same in all rounds. All batches have one form;
            one with fewer rows is left out. An iterable that ends is read again.
        :param int batch_size: rows in a minibatch. Batches are drawn without replacement, in a new
            order every epoch; each array argument whose leading axis has the length of the data
            plate is cut. ``None``: all rows in every round. With it an ``np.memmap``, or an array
            of h5py or zarr, stays on disk, and only the rows of the batches are read.
        :param bool progress_bar: show a progress bar.
        :param bool stable_update: keep the state and go on where a step is not finite, instead of
            stopping (as NumPyro's option of this name).
        :param bool forward_mode_differentiation: as in :meth:`update`.
        :param EnergySVIState init_state: state to resume from, of a fit or of what
            :func:`~numpyro_ebm.load` read.
        :param dict init_params: initial values of parameters.
        :param callback: a function of ``(step, state, losses)``, called on the host after every
            ``every`` rounds: the rounds so far, the state, and the losses since the last call. For
            logs, pictures, files, held-out losses; the run ends early where it returns True.
        :param int every: rounds between two calls of ``callback``.
        :param float ema: decay λ in (0, 1) of moving averages of all parameters, ``fit.ema_params``
            and ``fit.state.ema``: a round leaves λ times the old ones, and 1 - λ times the
            parameters after it, in unconstrained coordinates; the parameters at the start at first.
            Energies are often sampled at such averages.
        :param checkpoint: a :class:`~numpyro_ebm.Checkpoint`, or a folder: the run goes on from
            the latest checkpoint in it, if there is one, and writes others.
        :param sharding: how the rows are spread over devices: a mesh, or the sharding of the rows
            of the data. ``None``: as the data are. Each device evaluates the model at its own rows;
            parameters are on all of them.
        :param kwargs: keyword arguments of model and guide.
        :return: NumPyro's ``SVIRunResult`` with ``params``, ``state`` and ``losses``, and with
            ``ema_params``.
        :raises ModelError: if ``batch_size`` does not fit the data, the first batch cannot be used,
            or ``init_state`` or a checkpoint is that of other parameters, optimisers or another
            objective; under `jit`, `vmap` or `grad`, for
            which there is :meth:`update`.

        Where a loss, a parameter or a number in an optimiser's state is not finite the run stops
        with a :class:`~numpyro_ebm.errors.NonFiniteLossWarning` that names the step, and returns
        the last finite state; the warning carries the same result as ``.result``. With
        ``stable_update`` it says at the end how many rounds were undone. Ctrl-C, an iterator
        without more batches and a later batch that cannot be used end the run with an
        :class:`~numpyro_ebm.errors.InterruptedWarning`, and it returns what was learned; a second
        Ctrl-C raises ``KeyboardInterrupt`` at once.
        """
        check_integer("EnergySVI.run", num_steps=num_steps)
        args, kwargs = as_arrays(args, kwargs)
        source = find_source(args, kwargs, batch_size, checkpoint is not None)
        in_memory = (args, kwargs) if source is None else ()
        if is_traced(rng_key, in_memory, init_state, init_params):
            raise ModelError(
                "EnergySVI.run compiles its rounds itself and looks at their losses in between, so "
                "it cannot be a part of `jit`, `vmap` or `grad`. Call it outside, or put "
                "`EnergySVI.update` into `jax.lax.scan`."
            )
        if (callback is None) != (every is None):
            raise ModelError("EnergySVI.run: give both of `callback` and `every`, or neither.")
        if every is not None:
            check_integer("EnergySVI.run", every=every)
        if ema is not None:
            check_fraction("EnergySVI.run", ema=ema)
        batch = {"args": args, "kwargs": kwargs, "batch_size": batch_size, "source": source}
        start = {"init_state": init_state, "init_params": init_params, "sharding": sharding}
        rounds = {
            "stable": stable_update,
            "forward_mode": forward_mode_differentiation,
            "ema": ema,
        }
        with CtrlC() as ctrl_c:
            with opened(checkpoint) as kept:
                begin = ctrl_c.heard(Run)
                run = begin(self, rng_key, num_steps, kept, **batch, **start, **rounds)
                result = run.take(ctrl_c, progress_bar, callback, every)
            run.tell(ctrl_c, result)
        return result

    # Internal

    def _begin(self, rng_key, init_state, init_params, args, kwargs):
        """The state to start from, after the model was checked at these arguments."""
        plan, state = self._plan, init_state
        if state is not None:
            check_is_state(state)
        if isinstance(state, SavedState):
            fresh = self._init(state.rng_key, init_params, args, kwargs)
            plan, state = self._plan, restored(fresh, state, self.loss)
        if plan is None or state is None:
            fresh = self._init(rng_key, init_params, args, kwargs)
            state = fresh if state is None else state
        else:
            arguments = Arguments(args, {**kwargs, **self.static_kwargs})
            if not plan.traced.arguments.are(arguments):
                check_optimizers(self._shapes, state)
                self._plan = plan.at(arguments, self.get_params(state))
        check_optimizers(self._shapes, state)
        self._plan.traced.check_data(state.rng_key, {})
        return state

    def _init(self, rng_key, init_params, args, kwargs):
        """The state of :meth:`init`, but for what the objective keeps."""
        start = find_start(
            rng_key,
            self.model,
            self.guide,
            self.loss,
            self.guide_loss,
            self._optimizers,
            init_params,
            args,
            {**kwargs, **self.static_kwargs},
        )
        if not same_bounds(start.bounds, self._bounds):  # compiled rounds hold them as constants
            self._compiled.clear()
        self._plan, self._bounds, self._posterior = start.plan, start.bounds, start.posterior
        self._chosen_guide_loss = start.guide_loss
        transforms = {name: biject_to(c) for name, c in start.constraints.items()}
        self.constrain_fn = partial(transform_fn, transforms)
        of_energy, of_guide, of_networks = start.optim_states
        if self.guide is None:
            self._check_guide_options()
        step = jax.device_put(np.zeros((), jnp.result_type(int)))
        state = EnergySVIState(of_energy, of_guide, start.rng_key, step, of_networks)
        self._shapes = shapes_of(state)
        return state

    def _check_guide_options(self):
        given = {
            "guide_loss": self.guide_loss is not None,
            "guide_optim": self.guide_optim is not self.optim,
            "num_guide_steps": self.num_guide_steps > 1,
        }
        for name in filter(given.get, given):
            raise ModelError(
                f"EnergySVI: `{name}` is for a guide q(h | v) of the latent sites, and there is no "
                "guide. Drop it, or give the guide."
            )

    def _round(self, num_rows=None):
        """A round as things stand; ``num_rows`` is N where the user gives none."""
        if self._plan is None:
            raise ModelError(
                "EnergySVI: has no state yet. Call `init` or `run` first, of this very object: it "
                "reads the model there."
            )
        return Round(
            plan=self._plan,
            guide=self.guide,
            static_kwargs=self.static_kwargs,
            optimizers=self._optimizers,
            guide_loss=self._chosen_guide_loss,
            num_guide_steps=self.num_guide_steps,
            constrain=self.constrain_fn,
            posterior=self._posterior,
            num_rows=num_rows if self.num_rows is None else self.num_rows,
        )


def _arguments(method, args, kwargs):
    """Arguments of one round, of any library and on any mesh."""
    return partitioned_by_compiler(f"EnergySVI.{method}", as_arrays(args, kwargs))
