# SPDX-License-Identifier: Apache-2.0
"""Results print on a few lines, whatever is in them."""

import jax
import jax.numpy as jnp
import pytest

import numpyro_ebm as ebm
from numpyro_ebm import diagnostics, log_normalizers, posteriors
from numpyro_ebm.printed import brief

FOLDERS = [ebm, diagnostics, log_normalizers, posteriors]
RESULTS = {
    found.__name__: found
    for folder in FOLDERS
    for found in vars(folder).values()
    if isinstance(found, type) and issubclass(found, tuple)
}
OTHERWISE = {
    "AuxiliaryAdequacy",  # has a `str` of several lines
    "AuxiliaryTrace",  # part of a state
}


@pytest.mark.parametrize("name", sorted(RESULTS.keys() - OTHERWISE))
def test_results_print_in_brief(name):
    cls = RESULTS[name]
    assert cls.__repr__ is brief
    words = repr(cls(*[jnp.full((100, 3), 1.0)] * len(cls._fields)))
    assert words.count("<array (100, 3)>") == len(cls._fields)


def test_numbers_are_printed_and_shapes_of_programs_kept():
    found = log_normalizers.LogNormalizer(
        jnp.array(0.123456), jnp.inf, jnp.arange(3), "ais", diagnostics={"n": 2}
    )
    assert repr(found) == (
        "LogNormalizer(value=0.1235, mcse=inf, ess=[0, 1, 2], method='ais', bias='unknown', "
        "diagnostics={'n': 2})"
    )
    shapes = found._replace(value=jax.ShapeDtypeStruct((2, 3), float))
    assert "shape=(2, 3)" in repr(shapes)
