"""Weights that must not be rounded coarsely, to 8 bits or fewer: by name, in any layout.

Those at the ends of a model, where all that follows depends on few numbers, and the embeddings of time, position
and text. The names are those that diffusers' layerwise casting, ComfyUI's and kohya's fp8 and ComfyUI-GGUF leave alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from sdops.core.spec import Spec

_NAMES = re.compile(
    r"(?:^|[._])(?:"
    r"(?<!\d\.)proj_in|(?<!\d\.)proj_out"  # of the model, not of a block
    r"|img_in|txt_in|time_in|vector_in|guidance_in|final_layer|head"  # Flux, Chroma, Wan
    r"|x_embedder|y_embedder|t_embedder|context_embedder|cap_embedder|condition_embedder"  # other DiTs
    r"|pos_embed|patch_embed\w*"
    r"|time_embed\w*|time_text_embed|label_emb|add_embedding|scale_shift_table|time_projection|text_embedding"
    r"|conv_in|conv_out|input_blocks\.0\.0|out\.2|norm_out"  # UNets, VAEs
    r"|\w*embeddings?|embed_tokens|shared|relative_attention_bias"  # text encoders
    r")(?:\.|$)"
)


def coarse(specs: Mapping[str, Spec]) -> list[str]:
    """Matrices of linear layers that are not delicate: what fp8 and blocks of 4 to 8 bits are made for."""
    return [
        key
        for key, spec in specs.items()
        if spec.is_float and len(spec.shape) == 2 and key.endswith(".weight") and not _NAMES.search(key)
    ]
