# SPDX-License-Identifier: Apache-2.0
"""Recovery likelihood: maximum likelihood of rows given noised copies of them."""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from numpyro_ebm._compat import MALAState, find_stack_level, not_jax_tracer
from numpyro_ebm.errors import ConvergenceWarning, ModelError, check_integer, check_positive
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.model.arguments import check_own_argument
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.objectives.base import Objective, Problem
from numpyro_ebm.objectives.directions import draw_like
from numpyro_ebm.program.draws import scan_keys
from numpyro_ebm.samplers.per_row import per_row
from numpyro_ebm.types import Params, SiteValues

__all__ = ["RecoveryLikelihood"]

LOW_ACCEPTANCE = 0.2


class RecoveryLikelihood(Objective):
    r"""Recovery likelihood, at one noise level or along a diffusion.

    .. math:: p(x \mid y; θ) \propto \tilde p(x; σ_k, θ)\, e^{-\|y - x\|^2 / 2τ_k^2},
        \qquad \mathcal L(θ) = E\, E(x; σ_k, θ) - E\, E(x^-; σ_k, θ), \quad x^- \sim p(x \mid y; θ)

    where x are the data noised to level σ_k and y the same noised further to level σ_{k-1},
    :math:`τ_k^2 = σ_{k-1}^2 - σ_k^2`. Its gradient is that of :math:`-E \log p(x \mid y; θ)`, of
    which log Z is no part. The conditional is a small neighbourhood of y, nearly Gaussian, so that
    a few steps of a chain draw from it where chains on the energy itself would not cross between
    modes. The chains are Metropolis-adjusted Langevin, every row its own, of the step
    :math:`r / (1/τ_k^2 + 1/σ_k^2)`. Begun at x, which is a draw of the conditional at the truth,
    they leave the truth where it is, however few steps they take. At the optimum
    :math:`\tilde p(\cdot; σ_k)` is the density of the data noised to that level; those of the data
    themselves at σ_k = 0.

    Each row takes one of the levels, stratified. The model is told its σ_k as by
    :class:`~numpyro_ebm.MultiscaleDenoisingScoreMatching`, and
    ``AnnealedLangevin(..., noise_argument="sigma", recover=True)`` of the same ``noise_scales``
    walks the levels down from noise. Use it for images, where score matching is blind for the
    proportions of modes at small noise and chains of ``ContrastiveDivergence`` do not mix.

    :param noise_scales: σ₁ > … > σ_K, in the units of v; the last may be 0. A number σ is one
        level, [σ, 0]: the energy of the data is learned from copies with noise σ.
    :param marginal: how latent sites are integrated out, exactly.
    :param str noise_argument: the name of the keyword argument by which the model takes its noise
        level; ``None`` where there is one level.
    :param int num_steps: steps of each chain.
    :param float step_size: r, a pure number; smaller in many dimensions.
    :param str initial: where chains begin: ``"data"``, at x, or ``"noised"``, at y, as published:
        the energy then learns to be walked down in so many steps, and is biased by their number.
    :param bool antithetic: two chains from each start, the second with minus the noise of the
        first, and the mean of both. What is linear in their noise, most of the gradient's variance
        where chains are short, cancels.
    :raises ModelError: if numbers are out of range or not decreasing, or several levels have no
        ``noise_argument``; when used, if a visible site is discrete, the marginal has no exact
        value, or the model has no such argument.

    Warns :class:`~numpyro_ebm.ConvergenceWarning` at the end of a run whose chains accept less than
    a fifth of their steps: x⁻ stays where it began, and nothing is learned. Too few steps from y on
    show nowhere.

    Reference: Gao, Song, Poole, Wu, Kingma, *Learning energy-based models by diffusion recovery
    likelihood*, ICLR 2021; one level, Bengio et al., *Generalized denoising auto-encoders as
    generative models*, 2013; antithetic variates, Hammersley, Morton, *A new Monte Carlo
    technique*, 1956.

    **Example**

    >>> import jax, numpyro
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data, sigma=0.1):
    ...     variance = numpyro.param("variance", 1.0)
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * v**2 / (variance + sigma**2))
    >>> objective = ebm.RecoveryLikelihood(
    ...     [4.0, 2.0, 1.0, 0.5], noise_argument="sigma", num_steps=5, step_size=0.3
    ... )
    >>> data = 2.0 * jax.random.normal(jax.random.key(0), (10_000,))
    >>> loss = lambda x: objective.loss(jax.random.key(1), {"variance": x}, gaussian, None, data)
    >>> bool(abs(jax.jit(jax.grad(loss))(4.0)) < 0.01)  # where the energy is that of the data
    True
    """

    needs = "value"
    order = 1
    is_loss = False

    def __init__(
        self,
        noise_scales: float | Sequence[float] | np.ndarray | jax.Array,
        marginal: Marginal | None = None,
        *,
        noise_argument: str | None = None,
        num_steps: int = 30,
        step_size: float = 0.1,
        initial: Literal["data", "noised"] = "data",
        antithetic: bool = False,
    ):
        name = type(self).__name__
        check_integer(name, num_steps=num_steps)
        check_positive(name, step_size=step_size)
        levels = np.asarray([noise_scales, 0.0] if np.ndim(noise_scales) == 0 else noise_scales)
        falls = levels.ndim == 1 and len(levels) > 1 and np.all(np.diff(levels) < 0)
        if not falls or not np.all(np.isfinite(levels)) or levels[-1] < 0:
            raise ModelError(
                f"{name}: `noise_scales` must be a positive number, or two or more that decrease, "
                f"the last not below 0; got {noise_scales}."
            )
        if len(levels) > 2 and noise_argument is None:
            raise ModelError(
                f"{name}: the energies of {len(levels) - 1} levels differ, and the model has to "
                'know which one is meant: set `noise_argument="sigma"`, or give one noise scale.'
            )
        self.noise_scales, self.noise_argument = noise_scales, noise_argument
        if initial not in ("data", "noised"):
            raise ModelError(f'{name}: `initial` must be "data" or "noised", got {initial!r}.')
        self.num_steps, self.step_size, self.initial = num_steps, step_size, initial
        self.antithetic = antithetic
        self._levels = levels.astype(float)
        super().__init__(marginal)

    def own_arguments(self, rng_key: jax.Array, row_model: RowModel) -> dict[str, Any]:
        if self.noise_argument is None:
            return {}
        check_own_argument(type(self).__name__, row_model, self.noise_argument)
        key_order, key_within = jax.random.split(rng_key)
        strata = jax.random.permutation(key_order, row_model.num_rows)
        within = jax.random.uniform(key_within, (row_model.num_rows,))
        fraction = (strata + within) / row_model.num_rows
        number = jnp.minimum(fraction * (len(self._levels) - 1), len(self._levels) - 2).astype(int)
        return {self.noise_argument: jnp.asarray(self._levels[1:], float)[number]}

    def perturb(
        self, rng_key: jax.Array, row_model: RowModel
    ) -> tuple[SiteValues, Any, jax.Array | None]:
        clean, (before, after) = row_model.unconstrain_visible(), jax.random.split(rng_key)
        lower = jnp.asarray(self._levels[1:], float)
        if self.noise_argument is None:
            levels = jnp.full(row_model.num_rows, lower[0])
        else:
            levels = row_model.kwargs[self.noise_argument]
        number = jnp.argmin(jnp.abs(levels[:, None] - lower), -1)
        added = jnp.sqrt(jnp.asarray(self._levels[:-1], float)[number] ** 2 - levels**2)  # τ
        data = _noised(before, row_model, clean, levels)
        return data, (_noised(after, row_model, data, added), levels, added), None

    def energy_loss(self, rng_key: jax.Array, params: Params, problem: Problem) -> jax.Array:
        key_estimate, key_chain = jax.random.split(rng_key)
        estimate = self.estimate(key_estimate, params, problem)
        drawn, _ = self._recover(key_chain, stop_gradient(params), problem, estimate)
        negative = sum(estimate.log_density(params, x) for x in drawn) / len(drawn)
        positive = estimate.log_density(params, problem.unconstrained)
        return problem.row_model.mean(negative - positive)

    def _recover(self, rng_key, params, problem, estimate):
        """Draws of p(x | y), one or a pair, and the share of steps each row accepted, (rows,)."""
        row_model, (noised, levels, added) = problem.row_model, problem.noise
        start = row_model.to_rows(problem.unconstrained if self.initial == "data" else noised)
        precision = 1 / added**2 + jnp.where(levels > 0, 1 / jnp.maximum(levels, 1e-30) ** 2, 0.0)
        step_sizes, kernel = self.step_size / precision, blackjax.mala.build_kernel()

        zeros = jax.tree.map(jnp.zeros_like, start)
        # A chain is on the way from its center, in its mirror image where the sign is -1.
        center, way = (start, zeros) if self.antithetic else (zeros, start)

        def walk(sign):
            def rows_at(way):
                return jax.tree.map(lambda x, moved: x + sign * moved, center, way)

            def log_density(way):
                x = row_model.from_rows(rows_at(way))
                away = {name: x[name] - noised[name] for name in x}
                tether = 0.5 * row_model.row_dot(away, away) / added**2
                return estimate.log_density(params, x) - tether

            def step(key, carry):
                chains, accepted = carry
                keys = jax.random.split(key, row_model.num_rows)
                move = partial(kernel, logdensity_fn=one_row)
                chains, info = jax.vmap(lambda k, x, s: move(k, x, step_size=s))(
                    keys, chains, step_sizes
                )
                return chains, accepted + info.is_accepted / self.num_steps

            one_row = per_row(log_density, (way,))
            chains = MALAState(way, *jax.vmap(jax.value_and_grad(one_row))(way))
            first = chains, jnp.zeros(row_model.num_rows)
            keys = jax.random.split(rng_key, self.num_steps)
            chains, accepted = scan_keys(step, first, keys)
            return row_model.from_rows(rows_at(chains.position)), accepted

        walks = [walk(sign) for sign in ((1, -1) if self.antithetic else (1,))]
        drawn, accepted = zip(*walks, strict=True)
        return stop_gradient((drawn, sum(accepted) / len(walks)))

    def statistics(
        self, rng_key: jax.Array, params: Params, problem: Problem, state: Any = None
    ) -> Any:
        estimate = self.estimate(rng_key, params, problem)
        return jnp.mean(self._recover(rng_key, params, problem, estimate)[1])

    def review(self, statistics: Any) -> None:
        if not_jax_tracer(statistics) and not statistics > LOW_ACCEPTANCE:
            warnings.warn(
                ConvergenceWarning(
                    f"RecoveryLikelihood: the chains accept {float(statistics):.2g} of their steps "
                    "at the end of the run, and stay where they begin. Set a smaller "
                    f"`step_size` than {self.step_size}."
                ),
                stacklevel=find_stack_level(),
            )


def _noised(rng_key, row_model, values, levels):
    noise = draw_like(jax.random.normal, rng_key, values)
    return {k: x + row_model.rows_like(levels, k, x) * noise[k] for k, x in values.items()}
