"""Everything about embeddings, one function per subcommand. All return a Report.

Printed it is what the command shows; its `data` holds the facts.

    sdops.embed.inspect("style.pt", "other.pt", model="sd15.safetensors")
    sdops.embed.convert("style.pt", to="diffusers", output="style.safetensors")
    sdops.embed.make("0.7*painting + 0.3*ink - photo", model="sd15.safetensors", output="ink.pt")
    sdops.embed.explain("ink.pt", model="sd15.safetensors")
    sdops.embed.merge("style.pt", "ink.pt", mode="join", output="both.pt")
"""

from __future__ import annotations

from sdops.verbs._embed_convert import convert
from sdops.verbs._embed_explain import explain
from sdops.verbs._embed_inspect import inspect
from sdops.verbs._embed_make import make
from sdops.verbs._embed_merge import merge

__all__ = ["convert", "explain", "inspect", "make", "merge"]
