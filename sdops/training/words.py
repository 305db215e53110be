"""New words: n vectors each beside a vocabulary that is never touched.

    out = W[id]           for the vocabulary's own tokens, id < V
    out = vectors[id - V] for new ones

Only `vectors` learns. To make the whole table learn and to restore it after each step, as others do, costs 600 MB and
0.4 s per step with CLIP-L, and weight decay still moves rows that nobody asked for (huggingface/diffusers#507).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Words(nn.Module):
    """Takes the place of an encoder's table of words.

    Args:
        table: The module that it replaces.

    Attributes:
        weight: The vocabulary [V, d]; read, never written.
    """

    weight: Tensor

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.weight = table.weight
        self._vectors: Tensor | None = None

    @property
    def size(self) -> int:
        """V."""
        return len(self.weight)

    @property
    def usual_norm(self) -> float:
        """Median length of the vocabulary's vectors."""
        return float(torch.linalg.vector_norm(self.weight.detach().float(), dim=1).median())

    def use(self, vectors: Tensor | None) -> None:
        """Vectors [n, d] of the new tokens V .. V + n - 1; None takes them away."""
        self._vectors = vectors

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors of tokens, [..., d]."""
        known = functional.embedding(ids.clamp(max=self.size - 1), self.weight)
        if self._vectors is None:
            return known
        new = functional.embedding((ids - self.size).clamp(min=0), self._vectors.to(known.dtype))
        return torch.where((ids >= self.size).unsqueeze(-1), new, known)
