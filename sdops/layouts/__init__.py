"""SHELF: how the tensors of one spelling of a component are made of the tensors of another, as data.

One TOML file is one family, named as in `archs/`; `text_encoder.toml`, `vae.toml` and `controlnet.toml` hold what
several families share. Every line is an equation between the two spellings and is read in both directions:

    input_blocks.0.0               = conv_in
    double_blocks.{D}.img_attn.qkv = transformer_blocks.{D}.attn.to_q + ... + ...     rows, one below the other
    single_blocks.{S}.linear1      = ... + ... + ... + 4*...                          the last has 4 times the rows
    final_layer.adaLN_modulation.1 = swap(norm_out.linear)                            the two halves of the rows
    text_projection                = transpose(text_projection.weight)
    encoder.mid.attn_1.q           = conv(encoder.mid_block.attentions.0.to_q)        1x1 convolution = linear layer

That is all that ever happens between two spellings: no number changes, so a conversion only copies ranges of rows.
`tables.py` reads the files and says what else may stand in them. A spelling is added by adding lines, without code.
"""
