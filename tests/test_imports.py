# SPDX-License-Identifier: Apache-2.0
"""What `import numpyro_ebm` loads, and that every name is there all the same."""

import inspect
import subprocess
import sys

import pytest

import numpyro_ebm as ebm

LATER = ("numpyro_ebm.diagnostics", "numpyro_ebm.posteriors", "scipy.stats", "xarray", "pandas")
LATER += ("funsor", "matplotlib", "arviz", "equinox", "flax", "tqdm.auto")


def test_what_is_not_needed_yet_is_imported_when_it_is():
    code = f"import numpyro, blackjax, sys; before = set(sys.modules); import numpyro_ebm as ebm; \
        print({{*{LATER}}} & (set(sys.modules) - before)); ebm.normalized; \
        print('numpyro_ebm.posteriors' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["set()", "True"], run.stdout


def test_every_name_is_an_attribute_and_listed():
    everything = {}
    exec("from numpyro_ebm import *", everything)
    for name in ebm.__all__:
        assert getattr(ebm, name) is everything[name]
        assert name in dir(ebm)
        assert inspect.ismodule(everything[name]) or everything[name].__doc__
    assert ebm.posteriors.normalized is ebm.normalized


def test_a_misspelt_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="normalised"):
        ebm.normalised  # noqa: B018
