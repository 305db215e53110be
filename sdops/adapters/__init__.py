"""SHELF: families of adapters, that is, ways to write a change of a weight in few numbers. One file is one family.

Letters of the shapes: o = output, i = input channels, k = kernel (kh, kw; nothing for linear layers), r = rank,
b = block size, n = number of blocks. `shape` is the weight's, `[o, i]` or `[o, i, kh, kw]`; a convolution as a matrix
is `[o, i kh kw]`. A patch of some rows of a fused matrix has the shape of those rows.

    family   required parts             optional parts
    lora     up down                    mid lora_alpha dora_scale magnitude up_bias reshape
    loha     w1_a w1_b w2_a w2_b        t1 t2 lora_alpha dora_scale magnitude
    lokr     w1 (or w1_a w1_b)          t2 lora_alpha dora_scale magnitude
             w2 (or w2_a w2_b)
    glora    a1 a2 b1 b2                bm lora_alpha
    ia3      weight on_input
    oft      blocks (or vectors)        rescale constraint scaled
    boft     blocks                     rescale constraint
    full     one or more of             reshape
             diff set diff_b set_b
    tlora    q_layer p_layer lambda_layer   refused by name: such a file does not tell its own change

What a file of this shelf calls them elsewhere: `up`, `down` = `lora_up`, `lora_down`, `lora_B`, `lora_A`; `lora_alpha` =
`alpha`, but for oft and boft, where `alpha` is the `constraint`; `dora_scale` = LyCORIS' DoRA vector, `magnitude` =
PEFT's `lora_magnitude_vector` (two parts, because `(1, N, 1, 1)` is the input axis in one and the output axis in the
other); `up_bias` = `lora_B.bias`; norms' `w_norm`, `b_norm` = `diff`, `diff_b`; `set_weight` = `set`;
`reshape_weight` = `reshape`; `oft_blocks` = `blocks`; `oft_R.weight` = `vectors`, `oft_R.scaled_oft` = `scaled`.
DyLoRA and Control-LoRA files are plain `lora`.

Each file offers

    REQUIRED: tuple[str, ...]      parts that are always there; check() knows about alternatives
    OPTIONAL: tuple[str, ...]      parts that may be there
    NEEDS_WEIGHT: tuple[str, ...]  a patch with one of these parts depends on the base weight, which `delta` must then get
    check(shapes, shape) -> Facts
        Look at the parts' shapes alone, without torch. `shape` is the base weight's, None if unknown.
        Raises MismatchError, which names the part.
    delta(parts, shape, weight=None, **settings) -> Tensor
        W' - W at strength 1, in the base weight's shape: float32, or float64 if a part or the weight is. Differentiable.

and, where there is such a thing,

    factors(parts, shape, weight=None, **settings) -> tuple[Tensor, Tensor] | None
        up [o, R], down [R, i kh kw] with the scale folded in, up @ down == delta exactly; None if this patch has none.
    bias_delta(parts, shape, bias=None, **settings) -> Tensor | None
        The change of the module's bias [o]; None if this patch leaves it alone.

`family(name)` loads one, with functions that answer None for what it does not offer. Files of this shelf import torch
inside functions only.

Strength t is the caller's: W + t delta, also for DoRA, OFT and all others whose delta depends on W. So strength 0 is W
itself, and strengths are linear. In a stack every delta is computed from the original W, and all are summed.

Settings (what is not a tensor) are keywords, the same for all families; each uses those that concern it:

    lora_alpha: float     instead of the part (PEFT's adapter_config.json)
    use_rslora: bool      scale by lora_alpha / sqrt(r) instead of lora_alpha / r
    rank: int             lora: use the first ranks only (DyLoRA). lokr: rank of PEFT's configuration, which scales full
                          factors too
    strength: float       DoRA: scale the additive part before the norm, as PEFT does; the caller must then not scale
    neumann_terms: int    oft: length of the Cayley-Neumann series, 0 for the exact Cayley transform
    constraint_per_channel: bool   oft, boft: the constraint is multiplied by o, as in LyCORIS and kohya; ComfyUI does not
"""
