"""Everything about hypernetworks: `sdops.hypernet.inspect("style.pt")`, and so on, one function per subcommand."""

from __future__ import annotations

from sdops.verbs._hypernet_apply import apply
from sdops.verbs._hypernet_convert import convert
from sdops.verbs._hypernet_inspect import inspect
from sdops.verbs._hypernet_lora import to_lora
from sdops.verbs._hypernet_merge import merge

__all__ = ["apply", "convert", "inspect", "merge", "to_lora"]
