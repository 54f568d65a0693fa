# SPDX-License-Identifier: Apache-2.0
r"""Losses that fit a guide q(h | v) to the posterior p(h | v; θ) of an energy-based model.

θ is a constant in them, so log Z(θ) does not matter: any NumPyro ELBO can be used. Two more are
:class:`RelaxedELBO`, a low-variance pathwise gradient for Bernoulli latents, and
:class:`PosteriorScore`, a Fisher divergence for continuous ones.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.lax import stop_gradient
from numpyro.handlers import substitute
from numpyro.infer import Trace_ELBO, TraceGraph_ELBO
from numpyro.primitives import Messenger

from numpyro_ebm.errors import ModelError, check_positive
from numpyro_ebm.keys import default_key
from numpyro_ebm.language.handlers import set_visible, substitute_and_block
from numpyro_ebm.language.sites import masks_of, plates_of, unwrap
from numpyro_ebm.model.reference import Completed
from numpyro_ebm.signatures import Checked
from numpyro_ebm.types import Model, Params

__all__ = [
    "PosteriorScore",
    "RelaxedELBO",
    "check_guide_loss",
    "default_guide_loss",
    "row_guide_loss",
]


class RelaxedELBO(Checked):
    r"""Evidence lower bound with relaxed Bernoulli latents, for fitting a guide.

    .. math:: \mathcal L(φ) = E\big[\log q(\tilde h | v; ⊥φ) - \log\tilde p(v, \tilde h; θ)\big],
        \qquad \tilde h = σ\big((\text{logits}_φ + \text{logistic noise}) / τ\big)

    with log q the Bernoulli log-probability, linear in the relaxed value. The gradient is pathwise
    only (φ inside log q is held constant): its mean and its variance vanish together where q is a
    Bernoulli posterior, whatever τ. Relaxed values serve the guide alone; the estimators of the
    energy's gradient use hard draws. The value is an estimate of the negative ELBO up to log Z, not
    a bound.

    :param float temperature: τ of the relaxation.
    :param bool path_derivative: whether φ inside log q is held constant, as above. Without, the
        gradient has a second term, of a mean that vanishes with τ², but can itself be
        differentiated, as :class:`~numpyro_ebm.Unrolled` does.
    :raises ModelError: when used with a latent site that the guide does not draw from a Bernoulli
        (possibly with ``to_event``).

    Reference: pathwise gradient of a relaxed Bernoulli, Maddison, Mnih, Teh, *The concrete
    distribution*, ICLR 2017; constant φ in log q, Roeder, Wu, Duvenaud, *Sticking the landing*,
    NeurIPS 2017.

    **Example**

    >>> import numpyro_ebm as ebm
    >>> ebm.RelaxedELBO(temperature=0.5)
    RelaxedELBO(temperature=0.5)
    """

    can_infer_discrete = True

    def __init__(self, temperature: float = 0.1, *, path_derivative: bool = True):
        check_positive("RelaxedELBO", temperature=temperature)
        self.temperature = temperature
        self.path_derivative = path_derivative

    def rows(
        self, rng_key: jax.Array, params: Params, guide_params: Params, problem: Any
    ) -> jax.Array:
        """The loss of every row, of shape (rows,)."""
        row_model, guide = problem.row_model, problem.guide
        visible, _ = row_model.constrain(problem.unconstrained)
        with _relax_bernoulli(self.temperature):
            guide_trace = guide.trace(rng_key, guide_params, visible)
        latent, log_q = {}, 0.0
        for name in row_model.latent:
            site = guide_trace[name]
            if name not in site["infer"].get("relaxed", ()):
                raise ModelError(
                    f"RelaxedELBO: the guide draws '{name}' from {unwrap(site['fn'])}, not from a "
                    "Bernoulli. Pass `guide_loss=numpyro.infer.TraceGraph_ELBO()` to EnergySVI."
                )
            h = site["value"]
            latent[name] = h
            logits = unwrap(site["fn"]).logits
            logits = stop_gradient(logits) if self.path_derivative else logits
            log_prob = h * logits - jax.nn.softplus(logits)
            log_prob = jnp.broadcast_to(log_prob, jnp.shape(h))
            event_dim = site["fn"].event_dim
            log_prob = jnp.sum(log_prob, tuple(range(-event_dim, 0)))
            log_q = log_q + row_model.sum_to_rows(log_prob)
        return log_q - row_model.log_density(params, {**visible, **latent})

    def __repr__(self):
        held = "" if self.path_derivative else ", path_derivative=False"
        return f"RelaxedELBO(temperature={self.temperature}{held})"


class PosteriorScore(Checked):
    r"""Fisher divergence between the guide and the posterior, for continuous latents.

    .. math:: \mathcal L(φ) = \tfrac12 E_{q(h | v; φ)} \|∇_h \log q(h | v; φ) -
        ∇_h \log\tilde p(v, h; θ)\|^2

    Only the gradient of the log-density is needed, as for score matching. The guide has to be
    reparameterised.

    :raises ModelError: when used with discrete latents, or with a guide whose draws are not
        differentiable.

    Reference: Bao et al., *Bi-level score matching for learning energy-based latent variable
    models*, NeurIPS 2020.

    **Example**

    >>> import numpyro_ebm as ebm
    >>> ebm.PosteriorScore()
    PosteriorScore()
    """

    can_infer_discrete = False

    def rows(
        self, rng_key: jax.Array, params: Params, guide_params: Params, problem: Any
    ) -> jax.Array:
        """The loss of every row, of shape (rows,)."""
        row_model, guide = problem.row_model, problem.guide
        visible, _ = row_model.constrain(problem.unconstrained)
        guide_trace = guide.trace(rng_key, guide_params, visible)
        for name in row_model.latent:
            if not guide_trace[name]["fn"].has_rsample:
                raise ModelError(
                    f"PosteriorScore: the guide's draws of '{name}' are not differentiable in its "
                    "parameters. Use a reparameterised distribution, or another guide loss."
                )
        latent = {name: guide_trace[name]["value"] for name in row_model.latent}

        def log_ratio(latent):
            log_q = guide.log_density(guide_params, visible, latent)
            return jnp.sum(log_q - row_model.log_density(params, {**visible, **latent}))

        total = jnp.zeros(row_model.num_rows)
        for name, gradient in jax.grad(log_ratio)(latent).items():
            event_dim = row_model.latent[name].event_dim
            square = jnp.sum(gradient**2, tuple(range(-event_dim, 0)))
            total = total + 0.5 * row_model.sum_to_rows(square)
        return total

    def __repr__(self):
        return "PosteriorScore()"


def default_guide_loss(problem: Any) -> Any:
    """The guide loss for the latent sites at hand.

    ``Trace_ELBO`` for continuous latents, ``RelaxedELBO`` for Bernoulli ones, and NumPyro's
    score-function estimator ``TraceGraph_ELBO`` for other discrete latents, where ``Trace_ELBO``
    would drop part of the gradient.
    """
    row_model, guide = problem.row_model, problem.guide
    if not any(site.is_discrete for site in row_model.latent.values()):
        return Trace_ELBO()
    guide_trace = guide.trace(default_key(), {}, row_model.visible_values)
    if all(isinstance(unwrap(guide_trace[name]["fn"]), _BERNOULLI) for name in row_model.latent):
        return RelaxedELBO()
    return TraceGraph_ELBO()


def row_guide_loss(
    guide_loss: Any,
    rng_key: jax.Array,
    params: Params,
    guide_params: Params,
    problem: Any,
    guide: Model,
) -> jax.Array:
    """A guide loss at the visible values of a problem, as a mean over rows.

    :param guide_loss: a NumPyro ELBO, or an object with a ``rows`` method.
    :param rng_key: random key.
    :param dict params: the model's parameters, constants here.
    :param dict guide_params: the guide's parameters.
    :param Problem problem: the batch, as the objective uses it.
    :param guide: the guide itself.
    """
    row_model, weights = problem.row_model, problem.row_weights
    guide_params = {**params, **guide_params}  # a guide may use parameters of the model
    if hasattr(guide_loss, "rows"):
        rows = guide_loss.rows(rng_key, params, guide_params, problem)
        return row_model.mean(rows if weights is None else weights * rows)
    visible, _ = row_model.constrain(stop_gradient(problem.unconstrained))
    if row_model.row_weights is not None:
        weights = row_model.row_weights * (1.0 if weights is None else weights)
    if weights is not None and isinstance(guide_loss, TraceGraph_ELBO):
        # Its score-function term is a product of two scaled log-densities of a row. For the same
        # reason the mean over rows is taken below, and not by a scale of 1/rows.
        weights = jnp.sqrt(weights)
    weights = 1.0 if weights is None else weights

    def handled(fn):
        return _scale_rows(fn, row_model, weights)

    # Parameters with priors are constants here, which no guide for h has to draw.
    theta = {name: params[name] for name in row_model.priors}
    model = handled(substitute_and_block(row_model.substituted({**params, **visible}), theta))
    guide = handled(set_visible(substitute(guide, data=row_model.plates), visible))
    total = guide_loss.loss(
        rng_key, guide_params, model, guide, *row_model.args, **row_model.kwargs
    )
    return total / row_model.num_rows


_BERNOULLI = (dist.BernoulliLogits, dist.BernoulliProbs)


def check_guide_loss(owner: str, guide_loss: Any) -> None:
    """Raise :class:`ModelError` unless it is a loss of guides as below, or ``None``."""
    known = hasattr(guide_loss, "rows") or hasattr(guide_loss, "loss")
    known = known and not hasattr(guide_loss, "energy_loss")  # an objective, of the energy
    if guide_loss is not None and not known:
        raise ModelError(
            f"{owner}: `guide_loss` must be a NumPyro ELBO, `RelaxedELBO` or `PosteriorScore`, got "
            f"{guide_loss!r}."
        )


class _relax_bernoulli(Messenger):
    """Draw relaxed values at the Bernoulli sites of a guide."""

    def __init__(self, temperature):
        self.temperature = temperature
        super().__init__()

    def process_message(self, msg):
        if msg["type"] != "sample" or msg["value"] is not None:
            return
        fn = unwrap(msg["fn"])
        if isinstance(fn, _BERNOULLI):
            msg["infer"] = {**msg["infer"], "relaxed": (msg["name"],)}
            shape = msg["fn"].shape()
            noise = jax.random.logistic(msg["kwargs"]["rng_key"], shape)
            msg["value"] = jax.nn.sigmoid((jnp.asarray(fn.logits) + noise) / self.temperature)


class _scale_rows(Messenger):
    """Scale the log-densities of the sites in the data plate, row by row.

    Where the rows of the model have weights, these are among the scales, and take the place of the
    user's own handlers around model and guide. Sites that are observed in part are completed.
    """

    def __init__(self, fn, row_model, scale):
        self.row_model, self.row_scale = row_model, scale
        super().__init__(fn)

    def process_message(self, msg):
        row_model = self.row_model
        if msg["type"] != "sample" or row_model.plate not in plates_of(msg):
            return
        is_masked = any(not isinstance(x, bool) for x in masks_of(msg["fn"]))
        if is_masked and msg["name"] in row_model.obs_masked:
            msg["fn"] = Completed(msg["fn"])
        scale = self.row_scale
        if jnp.ndim(scale):
            scale = jnp.reshape(scale, (-1,) + (1,) * (-row_model.dim - 1))
        if row_model.row_weights is not None:
            msg["scale"] = scale * row_model.scale_of_plates(msg)
        else:
            scale = scale * row_model.num_rows / row_model.total_rows
            msg["scale"] = scale if msg["scale"] is None else scale * msg["scale"]
