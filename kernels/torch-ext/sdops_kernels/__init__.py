"""Kernels for weights of diffusion models: merging, baking LoRAs, factoring, training; see README.md.

Everything works without a GPU and without Triton too, by torch functions that give the same results.
"""

from . import reference
from .bake import Bake, bake
from .changes import Change, Dense, LoHa, LoKr, LoRA, gain_of
from .dora import dora_gains
from .inner_products import inner_products
from .linear_merge import LinearMerge, Merged, linear_merge
from .lora_linear import Choices, lora_linear
from .low_rank import Factors, low_rank, singular_factors
from .sparse_merge import SparseMerge, sparse_merge

__all__ = [
    "Bake",
    "Change",
    "Choices",
    "Dense",
    "Factors",
    "LinearMerge",
    "LoHa",
    "LoKr",
    "LoRA",
    "Merged",
    "SparseMerge",
    "bake",
    "dora_gains",
    "gain_of",
    "inner_products",
    "linear_merge",
    "lora_linear",
    "low_rank",
    "reference",
    "singular_factors",
    "sparse_merge",
]
