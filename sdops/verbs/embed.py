"""Everything about embeddings: `sdops.embed.inspect("style.pt")`, and so on, one function per subcommand."""

from __future__ import annotations

from sdops.verbs._embed_convert import convert
from sdops.verbs._embed_explain import explain
from sdops.verbs._embed_inspect import inspect
from sdops.verbs._embed_make import make
from sdops.verbs._embed_merge import merge

__all__ = ["convert", "explain", "inspect", "make", "merge"]
