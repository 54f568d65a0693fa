# SPDX-License-Identifier: Apache-2.0
r"""Flow contrastive estimation: noise contrast against a flow that learns to deceive.

.. math:: \min_{θ, \log Z} \max_{α}\ E_{\text{data}}\,\mathrm{softplus}(-G) + ν\,E_{q_α}
    \mathrm{softplus}(G), \qquad G = \log\tilde p(v; θ) - \log Z - \log ν - \log q_α(v)

The energy tells the data from draws of a flow q_α, the flow moves towards what the energy cannot
tell apart. So the noise comes close to the data by itself, where fixed noise leaves the loss of NCE
flat. Both come back usable: the energy with its log Z, and the flow, which draws at once.

Reference: Gao, Nijkamp, Kingma, Xu, Dai, Wu, *Flow contrastive estimation of energy-based models*,
CVPR 2020.
"""

from typing import Any

import jax
import numpyro.distributions as dist
from jax.lax import stop_gradient

from numpyro_ebm.errors import ModelError, check_integer, check_not_negative
from numpyro_ebm.marginals.base import Marginal
from numpyro_ebm.model.noise import Noise
from numpyro_ebm.model.row_model import RowModel
from numpyro_ebm.objectives.base import AuxiliaryNetwork
from numpyro_ebm.objectives.nce import NCE
from numpyro_ebm.types import Optimizer

__all__ = ["FlowContrastive"]


class FlowContrastive(NCE):
    r"""Flow contrastive estimation (FCE).

    The energy minimises the loss of NCE with the flow as its noise; the flow maximises it, through
    its draws and through its density, in ``num_flow_steps`` steps of its own each round.

    :param flow: q_α, with parameters: a NumPyro function which declares them and returns a
        distribution, a NumPyro distribution whose arrays are to be trained, a list of NumPyro
        transforms of a standard Normal, or a flowjax flow. Its draws must be differentiable.
    :param int noise_ratio: ν, draws of the flow for each row.
    :param marginal: how latent sites are integrated out, by a marginal with exact values or
        by :class:`~numpyro_ebm.ImportanceBound`.
    :param float init_log_normalizer: as for :class:`NCE`.
    :param flow_optim: optimiser of the flow; a copy of the energy's if ``None``.
    :param int num_flow_steps: its steps in each round.
    :param float likelihood_weight: weight of the flow's own negative log-likelihood in its loss.
        Zero is the method of the paper, for a flow that was fitted before; with a positive weight a
        fresh flow finds the data by itself and need not be.
    :raises ModelError: as for :class:`NCE`; and if the flow has no parameters, or draws that cannot
        be differentiated.

    The trained flow is ``objective.noise_distribution(fit.params, model, data)``.

    Reference: Gao et al., CVPR 2020.

    **Example**

    >>> import jax, numpyro, optax
    >>> import numpyro.distributions as dist
    >>> import numpyro_ebm as ebm
    >>> def gaussian(data):
    ...     precision = numpyro.param("precision", 1.0, constraint=dist.constraints.positive)
    ...     with numpyro.plate("data", len(data)):
    ...         v = numpyro.sample("v", ebm.Lebesgue(), obs=data)
    ...         ebm.energy("E", 0.5 * precision * v**2)
    >>> def flow():
    ...     loc = numpyro.param("loc", 1.0)
    ...     scale = numpyro.param("flow_scale", 2.0, constraint=dist.constraints.positive)
    ...     return dist.Normal(loc, scale)
    >>> data = 0.5 * jax.random.normal(jax.random.key(0), (5_000,))
    >>> objective = ebm.FlowContrastive(flow)
    >>> svi = ebm.EnergySVI(gaussian, None, optax.adam(0.03), objective)
    >>> fit = svi.run(jax.random.key(1), 1_000, data, batch_size=500, progress_bar=False)
    >>> trained = objective.noise_distribution(fit.params, gaussian, data)
    >>> bool(abs(trained.scale - 0.5) < 0.05), bool(abs(fit.params["precision"] - 4.0) < 0.4)
    (True, True)
    """

    noise_name = "flow"

    def __init__(
        self,
        flow: Any,
        noise_ratio: int = 1,
        marginal: Marginal | None = None,
        *,
        init_log_normalizer: float | None = None,
        flow_optim: Optimizer | None = None,
        num_flow_steps: int = 1,
        likelihood_weight: float = 0.0,
    ):
        check_integer("FlowContrastive", num_flow_steps=num_flow_steps)
        check_not_negative("FlowContrastive", likelihood_weight=likelihood_weight)
        super().__init__(flow, noise_ratio, marginal, init_log_normalizer=init_log_normalizer)
        self.likelihood_weight = likelihood_weight
        self.networks = (
            AuxiliaryNetwork(
                "flow", self._flow_parameters, self._flow_loss, flow_optim, num_flow_steps
            ),
        )

    def read_noise(self, row_model: RowModel) -> Noise:
        return Noise(self.noise, row_model, "flow", trainable=True)

    def _flow_parameters(self, rng_key, problem):
        flow = self.read_noise(problem.row_model)
        found = flow.parameters(rng_key)
        if not found:
            raise ModelError(
                "FlowContrastive: the flow has no parameters to train. Declare them with "
                "`numpyro.param` in a function that returns the distribution, or use NCE."
            )
        values = {name: value for name, (value, _) in found.items()}
        for site, fn in flow.site_distributions(values).items():
            if isinstance(fn, dist.Distribution) and not fn.has_rsample:
                raise ModelError(
                    f"FlowContrastive: the flow's draws ('{site}', {type(fn).__name__}) are not "
                    "differentiable in its parameters. Use a reparameterised distribution or "
                    "transforms of one."
                )
        return found

    def _flow_loss(self, rng_key, params, own, problem):
        key_draw, key_data, key_noise = jax.random.split(rng_key, 3)
        flow = self.read_noise(problem.row_model)
        params = {**stop_gradient(params), **own}
        draws = flow.draw(key_draw, own, self.noise_ratio)
        log_model, log_flow = self.densities(params, problem, flow, draws, key_data, key_noise)
        contrast = log_model - log_flow
        rows = self._rows(params, contrast[0], contrast[1:])
        loss = -problem.row_model.mean(rows)
        if self.likelihood_weight:
            loss = loss - self.likelihood_weight * problem.row_model.mean(log_flow[0])
        return loss
