"""Everything about custom diffusion: `sdops.custom.inspect("delta.bin")`, and so on, one function per subcommand."""

from __future__ import annotations

from sdops.verbs._custom_apply import apply, to_lora
from sdops.verbs._custom_convert import convert
from sdops.verbs._custom_inspect import inspect
from sdops.verbs._custom_merge import merge

__all__ = ["apply", "convert", "inspect", "merge", "to_lora"]
