"""Writes merged concepts: as a LoRA of any dialect with the words inside, or as the web UI's factors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sdops.core.precision import encode
from sdops.core.source import read
from sdops.core.spec import Spec
from sdops.core.tree import Leaf
from sdops.custom_diffusion._types import Edit
from sdops.errors import MismatchError
from sdops.report import Progress
from sdops.verbs._adapter_source import AdapterSource, Lazy
from sdops.verbs._custom_open import ConceptFile, Doubles, as_lora, word_tensor
from sdops.verbs._hashes import part_record
from sdops.verbs._inputs import Opened, input_of
from sdops.verbs._provenance import RECIPE


def lora_source(
    files: Sequence[ConceptFile], factors: Mapping[str, tuple[Doubles, Doubles]], dtype: str, name: str
) -> AdapterSource:
    """A LoRA under kohya's names."""
    tensors: dict[str, Lazy] = {}

    def put(key: str, values: Doubles, kind: str) -> None:
        bits, overflow = encode(np.ascontiguousarray(values).reshape(-1), kind)
        if overflow:
            raise MismatchError(f"the change of `{key}` does not fit into {kind}", hint="`--dtype fp32` holds it")
        tensors[key] = Lazy(Spec(kind, values.shape), bits.tobytes)

    for module, (up, down) in factors.items():
        stem = _stem(module)
        put(f"{stem}.lora_up.weight", up, dtype)
        put(f"{stem}.lora_down.weight", down, dtype)
        put(f"{stem}.alpha", np.array(float(len(down))), "F32")
    for file in files:
        for word, parts in file.words.items():
            for encoder, vectors in parts.items():
                tensors[f"bundle_emb.{word}.{encoder}"] = word_tensor(vectors)
    return AdapterSource(name, tensors, {})


def write_lora(
    source: AdapterSource,
    files: Sequence[ConceptFile],
    base: Opened,
    factors: Mapping[str, Any],
    recipe: Mapping[str, Any],
    to: str,
    path: Path,
    *,
    jobs: int,
    force: bool,
    hash_inputs: bool,
    progress: Progress,
) -> int:
    """Write the LoRA in a dialect, or the web UI's factors; returns the size in bytes."""
    from sdops.custom_diffusion import layout
    from sdops.verbs._adapter_save import save
    from sdops.verbs._adapters import Spelled, open_adapter, spelled

    inputs = [*(input_of(as_lora(file, base)) for file in files), base]
    records = [*(part_record(f"concept{n}", part) for n, part in enumerate(inputs[:-1], 1)), part_record("base", base)]
    header = {"format": "pt", "modelspec.title": path.stem}
    header[RECIPE] = json.dumps({**recipe, "inputs": records}, ensure_ascii=False, separators=(",", ":"))
    if to == "webui":
        written = layout("webui").write([_edit(source, module) for module in factors], {})
        tensors = {key: Lazy(leaf.spec, partial(read, source, leaf.key)) for key, leaf in written.tree.items()}
        made = Spelled(AdapterSource(path.name, tensors, header | written.metadata), {}, ())
    else:
        header |= {"ss_network_module": "networks.lora"}
        made = spelled(open_adapter(source, architecture=files[0].family), to, header)
    return save(made, path, inputs, jobs=jobs, force=force, hash_inputs=hash_inputs, progress=progress)


def _edit(source: AdapterSource, module: str) -> Edit:
    """A layer's factors."""
    keys = (f"{_stem(module)}.lora_{side}.weight" for side in ("up", "down"))
    return Edit(module, "weight", "factors", tuple(Leaf(key, source.specs[key]) for key in keys))


def _stem(module: str) -> str:
    """What kohya calls a layer."""
    return "lora_unet_" + module.replace(".", "_")
