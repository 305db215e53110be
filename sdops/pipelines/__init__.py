"""SHELF: the folder that diffusers makes of a model family, as data. One TOML file is one family, named as in `archs/`.

    class        the pipeline's class; without it, components are only written one by one
    absent       parts of the pipeline that it can do without and that no checkpoint has
    options      further entries of model_index.json
    component    tables: `name` as in archs, `folder`, `class`, `layout` and `prefix` in a file of the original layout,
                 `drop` (patterns of names that the class has no place for), `config` (what sizes do not tell)
    tokenizer    tables: `folder`, `class`, `kind` (clip, or t5, whose vocabulary does not come with sdops), `pad`
    scheduler    `class` and its configuration
    variant      tables `name` (of archs, or `v`, `zero-terminal-snr`) with what is different

What sizes do tell (widths, depths, channels) is read from the tensors: `sizes.py`. A family is added by adding a TOML
file, and for a new class a function there.
"""
