"""Everything about custom diffusion, one function per subcommand. All return a Report.

Printed it is what the command shows; its `data` holds the facts.

    sdops.custom.inspect("delta.bin", model="sd15.safetensors")
    sdops.custom.convert("delta.bin", to="compvis", output="delta.ckpt")
    sdops.custom.apply("sd15.safetensors", "delta.bin:0.8", output="cat.safetensors")
    sdops.custom.to_lora("delta.bin", model="sd15.safetensors", rank=16, output="lora.safetensors")
    sdops.custom.merge("delta.bin", model="sd15.safetensors", classes=["cat"], output="merged.safetensors")
"""

from __future__ import annotations

from sdops.verbs._custom_apply import apply, to_lora
from sdops.verbs._custom_convert import convert
from sdops.verbs._custom_inspect import inspect
from sdops.verbs._custom_merge import merge

__all__ = ["apply", "convert", "inspect", "merge", "to_lora"]
