"""What `import sdops` offers and what it does not cost."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sdops


@pytest.mark.parametrize("name", [name for name in dir(sdops) if name != "__version__"])
def test_every_public_name_resolves_and_is_documented(name):
    assert getattr(sdops, name).__doc__


def test_unknown_names_fail_as_usual():
    with pytest.raises(AttributeError, match="module 'sdops' has no attribute 'mrege'"):
        _ = sdops.mrege


def test_importing_it_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import sdops; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    new = {name.partition(".")[0] for name in done.stdout.split()}
    assert new - sys.stdlib_module_names == {"sdops"}
    assert "sdops.errors" not in done.stdout.split()
