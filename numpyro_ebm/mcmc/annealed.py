# SPDX-License-Identifier: Apache-2.0
"""Annealed Langevin dynamics, for models learned by denoising."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from numpyro.infer import init_to_uniform

from numpyro_ebm.errors import ModelError, check_positive
from numpyro_ebm.language.temper import temper
from numpyro_ebm.mcmc.adaptation import AdaptState
from numpyro_ebm.mcmc.chain_kernel import LangevinState
from numpyro_ebm.mcmc.row_kernel import RowKernel
from numpyro_ebm.samplers import annealed
from numpyro_ebm.samplers.per_row import per_row
from numpyro_ebm.types import Model

__all__ = ["AnnealedLangevin"]


class AnnealedLangevin(RowKernel):
    r"""Annealed Langevin dynamics on the continuous sites of an energy-based model.

    .. math:: z ← z + ε_k\, s_k(z) + \sqrt{2ε_k}\, ξ, \qquad ε_k = r\,σ_k^2,
        \qquad \text{finally } z + σ_K^2\, s_K(z)

    from noise N(0, σ₁²), ``num_steps`` times at each of the noise scales σ₁ > … > σ_K. The score
    :math:`s_k` of the density at level k comes from the energy in one of three ways:

    - **A noise-conditional energy**: ``noise_argument="sigma"`` names the keyword argument by which
      the model takes its noise scale, as for
      :class:`~numpyro_ebm.MultiscaleDenoisingScoreMatching`; s_k is the score of
      ``model(..., sigma=σ_k)``.
      Of energies that :class:`~numpyro_ebm.RecoveryLikelihood` learned, ``recover=True`` draws the
      point of every level from its density given that of the level before,
      :math:`\tilde p(z; σ_k)\, e^{-\|z - z_{k-1}\|^2 / 2τ_k^2}` with
      :math:`τ_k^2 = σ_{k-1}^2 - σ_k^2`, by steps of :math:`ε_k = r / (1/τ_k^2 + 1/σ_k^2)`; the run
      starts with z₁ from N(0, s²), s the ``init_scale``. No level has to mix.
    - **One energy learned by** :class:`~numpyro_ebm.MultiscaleDenoisingScoreMatching`: give its
      ``noise_scale`` σ₀, a number, as ``noise_scale``. That objective fits s(z)/σ to -ε/σ₀² at
      z = v + σε, and the score of the density at level σ is -ε/σ in the mean, hence

      .. math:: s_k(z) = (σ_0/σ_k)^2\, s(z)

      which is the energy at the inverse temperature (σ₀/σ_k)², and the last step is σ₀² s(z).
    - **Temperatures**: ``inverse_temperatures`` instead of noise scales, increasing to 1 as a rule,
      with s_k the score of :class:`~numpyro_ebm.temper`'s model and ε_k = r/β_k. It starts from
      N(0, s²), s the ``init_scale``. The last step is σ₀² s(z) if ``noise_scale`` is given: σ₀ is
      the noise at which :class:`~numpyro_ebm.DenoisingScoreMatching` learned the energy.

    A step of this kernel is a whole run, from fresh noise to a draw: under ``MCMC`` its draws are
    independent, every row of each, and it needs no warm-up, ``num_warmup=0``.

    :param model: a model with fixed parameters, ``fixed(model, params)``.
    :param noise_scales: σ_k, decreasing, in units of the unconstrained sites. The first should be
        about as wide as the data, the ratio of neighbours such that their densities overlap.
    :param inverse_temperatures: β_k, increasing; instead of ``noise_scales``.
    :param str noise_argument: the name of the model's keyword argument for the noise scale.
    :param float noise_scale: σ₀, the noise scale of the objective that learned the energy.
    :param int num_steps: steps at each level.
    :param float step_size: r. With noise scales it is a pure number: where the density at level k
        is as sharp as its noise, the variance comes out too large by a factor 1/(1 - r/2).
        With temperatures it is in squared units of the sites, and has to be given.
    :param bool denoise: whether to end with the step without noise, where a noise scale is known.
    :param float init_scale: standard deviation of the noise at the start; σ₁ by default.
    :param bool recover: whether a level is drawn given the one before.
    :raises ModelError: if levels are not positive and in order, other numbers are not positive, or
        the options leave open which score is meant; from ``init``, as :class:`~numpyro_ebm.MALA`.

    On other supports than the reals, noise and steps are those of the unconstrained coordinates, as
    in the objectives. Its law is approximate, not the limit of a chain: short levels, steps that
    are too long, and a first level that does not cover the data all show in it, and nothing rejects
    them. As a block of ``Gibbs`` it draws its sites from this approximation of their conditional,
    whatever their values before. The state is a
    :class:`~numpyro_ebm.mcmc.chain_kernel.LangevinState`, with an ``accept_prob`` of one and
    ``potential_energy`` that of the last level, at the draw.

    Reference: Song, Ermon, *Generative modeling by estimating gradients of the data distribution*,
    2019; the temperatures of MDSM, Li, Chen, Sommer, *Learning energy-based models in
    high-dimensional spaces with multiscale denoising-score matching*, 2023; the last step,
    Jolicoeur-Martineau et al., *Adversarial score matching and improved sampling for image
    generation*, 2021; ``recover``, Gao et al., *Learning energy-based models by diffusion recovery
    likelihood*, 2021.

    **Example**

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpyro
    >>> from numpyro.infer import MCMC
    >>> import numpyro_ebm as ebm
    >>> def noised(sigma=0.0):  # two points at -2 and 2, with noise
    ...     with numpyro.plate("data", 200):
    ...         v = numpyro.sample("v", ebm.Lebesgue())
    ...         ebm.energy("E", 0.5 * v**2 / sigma**2 - jnp.logaddexp(2 * v, -2 * v) / sigma**2)
    >>> kernel = ebm.AnnealedLangevin(
    ...     ebm.fixed(noised, {}), jnp.geomspace(3.0, 0.1, 8), noise_argument="sigma", num_steps=20
    ... )
    >>> mcmc = MCMC(kernel, num_warmup=0, num_samples=2, progress_bar=False)
    >>> mcmc.run(jax.random.key(0))
    >>> bool(abs(jnp.abs(mcmc.get_samples()["v"]) - 2).max() < 0.01)
    True
    """

    leaves_invariant = False
    draws_anew = True

    def __init__(
        self,
        model: Model,
        noise_scales: npt.ArrayLike | None = None,
        *,
        inverse_temperatures: npt.ArrayLike | None = None,
        noise_argument: str | None = None,
        noise_scale: float | None = None,
        num_steps: int = 100,
        step_size: float | None = None,
        denoise: bool = True,
        init_scale: float | None = None,
        recover: bool = False,
    ):
        levels = _parse_levels(
            noise_scales, inverse_temperatures, noise_argument, noise_scale, step_size, recover
        )
        by_noise = noise_scales is not None
        step_size = 0.1 if step_size is None else step_size
        init_scale = (levels[0] if by_noise else 1.0) if init_scale is None else init_scale
        check_positive(self._name, num_steps=num_steps, step_size=step_size, init_scale=init_scale)
        if noise_scale is not None:
            check_positive(self._name, noise_scale=noise_scale)
        last = levels[-1] if by_noise else noise_scale
        if not by_noise and noise_scale is not None and denoise and levels[-1] != 1:
            raise ModelError(
                "AnnealedLangevin: the step without noise needs the learned energy itself: end "
                f"`inverse_temperatures` with 1, not {levels[-1]}, or pass `denoise=False`."
            )
        self._argument = noise_argument
        # The argument of the model at each level, and the step size.
        self._levels, self._tethers = levels, None
        if by_noise and noise_argument is None:
            self._levels = (noise_scale / levels) ** 2
        self._step_sizes = step_size * (levels**2 if by_noise else 1 / levels)
        if recover:
            self._levels, self._tethers = levels[1:], 1 / (levels[:-1] ** 2 - levels[1:] ** 2)
            self._step_sizes = step_size / (self._tethers + 1 / levels[1:] ** 2)
        self._init_scale = init_scale
        self._denoise_variance = last**2 if denoise and last is not None else None
        self._num_steps = num_steps
        super().__init__(model, init_to_uniform)

    def get_diagnostics_str(self, state: Any) -> str:
        return f"{len(self._levels)} levels of {self._num_steps} steps"

    def refresh(
        self, state: Any, model_args: tuple[Any, ...], model_kwargs: dict[str, Any] | None
    ) -> LangevinState:
        row_model, one_row = self._target(model_args, model_kwargs, state.z)
        level = jnp.asarray(self._levels[-1], jnp.result_type(*state.z.values()))
        rows = row_model.to_rows(state.z)
        start = jax.vmap(lambda x: annealed.init(x, one_row, level[None]))(rows)
        return self._cache(state, start, row_model)

    # Internal

    def _target(self, model_args, model_kwargs, z):
        if self._argument in (model_kwargs or {}):
            raise ModelError(
                f"AnnealedLangevin: the model's argument '{self._argument}' is the noise scale of "
                "the level; leave it to the kernel."
            )

        def at_level(level):
            if self._argument is None:
                return self._read(temper(self._model, level), model_args, model_kwargs)
            return self._read(
                self._model, model_args, {**(model_kwargs or {}), self._argument: level}
            )

        level = jnp.asarray(self._levels[-1], jnp.result_type(*z.values()))
        row_model, _ = at_level(level)
        like = (row_model.to_rows(z), level)
        return row_model, per_row(lambda rows, level: at_level(level)[1](rows), like)

    def _read_model(self, model, model_args, model_kwargs):
        kwargs = dict(model_kwargs or {})
        if self._argument is not None:
            kwargs.setdefault(self._argument, jnp.asarray(self._levels[-1], float))
        return super()._read_model(model, model_args, kwargs)

    def _init(self, rng_key, init_params, model_args, model_kwargs):
        key_init, rng_key = jax.random.split(rng_key)
        row_model, _ = self._read(self._model, model_args, model_kwargs)
        z = self._initial_values(key_init, row_model, init_params)
        state = LangevinState(
            i=jnp.array(0),
            z=z,
            potential_energy=jnp.zeros(row_model.num_rows),
            z_grad=z,
            energy=jnp.zeros(row_model.num_rows),
            accept_prob=jnp.ones(row_model.num_rows),
            mean_accept_prob=jnp.ones(()),
            diverging=jnp.zeros(row_model.num_rows, bool),
            num_steps=jnp.array(0),
            adapt_state=AdaptState(jnp.asarray(self._step_sizes[-1], float), None),
            memory=None,
            rng_key=rng_key,
        )
        return self.refresh(state, model_args, model_kwargs)

    def _step(self, state, model_args, model_kwargs):
        row_model, one_row = self._target(model_args, model_kwargs, state.z)
        rng_key, key_run = jax.random.split(state.rng_key)
        gradient = row_model.to_rows(jax.tree.map(jnp.negative, state.z_grad))
        rows = annealed.AnnealedState(row_model.to_rows(state.z), -state.potential_energy, gradient)
        dtype = state.potential_energy.dtype
        levels, step_sizes, tethers = (
            None if x is None else jnp.asarray(x, dtype)
            for x in (self._levels, self._step_sizes, self._tethers)
        )

        def run(key, row):
            return annealed.build_kernel(self._num_steps)(
                key,
                row,
                one_row,
                levels,
                step_sizes,
                self._init_scale,
                self._denoise_variance,
                tethers,
            )

        rows, info = jax.vmap(run)(jax.random.split(key_run, row_model.num_rows), rows)
        return self._cache(state, rows, row_model)._replace(
            i=state.i + 1,
            diverging=info.is_divergent,
            num_steps=jnp.full_like(state.num_steps, len(self._levels) * self._num_steps),
            rng_key=rng_key,
        )

    def _cache(self, state, rows, row_model):
        return state._replace(
            z=row_model.from_rows(rows.position),
            potential_energy=-rows.logdensity,
            z_grad=row_model.from_rows(jax.tree.map(jnp.negative, rows.logdensity_grad)),
            energy=-rows.logdensity,
        )


def _parse_levels(
    noise_scales, inverse_temperatures, noise_argument, noise_scale, step_size, recover
):
    """The noise scales or temperatures, after a check that the options define the score."""
    if (noise_scales is None) == (inverse_temperatures is None):
        raise ModelError("AnnealedLangevin: give either `noise_scales` or `inverse_temperatures`.")
    by_noise = noise_scales is not None
    if by_noise and (noise_argument is None) == (noise_scale is None):
        raise ModelError(
            "AnnealedLangevin: say how the energy depends on the noise: `noise_argument`, the "
            "name of the keyword argument by which the model takes its noise scale, or "
            "`noise_scale`, that of the `MultiscaleDenoisingScoreMatching` that learned it."
        )
    if not by_noise and noise_argument is not None:
        raise ModelError("AnnealedLangevin: `noise_argument` goes with `noise_scales`.")
    if not by_noise and step_size is None:
        raise ModelError(
            "AnnealedLangevin: with `inverse_temperatures` pass a `step_size`, in squared "
            "units of the sites."
        )
    levels = np.atleast_1d(np.asarray(noise_scales if by_noise else inverse_temperatures))
    if recover and (noise_argument is None or levels.size < 2):
        raise ModelError(
            "AnnealedLangevin: `recover=True` walks down two or more `noise_scales` of an energy "
            "that takes its level as `noise_argument`."
        )
    _check_levels(levels, "noise_scales" if by_noise else "inverse_temperatures", by_noise)
    return levels


def _check_levels(levels, name, decreasing):
    steps = -np.diff(levels) if decreasing else np.diff(levels)
    order = "decreasing" if decreasing else "increasing"
    if levels.ndim != 1 or not levels.size or not np.all(np.isfinite(levels) & (levels > 0)):
        raise ModelError(
            f"AnnealedLangevin: `{name}` must be positive and finite numbers, got {levels}."
        )
    if not np.all(steps > 0):
        raise ModelError(f"AnnealedLangevin: `{name}` must be {order}, got {levels}.")
