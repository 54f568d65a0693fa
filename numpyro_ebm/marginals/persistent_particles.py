# SPDX-License-Identifier: Apache-2.0
r"""Persistent particles: draws of the latent sites of every row, kept from round to round.

.. math:: h_i' \sim K_θ(h_i, \cdot \mid v), \qquad
    ∂_θ \log\tilde p(v; θ) \approx \frac1L \sum_{i=1}^L ∂_θ \log\tilde p(v, h_i; θ)

where K leaves the posterior p(h | v; θ) invariant. The particles of a row are Markov chains that go
on from where the row was met last, so that no guide has to know the posterior: they follow it as
long as θ moves slowly against them. With unadjusted Langevin steps (``ULA``) it is particle
gradient descent, whose particles are of a law that is off by O(ε): where the posterior is Gaussian
with precision λ their mean is right, and their variance 1/(λ (1 - ελ/2)). With prior chains of the
same kind beside it, it is the interacting particle algorithm for latent-space priors, up to the
noise that this adds to θ.

Reference: Kuntz, Lim, Johansen, *Particle algorithms for maximum likelihood training of latent
variable models*, AISTATS 2023; Marks, Wang, Akyildiz, *Learning latent energy-based models via
interacting particle Langevin dynamics*, arXiv:2510.12311, 2025.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from numpyro.infer.mcmc import MCMCKernel

from numpyro_ebm.errors import ModelError, check_integer
from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.marginals.base import Estimate, Marginal, score_of
from numpyro_ebm.marginals.kernel_steps import check_kernel_maker, constrain_latents, move_latents
from numpyro_ebm.marginals.vages import cumulant_surrogate
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.types import Params, SiteValues

__all__ = ["PersistentParticles"]


class PersistentParticles(Marginal):
    r"""Particles of the posterior of every row, moved by a kernel in every round; no guide.

    .. math:: ∂_θ \log\tilde p(v; θ) \approx \frac1L \sum_i ∂_θ \log\tilde p(v, h_i; θ),
        \qquad h_i \leftarrow K_θ(h_i, \cdot \mid v)

    They are part of the state of :class:`~numpyro_ebm.EnergySVI`, ``fit.state.marginal_state``, and
    are saved and resumed with it: arrays of shape (all rows, particles, ...) by latent site, in
    unconstrained coordinates. A minibatch moves those of its rows. The mean over particles is
    without bias where the kernel leaves the posterior invariant and θ moves slowly.

    :param kernel: a function of a model that returns a NumPyro ``MCMCKernel``, such as
        ``functools.partial(ebm.MALA, step_size=0.1)`` or :class:`~numpyro_ebm.BlockGibbs`. There
        is no warm-up, so that a Langevin kernel needs its step size.
    :param int num_particles: L. Objectives that take two or three derivatives use one half for the
        score and the other for its derivative, as :class:`~numpyro_ebm.VaGES` does, and need at
        least 4 or 6.
    :param int num_steps: kernel steps in each round.
    :raises ModelError: if an argument is out of range; when used, if the model has no latent sites,
        the kernel sums some of them out, the objective adds noise to the visible values (whose
        posterior is another one in every round) or needs values of log p̃(v), the model subsamples
        its data plate itself, or nobody knows which rows a batch has, as ``EnergySVI.run`` on
        arrays does.

    Reference: Kuntz, Lim, Johansen, AISTATS 2023.

    **Example**

    >>> import jax, jax.numpy as jnp, numpyro, optax
    >>> from functools import partial
    >>> import numpyro_ebm as ebm
    >>> def model(data):
    ...     mean = numpyro.param("mean", 0.0)
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         h = numpyro.sample("h", ebm.Lebesgue())
    ...         ebm.energy("E", 0.5 * (h - mean) ** 2 + 0.5 * (v - h) ** 2)
    >>> data = 1.0 + jnp.sqrt(2.0) * jax.random.normal(jax.random.key(0), (500,))
    >>> mala = partial(ebm.MALA, step_size=0.8)
    >>> objective = ebm.ContrastiveDivergence(mala, 5, ebm.PersistentParticles(mala, 2))
    >>> svi = ebm.EnergySVI(model, None, optax.adam(0.02), objective)
    >>> fit = svi.run(jax.random.key(1), 600, data, batch_size=100, progress_bar=False)
    >>> bool(abs(fit.params["mean"] - jnp.mean(data)) < 0.2), fit.state.marginal_state["h"].shape
    (True, (500, 2))
    """

    value = None
    has_state = True

    def __init__(
        self, kernel: Callable[..., MCMCKernel], num_particles: int = 2, *, num_steps: int = 1
    ):
        check_kernel_maker("PersistentParticles", kernel)
        check_integer("PersistentParticles", num_particles=num_particles, num_steps=num_steps)
        self.kernel = kernel
        self.num_particles = num_particles
        self.num_steps = num_steps
        self._held: SiteValues | None = None  # the particles of a batch, unconstrained, leading

    def check(self, row_model: RowModel, guide: Guide | None, order: int) -> None:
        if not row_model.latent:
            raise ModelError(
                "PersistentParticles is for models with latent sites; use `Exact()` for this one."
            )
        if order > 1 and self.num_particles < 2 * order:
            raise ModelError(
                f"PersistentParticles: this objective takes derivatives of order {order}, from two "
                f"independent sets of {order} particles at least, got "
                f"num_particles={self.num_particles}."
            )

    # Between rounds

    def init_state(
        self, rng_key: jax.Array, row_model: RowModel, params: Params, rows: Any = None
    ) -> SiteValues:
        if row_model.num_rows != row_model.total_rows:
            raise ModelError(
                f"PersistentParticles: the plate '{row_model.plate}' subsamples itself, and all "
                "rows have particles. Drop `subsample_size` and pass `batch_size` to the run."
            )
        total = _rows_that_are_known(rows).total
        keys = jax.random.split(rng_key, self.num_particles)
        start = jax.vmap(lambda key: self._moved(key, row_model, params, None, 0))(keys)
        by_row = self._by_row(row_model, start)
        place = jnp.arange(total) % row_model.num_rows  # starts are of no row in particular
        return {name: x[place] for name, x in by_row.items()}

    def advance(
        self,
        rng_key: jax.Array,
        row_model: RowModel,
        params: Params,
        state: Any,
        rows: Any = None,
    ) -> tuple[Marginal, Any]:
        found, numbers = len(jax.tree.leaves(state)[0]), _rows_that_are_known(rows).numbers
        if found != rows.total:
            raise ModelError(
                f"PersistentParticles: there are particles of {found} rows, and the data have "
                f"{rows.total}. Resume with the same data, or start anew at the parameters: "
                "`init_params=fit.params`."
            )
        own = {name: x[numbers] for name, x in state.items()}
        keys, start = jax.random.split(rng_key, self.num_particles), self._leading(row_model, own)
        held = copy.copy(self)
        held._held = jax.vmap(
            lambda key, one: self._moved(key, row_model, params, one, self.num_steps)
        )(keys, start)
        moved = self._by_row(row_model, held._held)
        return held, {name: x.at[numbers].set(moved[name]) for name, x in state.items()}

    def _moved(self, rng_key, row_model, params, start, num_steps):
        """One particle of every row after some steps."""
        return move_latents(
            "PersistentParticles", self.kernel, rng_key, row_model, params, start, num_steps
        )

    def _by_row(self, row_model, particles):
        """From (particles, site) to (rows, particles, ...)."""
        rows = jax.vmap(row_model.to_rows)(particles)
        return {name: jnp.swapaxes(x, 0, 1) for name, x in rows.items()}

    def _leading(self, row_model, by_row):
        """Undo :meth:`_by_row`."""
        particles = {name: jnp.swapaxes(x, 0, 1) for name, x in by_row.items()}
        return jax.vmap(row_model.from_rows)(particles)

    # In a round

    def held(self) -> SiteValues:
        return {} if self._held is None else {name: x[0] for name, x in self._held.items()}

    def bind(
        self,
        rng_key: jax.Array,
        row_model: RowModel,
        guide: Guide | None,
        params: Params,
        unconstrained: SiteValues,
        *,
        order: int = 2,
    ) -> Estimate:
        self.check(row_model, guide, order)
        if self._held is None:
            raise ModelError(
                "PersistentParticles lives in the state of a run, and here is none. Train with "
                "`numpyro_ebm.EnergySVI`; afterwards use `VaGES` with a guide, or `sample`."
            )
        latent = constrain_latents(row_model, stop_gradient(self._held))
        half = self.num_particles // 2 if order > 1 else 0  # those for the score alone

        def surrogate(params, unconstrained, *, of_score, order):
            chosen = {name: x[:half] if of_score else x[half:] for name, x in latent.items()}
            log_joint = jax.vmap(
                lambda h: row_model.unconstrained_log_density(params, unconstrained, h)
            )(chosen)
            return jnp.mean(log_joint, 0) if order == 1 else cumulant_surrogate(log_joint, order)

        score = score_of(partial(surrogate, of_score=half > 0, order=1), stop_gradient(params))
        return Estimate(partial(surrogate, of_score=False, order=order), score)


def _rows_that_are_known(rows):
    """Which rows of the data a batch has.

    :raises ModelError: if nobody knows.
    """
    if rows is None:
        raise ModelError(
            "PersistentParticles: particles belong to rows of the data, and only `EnergySVI.run` "
            "on arrays tells which rows a batch has. Use it, with `batch_size=` for minibatches; "
            "for `update` and for batches from an iterable use `VaGES` with a guide."
        )
    return rows
