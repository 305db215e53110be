"""An extracted adapter on its way into a file: in which dialect, with which metadata."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from sdops import __version__
from sdops.core.patch import Adapter, Patch
from sdops.core.source import Source
from sdops.core.spec import Spec
from sdops.verbs._adapter_names import ARCHITECTURES
from sdops.verbs._adapters import spelled
from sdops.verbs._extract_pairs import Pair
from sdops.verbs._hashes import part_record
from sdops.verbs._inputs import Opened
from sdops.verbs._provenance import RECIPE

if TYPE_CHECKING:
    from sdops.verbs._extract_factors import Layer

# Family -> what kohya's tools call the network and the base.
_NETWORKS = {"flux1": "networks.lora_flux", "sd3": "networks.lora_sd3"}
_BASES = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "wan": "wan2"}  # others: the family's name


def adapter(
    source: Source, patches: Sequence[Patch], model: Opened, extras: Mapping[str, str] | None = None
) -> Adapter:
    """An adapter for a model's architecture; extras are new words (`_extract_words`)."""
    family, variants = model.detection.family, model.detection.variants
    deep = [each.variant for each in ARCHITECTURES if each.family == family and each.variant in variants]
    return Adapter(source, "", family, tuple(patches), dict(extras or {}), variant=deep[0] if deep else "")


def check_dialect(pairs: Sequence[Pair], model: Opened, to: str) -> tuple[str, ...]:
    """Spell the adapter with rank 1 everywhere, so that errors come before the work.

    Returns:
        Names of files that will belong beside the output.

    Raises:
        UsageError: there is no such dialect.
        MismatchError: it cannot hold a layer.
    """
    return tuple(spelled(rank_one(pairs, model), to).companions)


def rank_one(pairs: Sequence[Pair], model: Opened) -> Adapter:
    """The adapter as it would be with rank 1 everywhere, made-up numbers in it: what is known before the work.

    Args:
        pairs: The layers.
        model: What they are compared in.
    """
    specs: dict[str, Spec] = {}
    patches = []
    for pair in pairs:
        name, shape = str(pair.target), pair.shape
        if len(shape) > 1:
            parts = {"up": f"{name}.up", "down": f"{name}.down", "lora_alpha": f"{name}.alpha"}
            specs[parts["up"]] = Spec("F16", (shape[0], 1, *[1] * len(shape[2:])))
            specs[parts["down"]] = Spec("F16", (1, *shape[1:]))
            specs[parts["lora_alpha"]] = Spec("F32", ())
            patches.append(Patch(pair.target, "lora", parts))
        else:
            part = "diff" if pair.part == "weight" else "diff_b"
            specs[f"{name}.{part}"] = Spec("F16", shape)
            patches.append(Patch(pair.target, "full", {part: f"{name}.{part}"}))
    return adapter(_Blank(model.name, specs), patches, model)


class _Blank:
    """Tensors of one number each, and alphas of one.

    The number depends on the model's name: LoRAs that others merge on trial neither vanish nor cancel out.
    """

    def __init__(self, name: str, specs: Mapping[str, Spec]) -> None:
        self.name, self.specs = name, specs
        self.metadata: Mapping[str, str] = {}

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """The number of a tensor, or that of an alpha."""
        number = 0.5 + crc32(self.name.encode()) % 1024 / 2048
        one = struct.pack("<f", 1.0) if self.specs[key].dtype == "F32" else struct.pack("<e", number)
        begin = start % len(one)
        buffer[:] = (one * (len(buffer) // len(one) + 2))[begin : begin + len(buffer)]

    def close(self) -> None:
        """Nothing to release."""


def recipe(tuned: Opened, base: Opened, settings: Mapping[str, Any], to: str) -> dict[str, Any]:
    """Everything needed to make the file again, with placeholders for hashes."""
    inputs = [part_record("tuned", tuned), part_record("base", base)]
    return {"version": __version__, "verb": "extract", **settings, "to": to, "inputs": inputs}


def metadata(output: Path, tuned: Opened, layers: Sequence[Layer], made: Mapping[str, Any]) -> dict[str, str]:
    """Header metadata: what trainers write about a LoRA, ModelSpec, and the recipe.

    Args:
        output: Names the LoRA.
        tuned: Where it comes from.
        layers: What it holds.
        made: The recipe.
    """
    family = tuned.detection.family
    found = {layer.rank for layer in layers if layer.rank and not layer.dense}
    rank = str(found.pop()) if len(found) == 1 else "Dynamic"
    header = {
        "format": "pt",  # some loaders refuse files without it
        "ss_network_module": _NETWORKS.get(family, "networks.lora"),
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_output_name": output.stem,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": output.stem,
    }
    if any(layer.rank for layer in layers if layer.pair.kind == "conv"):
        header["ss_network_args"] = json.dumps({"conv_dim": rank, "conv_alpha": rank})
    header["ss_base_model_version"] = _BASES.get(family, family)
    header["ss_v2"] = str(family == "sd2")
    if tuned.detection.modelspec:
        header["modelspec.architecture"] = f"{tuned.detection.modelspec}/lora"
    return {**header, RECIPE: json.dumps(made, ensure_ascii=False, separators=(",", ":"))}
