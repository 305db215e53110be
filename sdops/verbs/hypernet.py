"""Everything about hypernetworks, one function per subcommand. All return a Report.

Printed it is what the command shows; its `data` holds the facts.

    sdops.hypernet.inspect("style.pt", effect=True)
    sdops.hypernet.convert("style.pt", to="safetensors", output="style.safetensors")
    sdops.hypernet.merge("style.pt", "other.pt", weights=[0.7, 0.3], output="both.pt")
    sdops.hypernet.apply("sd15.safetensors", "style.pt:0.8", output="styled.safetensors")
    sdops.hypernet.to_lora("style.pt", model="sd15.safetensors", rank=16, output="lora.safetensors")
"""

from __future__ import annotations

from sdops.verbs._hypernet_apply import apply
from sdops.verbs._hypernet_convert import convert
from sdops.verbs._hypernet_inspect import inspect
from sdops.verbs._hypernet_lora import to_lora
from sdops.verbs._hypernet_merge import merge

__all__ = ["apply", "convert", "inspect", "merge", "to_lora"]
