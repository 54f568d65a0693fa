# SPDX-License-Identifier: Apache-2.0
"""The manual has all that is public, and says the same everywhere."""

import importlib.util
import inspect
from pathlib import Path

import pytest

import numpyro_ebm as ebm

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs/_ext/reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_has_one_page(reference):
    listed = reference.objects()
    assert sorted(listed) == sorted(set(listed))
    modules = {name for name in ebm.__all__ if inspect.ismodule(getattr(ebm, name))}
    absent = set(ebm.__all__) - modules - set(listed)
    assert not absent, f"write them into a group of docs/_ext/reference.py: {absent}"
    for name in listed:
        found = reference.find(name)
        assert inspect.getdoc(found) or not callable(found), name


def test_pages_show_no_member_that_is_not_there(reference):
    assert set(reference.MEMBERS) <= set(reference.objects())
    for name, members in reference.MEMBERS.items():
        for member in filter(None, members.split(", ")):
            assert hasattr(reference.find(name), member), f"{name}.{member}"
