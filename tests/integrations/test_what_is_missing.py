"""An integration whose framework is not installed says what to install."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize("name", ["keras", "lightning", "transformers", "ignite"])
def test_a_missing_framework_is_an_import_error_that_names_the_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"asynccb.integrations.{name}"
    for imported in [found for found in sys.modules if found.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, imported)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'asynccb\[{name}\]'"):
        importlib.import_module(module)
