"""AUTOMATIC1111's hypernetworks: {768: (keys, values), 320: ..., `step`, `layer_structure`, `activation_func` ...}.

The state dicts have `linear.{j}.weight` and `.bias`, j counted over linear layers, activations, norms and dropout.
"""

from __future__ import annotations

import re

from sdops.core.tree import Saved
from sdops.hypernetworks._numbered import names_in, network, tree
from sdops.hypernetworks._types import Network, Written

ENDING, CONTAINER = ".pt", "torch"
_NAME = re.compile(r"linear\.(?P<index>\d+)\.(?P<part>weight|bias)")


def sniff(saved: Saved) -> bool:
    """Widths, and names of that kind."""
    return any(_NAME.fullmatch(name) for name in names_in(saved))


def read(saved: Saved) -> Network:
    """All layers and settings."""
    return network(saved, "a1111", _NAME, 0)


def write(network: Network) -> Written:
    """As the web UI saves it; what a NovelAI file does not say is what the web UI takes for granted."""
    return Written(tree(network, "linear.{}.{}", 0, network.settings))
