"""A linear hypernetwork baked into diffusers' UNet against the same UNet with the network hooked in."""

from __future__ import annotations

import pytest


def test_the_baked_unet_is_the_hooked_one_to_a_millionth(tmp_path, capsys):
    pytest.importorskip("diffusers")
    from tools.oracles.hypernetworks import check_baked

    check_baked(tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("baked from hooked, both in float32") == 3
    assert printed.count("what float32 loses without baking") == 3
