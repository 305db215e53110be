"""The ends of tensor names: what part of which adapter family a tensor is. One table for all dialects.

A name is STEM + SUFFIX. The longest suffix that fits counts; the stem is the dialect's business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Parts that several families have; they go to the family that the stem's other parts tell.
SHARED = "any"

# Suffix -> family, part. Sources: kohya sd-scripts, LyCORIS, diffusers, PEFT, ComfyUI, XLabs, BFL, OneTrainer.
_READ: dict[str, tuple[str, str]] = {
    # kohya, LyCORIS, OneTrainer, ComfyUI
    ".lora_up.weight": ("lora", "up"),
    ".lora_down.weight": ("lora", "down"),
    ".lora_mid.weight": ("lora", "mid"),
    ".reshape_weight": (SHARED, "reshape"),
    ".alpha": (SHARED, "lora_alpha"),
    ".dora_scale": (SHARED, "dora_scale"),
    # PEFT, diffusers; `lora_A` and its kin may carry an adapter's name, see _PEFT
    ".lora_magnitude_vector": (SHARED, "magnitude"),
    ".magnitude": (SHARED, "magnitude"),  # ai-toolkit
    # diffusers of 2023
    ".lora.up.weight": ("lora", "up"),
    ".lora.down.weight": ("lora", "down"),
    "_lora.up.weight": ("lora", "up"),
    "_lora.down.weight": ("lora", "down"),
    ".lora_linear_layer.up.weight": ("lora", "up"),
    ".lora_linear_layer.down.weight": ("lora", "down"),
    # XLabs
    ".up.weight": ("lora", "up"),
    ".down.weight": ("lora", "down"),
    # cloneofsimo
    ":up": ("lora", "up"),
    ":down": ("lora", "down"),
    # LyCORIS
    ".hada_w1_a": ("loha", "w1_a"),
    ".hada_w1_b": ("loha", "w1_b"),
    ".hada_w2_a": ("loha", "w2_a"),
    ".hada_w2_b": ("loha", "w2_b"),
    ".hada_t1": ("loha", "t1"),
    ".hada_t2": ("loha", "t2"),
    ".lokr_w1": ("lokr", "w1"),
    ".lokr_w1_a": ("lokr", "w1_a"),
    ".lokr_w1_b": ("lokr", "w1_b"),
    ".lokr_w2": ("lokr", "w2"),
    ".lokr_w2_a": ("lokr", "w2_a"),
    ".lokr_w2_b": ("lokr", "w2_b"),
    ".lokr_t2": ("lokr", "t2"),
    ".a1.weight": ("glora", "a1"),
    ".a2.weight": ("glora", "a2"),
    ".b1.weight": ("glora", "b1"),
    ".b2.weight": ("glora", "b2"),
    ".bm.weight": ("glora", "bm"),
    ".bias_indices": ("lora", "sparse_indices"),
    ".bias_values": ("lora", "sparse_values"),
    ".bias_size": ("lora", "sparse_size"),
    ".on_input": ("ia3", "on_input"),
    ".weight": ("ia3", "weight"),
    ".oft_blocks": ("oft", "blocks"),  # or boft: told by the number of dimensions
    ".rescale": ("oft", "rescale"),
    ".oft_R.weight": ("oft", "vectors"),
    ".oft_R.scaled_oft": ("oft", "scaled"),
    ".p_layer.weight": ("tlora", "p_layer"),
    ".q_layer.weight": ("tlora", "q_layer"),
    ".lambda_layer": ("tlora", "lambda_layer"),
    ".diff": ("full", "diff"),
    ".diff_b": ("full", "diff_b"),
    ".w_norm": ("full", "diff"),
    ".b_norm": ("full", "diff_b"),
    ".set_weight": ("full", "set"),
    ".scale": ("full", "set"),  # of BFL's control files, for the norms of queries and keys alone
}
# A converter that people used glued the suffix to the stem with an underscore.
_GLUED: dict[str, tuple[str, str]] = {"_lora_up.weight": ("lora", "up"), "_lora_down.weight": ("lora", "down")}
_PEFT = re.compile(
    r"\.(?P<letter>lora_A|lora_B|lora_magnitude_vector|lora_embedding_A|lora_embedding_B|ia3_l)(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?:\.(?P<end>weight|bias))?$"
)
_PEFT_PARTS = {
    ("lora_A", "weight"): ("lora", "down"),
    ("lora_B", "weight"): ("lora", "up"),
    ("lora_B", "bias"): ("lora", "up_bias"),
    ("lora_magnitude_vector", "weight"): (SHARED, "magnitude"),
    ("lora_embedding_A", "weight"): ("lora_embedding", "a"),
    ("lora_embedding_B", "weight"): ("lora_embedding", "b"),
    ("ia3_l", "weight"): ("ia3", "multiplier"),
}
_LONGEST_FIRST = sorted(_READ | _GLUED, key=lambda suffix: -len(suffix))
_BY_END = {
    end: [s for s in _LONGEST_FIRST if s.endswith(end)] for end in {re.split(r"[._:]", s)[-1] for s in _LONGEST_FIRST}
}


@dataclass(frozen=True, slots=True)
class Split:
    """A tensor name taken apart.

    Attributes:
        stem: What comes before the suffix.
        family: Name on the adapters shelf, or SHARED.
        part: As the family calls it.
        adapter: The adapter's name within a PEFT file, mostly `default` or none.
        repaired: Whether the name had to be repaired.
    """

    stem: str
    family: str
    part: str
    adapter: str = ""
    repaired: bool = False


def split(key: str) -> Split | None:
    """Take a name apart; None if it ends in nothing that adapters use."""
    if peft := _PEFT.search(key):
        found = _PEFT_PARTS.get((peft["letter"], peft["end"] or "weight"))
        return None if found is None else Split(key[: peft.start()], *found, adapter=peft["adapter"] or "")
    last = re.split(r"[._:]", key)[-1]
    for suffix in _BY_END.get(last, ()):
        if key.endswith(suffix) and len(key) > len(suffix):
            stem = key[: -len(suffix)]
            if suffix == ".scale" and not stem.endswith("_norm"):
                return None
            return Split(stem, *(_READ | _GLUED)[suffix], repaired=suffix in _GLUED)
    return None


# Family, part -> suffix, as files of LyCORIS, kohya and ComfyUI have them. A dialect that differs overrides.
LYCORIS: Mapping[tuple[str, str], str] = {
    ("lora", "up"): ".lora_up.weight",
    ("lora", "down"): ".lora_down.weight",
    ("lora", "mid"): ".lora_mid.weight",
    ("lora", "diff_b"): ".diff_b",  # what a bias of `up` becomes
    **{("loha", part): f".hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{("lokr", part): f".lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{("glora", part): f".{part}.weight" for part in ("a1", "a2", "b1", "b2", "bm")},
    **{(family, "lora_alpha"): ".alpha" for family in ("lora", "loha", "lokr", "glora")},
    **{(family, "dora_scale"): ".dora_scale" for family in ("lora", "loha", "lokr")},
    **{(family, "reshape"): ".reshape_weight" for family in ("lora", "full")},
    **{("lora", f"sparse_{part}"): f".bias_{part}" for part in ("indices", "values", "size")},
    ("ia3", "weight"): ".weight",
    ("ia3", "on_input"): ".on_input",
    **{(family, "blocks"): ".oft_blocks" for family in ("oft", "boft")},
    **{(family, "rescale"): ".rescale" for family in ("oft", "boft")},
    **{(family, "constraint"): ".alpha" for family in ("oft", "boft")},
    ("oft", "vectors"): ".oft_R.weight",
    ("oft", "scaled"): ".oft_R.scaled_oft",
    ("full", "diff"): ".diff",
    ("full", "diff_b"): ".diff_b",
    ("full", "set"): ".set_weight",
}

# Along which axis of a part, seen as a matrix [size of dim 0, everything else], the rows of the weight run. Parts
# that are not named are the same for all rows. A family that is not named here cannot be cut or joined by rows.
ROWS: Mapping[str, Mapping[str, int]] = {
    "lora": {"up": 0, "up_bias": 0, "dora_scale": 0, "magnitude": 0},
    "loha": {"w1_a": 0, "w2_a": 0, "dora_scale": 0, "magnitude": 0},
    "lokr": {"w1": 0, "w1_a": 0, "dora_scale": 0, "magnitude": 0},
    "glora": {"b1": 0},
    "full": {"diff": 0, "diff_b": 0, "set": 0, "set_b": 0},
}
