# SPDX-License-Identifier: Apache-2.0
"""Public names of NumPyro that are no tools on a model, and why; see `numpyro_tools.py`."""

BASE = "a base class"
MODULE = "a module; its names are here or in `numpyro_tools.py`"
RUNS = "runs a tool; part of the laws of those"
PART = "a part of the other names of its module"
READS = "tells which site depends on which; the sites of a route are those of its docstring"
IN_MODEL = "a part of models"
OF_STEIN = "an option of `SteinVI`, which sees particles and no density"

NOT_TOOLS = {
    "ELBO": BASE,
    "MCMC": RUNS,
    "SVI": RUNS,
    "autoguide": MODULE,
    "calibration": MODULE,
    "vsbc_diagnostic": "draws data of the model, which only `numpyro_ebm.sample` can; refused",
    "AutoGuide": BASE,
    "AutoContinuous": BASE,
    "Reparam": BASE,
    "get_dependencies": READS,
    "get_model_relations": READS,
    "render_model": READS,
    "contrib.funsor.config_enumerate": "marks sites; part of the law of `log_density`",
    "contrib.funsor.config_kl": "asks for closed forms of KL divergences, which energies lack",
    "contrib.funsor.enum": "a handler; part of the law of `log_density`",
    "contrib.funsor.infer_config": "the handler of that name",
    "contrib.funsor.markov": IN_MODEL,
    "contrib.funsor.plate": IN_MODEL,
    "contrib.funsor.plate_to_enum_plate": PART,
    "contrib.funsor.to_data": PART,
    "contrib.funsor.to_funsor": PART,
    "contrib.funsor.trace": PART,
    "contrib.einstein.GraphicalKernel": OF_STEIN,
    "contrib.einstein.IMQKernel": OF_STEIN,
    "contrib.einstein.LinearKernel": OF_STEIN,
    "contrib.einstein.MixtureKernel": OF_STEIN,
    "contrib.einstein.ProbabilityProductKernel": OF_STEIN,
    "contrib.einstein.RBFKernel": OF_STEIN,
    "contrib.einstein.RandomFeatureKernel": OF_STEIN,
    "contrib.einstein.SteinLoss": PART,
    "contrib.einstein.MixtureGuidePredictive": "draws of the guides of `SteinVI`, without a model",
    "contrib.stochastic_support.DCC": "for models whose sites change from run to run",
    "contrib.stochastic_support.SDVI": "for models whose sites change from run to run",
    "contrib.ecs_proxies.TaylorOneProxyState": PART,
    "contrib.ecs_proxies.TaylorTwoProxyState": PART,
    "contrib.ecs_proxies.block_update": PART,
    "contrib.ecs_proxies.perturbed_method": PART,
    "contrib.ecs_proxies.taylor_proxy": "`HMCECS, taylor_proxy`",
    "contrib.module": "states networks; a part of models",
    "contrib.hsgp": "Gaussian processes; a part of models",
    "contrib.render": READS,
    "contrib.nested_sampling": "needs `jaxns`, which the tests do not install; not tried",
    "contrib.tfp": "distributions and kernels of another library; not tried",
}
"""By name; of whole modules too. Names of contributed modules begin with `contrib.`."""
