"""NovelAI's hypernetworks: {768: [keys, values], ...} with `linear1` and `linear2`: two linear layers, no settings.

Early files of AUTOMATIC1111 have the same names, with `step` and `name` beside them.
"""

from __future__ import annotations

import re

from sdops.core.tree import Saved
from sdops.errors import MismatchError
from sdops.hypernetworks._numbered import names_in, network, tree
from sdops.hypernetworks._types import Network, Written

ENDING, CONTAINER = ".pt", "torch"
_NAME = re.compile(r"linear(?P<index>\d+)\.(?P<part>weight|bias)")


def sniff(saved: Saved) -> bool:
    """Widths, and names of that kind."""
    names = names_in(saved)
    return bool(names) and all(_NAME.fullmatch(name) for name in names)


def read(saved: Saved) -> Network:
    """Layers counted from 1."""
    return network(saved, "novelai", _NAME, 1)


def write(network: Network) -> Written:
    """The same names.

    Raises:
        MismatchError: it is not two linear layers and nothing else.
    """
    places = {tuple(layer.index for layer in chain) for pair in network.pairs.values() for chain in pair}
    if places != {(0, 1)} or not network.is_linear:
        raise MismatchError(
            f"`novelai` files hold two linear layers, `{network.name}` is built in another way",
            hint="`--to a1111` holds it",
        )
    return Written(tree(network, "linear{}.{}", 1, network.settings))
