# SPDX-License-Identifier: Apache-2.0
r"""Bi-level score matching: differentiate through the steps that fit the guide.

.. math:: \log\hat p(v; θ) = \log\frac{\tilde p(v, h; θ)}{q(h | v; φ_N(θ))}, \qquad
    φ_{n+1}(θ) = φ_n(θ) - α\,∇_φ \mathcal G(φ_n(θ); θ)

Where q is the posterior the ratio is :math:`\tilde p(v; θ)` whatever h is, so its score in v is
exact for one particle. Its derivative in θ is so only if φ follows θ: that is what the N unrolled
steps of the guide's loss G add. With N = 0 the guide is a constant, the gradient lacks
:math:`∂_θ ∇_v \log p(h | v; θ)`, and learning fails wherever the latents matter.

Compared with ``VaGES``, which has no such dependence to follow, it costs N second-order steps of
the guide a round and a step size to choose. With the denoising, multiscale and sliced objectives it
is BiDSM, BiMDSM and BiSSM.

Reference: Bao, Li, Xu, Su, Zhu, Zhang, *Bi-level score matching for learning energy-based latent
variable models*, NeurIPS 2020.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from numpyro.distributions import biject_to
from numpyro.infer import TraceGraph_ELBO

from numpyro_ebm.errors import ModelError, check_integer, check_positive
from numpyro_ebm.guides.guide import Guide
from numpyro_ebm.guides.losses import (
    RelaxedELBO,
    check_guide_loss,
    default_guide_loss,
    row_guide_loss,
)
from numpyro_ebm.marginals.base import Estimate, Marginal, score_of
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.program.draws import scan_keys
from numpyro_ebm.types import Params, SiteValues

__all__ = ["Unrolled"]


class Unrolled(Marginal):
    """The ratio p̃(v, h; θ)/q(h | v; φ(θ)), with φ following θ for a few steps (BiSM).

    :param int num_steps: N, the unrolled steps of the guide.
    :param float step_size: α, the step size of these plain gradient steps on the guide's
        unconstrained parameters, for its loss as a mean over rows. If ``None``: 1 for discrete
        latents, where the loss is no steeper than a logistic regression's, and 0.1 for continuous
        ones. Too large a step diverges, too small a one leaves the bias of N = 0.
    :param int num_particles: particles for the value and, independently, for the derivative.
    :param guide_loss: G: a NumPyro ELBO, :class:`~numpyro_ebm.RelaxedELBO` with
        ``path_derivative=False``, or :class:`~numpyro_ebm.PosteriorScore`. If ``None``:
        ``Trace_ELBO`` for continuous latents, ``RelaxedELBO`` for Bernoulli guides.
    :raises ModelError: if the arguments are out of range; when used, if the guide's draws can be
        differentiated neither as they are nor relaxed.

    The steps of the guide that :class:`~numpyro_ebm.EnergySVI` takes in every round come on top:
    they find φ, the unrolled ones let it depend on θ.

    **Example**

    >>> import numpyro_ebm as ebm
    >>> ebm.Unrolled(num_steps=5)
    Unrolled(num_steps=5, step_size=None, num_particles=1, guide_loss=None)
    >>> bi_dsm = ebm.DenoisingScoreMatching(0.05, marginal=ebm.Unrolled(num_steps=5))
    """

    needs_guide = True
    value = None

    def __init__(
        self,
        num_steps: int = 5,
        *,
        step_size: float | None = None,
        num_particles: int = 1,
        guide_loss: Any = None,
    ):
        check_integer("Unrolled", 0, num_steps=num_steps)
        if step_size is not None:
            check_positive("Unrolled", step_size=step_size)
        check_integer("Unrolled", num_particles=num_particles)
        self.num_steps = num_steps
        self.step_size = step_size
        self.num_particles = num_particles
        check_guide_loss("Unrolled", guide_loss)
        self.guide_loss = guide_loss

    def check(self, row_model: RowModel, guide: Guide | None, order: int) -> None:
        self.required_guide(row_model, guide)

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
        guide = self.required_guide(row_model, guide)
        key_steps, *keys = jax.random.split(rng_key, 3)
        given = dict(params)
        unroll = self._unroll(key_steps, row_model, guide, params, stop_gradient(unconstrained))
        reached = unroll(params)
        guide_params = stop_gradient(reached)
        visible, _ = row_model.constrain(stop_gradient(unconstrained))

        def ratio(rng_key, follow):
            latent = guide.draw(rng_key, guide_params, visible, self.num_particles)

            def log_density(params, unconstrained):
                visible, _ = row_model.constrain(unconstrained)
                follower = guide_params
                if follow:  # not unrolled twice, which is most of the work
                    follower = reached if _same(params, given) else unroll(params)

                def one(latent):
                    log_joint = row_model.unconstrained_log_density(params, unconstrained, latent)
                    return log_joint - guide.log_density(follower, visible, latent)

                return jnp.mean(jax.vmap(one)(latent), 0)

            return log_density

        first, second = ratio(keys[0], False), ratio(keys[1], True)
        return Estimate(second, score_of(first, stop_gradient(params)))

    def draw_latent(
        self,
        rng_key: jax.Array,
        row_model: RowModel,
        guide: Guide,
        params: Params,
        unconstrained: SiteValues,
    ) -> SiteValues:
        key_steps, key_draw = jax.random.split(rng_key)
        unroll = self._unroll(key_steps, row_model, guide, params, stop_gradient(unconstrained))
        reached = stop_gradient(unroll(params))
        return super().draw_latent(key_draw, row_model, guide, reached, unconstrained)

    def _unroll(self, rng_key, row_model, guide, params, unconstrained):
        """The map from all parameters to those of the guide after the unrolled steps."""
        problem = _Batch(row_model, guide, unconstrained)
        found = guide.parameters(rng_key, params)
        transforms = {
            name: biject_to(constraint)
            for name, (_, constraint) in found.items()
            if name not in row_model.parameters
        }
        start = {name: transforms[name].inv(stop_gradient(params[name])) for name in transforms}
        guide_loss = self._loss(problem) if self.num_steps else None
        step_size = self.step_size
        if step_size is None:
            step_size = 1.0 if all(site.is_discrete for site in row_model.latent.values()) else 0.1

        def constrain(free):
            return {name: transforms[name](x) for name, x in free.items()}

        def unroll(params):
            own = {name: x for name, x in params.items() if name not in transforms}

            def loss(free, rng_key):
                return row_guide_loss(
                    guide_loss, rng_key, own, constrain(free), problem, guide.function
                )

            def step(rng_key, free):
                gradient = jax.grad(loss)(free, rng_key)
                move = lambda x, g: x - step_size * g  # noqa: E731
                return jax.tree.map(move, free, gradient)

            free = start
            if self.num_steps:
                free = scan_keys(step, start, jax.random.split(rng_key, self.num_steps))
            return {**params, **constrain(free)}

        return unroll

    def _loss(self, problem):
        loss = default_guide_loss(problem) if self.guide_loss is None else self.guide_loss
        if isinstance(loss, RelaxedELBO):
            return RelaxedELBO(loss.temperature, path_derivative=False)
        discrete = any(site.is_discrete for site in problem.row_model.latent.values())
        if isinstance(loss, TraceGraph_ELBO) or (discrete and not hasattr(loss, "rows")):
            raise ModelError(
                f"Unrolled differentiates through steps of the guide, and the guide's draws of "
                f"{sorted(problem.row_model.latent)} cannot be differentiated. Use a Bernoulli "
                "or a "
                "reparameterised guide, or `VaGES()`."
            )
        return loss


def _same(params, others):
    """Whether two dicts hold the very same arrays."""
    return params.keys() == others.keys() and all(x is others[name] for name, x in params.items())


class _Batch(NamedTuple):
    """What a guide loss looks at."""

    row_model: RowModel
    guide: Guide
    unconstrained: SiteValues
    row_weights: None = None
