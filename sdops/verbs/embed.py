"""Everything about embeddings: `sdops.embed.inspect("style.pt")`, and so on, one function per subcommand."""

from __future__ import annotations

from sdops.verbs._embed_convert import convert
from sdops.verbs._embed_inspect import inspect

__all__ = ["convert", "inspect"]
