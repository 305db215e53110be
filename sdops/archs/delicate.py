"""Weights that must not be rounded coarsely, to 8 bits or fewer: by name, in any layout.

Those at the ends of a model, where all that follows depends on few numbers, and the embeddings of time, position
and text. The names are those that diffusers' layerwise casting, ComfyUI's and kohya's fp8 and ComfyUI-GGUF leave alone.
"""

from __future__ import annotations

import re

from sdops.core.spec import Spec

_NAMES = re.compile(
    r"(?:^|[._])(?:"
    r"(?<!\d\.)proj_in|(?<!\d\.)proj_out"  # of the model, not of a block
    r"|img_in|txt_in|time_in|vector_in|guidance_in|distilled_guidance_layer|final_layer"  # Flux, Chroma
    r"|head|img_emb"  # Wan
    r"|x_embedder|y_embedder|t_embedder|context_embedder|cap_embedder|condition_embedder"  # other DiTs
    r"|pos_embed|patch_embed\w*"
    r"|time_embed\w*|time_text_embed|label_emb|add_embedding|scale_shift_table|time_projection|text_embedding"
    r"|conv_in|conv_out|input_blocks\.0\.0|out\.2|norm_out"  # UNets, VAEs
    r"|\w*embeddings?|embed_tokens|shared|relative_attention_bias"  # text encoders
    r")(?:\.|$)"
)
_IN_BLOCK = re.compile(r"\.\d+\.")


def is_coarse(name: str, spec: Spec) -> bool:
    """Whether a tensor is what fp8 and blocks of 4 to 8 bits are made for: the matrix of a linear layer in a block.

    Args:
        name: Without prefix, in any layout.
        spec: Its dtype and shape.
    """
    is_matrix = len(spec.shape) == 2 and name.endswith((".weight", "in_proj_weight"))
    return is_matrix and _IN_BLOCK.search(name) is not None and not _NAMES.search(name)
