"""Compare the configurations that sdops writes with the classes of diffusers and transformers, at full size.

    python tools/oracles/convert_configs.py [NAME ...]

Needs torch, diffusers, transformers and numpy, and sdops beside this file; no network. For every list of keys in
fixtures/keys that is a single file, a conversion to a folder is planned; every component's class is made from the
configuration in that plan, on the meta device, and must have the tensors that the plan writes: same names, same shapes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "fixtures")]

import diffusers  # noqa: E402
import make  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from sdops.core import sink_folder  # noqa: E402
from sdops.errors import SdopsError  # noqa: E402
from sdops.formats import open_source  # noqa: E402
from sdops.verbs._convert_checkpoint import Conversion  # noqa: E402
from sdops.verbs._convert_wish import Wish  # noqa: E402

# Tensors that a class has and no file: made from its configuration.
DERIVED = ("position_ids", "encoder.embed_tokens.weight")
sink_folder.check_space = lambda *_: None  # nothing is written


def shapes_of(folder: dict[str, object], name: str) -> dict[str, tuple[int, ...]]:
    """What the class of a configuration has."""
    with torch.device("meta"):
        if "_class_name" in folder:
            module = getattr(diffusers, str(folder["_class_name"])).from_config(folder)
        else:
            kind = folder["architectures"][0]
            config = getattr(transformers, kind).config_class.from_dict(folder)
            module = getattr(transformers, kind)(config)
    # transformers 5 spells CLIP without `text_model.`, and reads files that have it
    flat = name.startswith("text_encoder") and not any(key.startswith("text_model.") for key in module.state_dict())
    clip = flat and "token_embedding" in " ".join(module.state_dict())
    found = {}
    for key, tensor in module.state_dict().items():
        key = f"text_model.{key}" if clip and key != "text_projection.weight" else key
        if not key.endswith(DERIVED):
            found[key] = tuple(tensor.shape)
    return found


def compare(name: str) -> bool:
    """Plan one conversion, compare all its components; returns whether they agree."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / f"{name}.safetensors"
        make.full(name, file, sparse=True)
        source = open_source(file)
        try:
            conversion = Conversion(source, {}, Path(scratch) / "out", Wish("diffusers"))
        except SdopsError as error:
            print(f"{name:34} {error}")
            return False
        draft, fine = conversion.draft, True
        for prefix in draft.stems:
            config = json.loads(draft.files[f"{prefix}config.json"])
            ours = {
                key.removeprefix(prefix): entry.made.spec.shape
                for key, entry in draft.tensors.items()
                if key.startswith(prefix) and key[: key.find("/") + 1] == prefix
            }
            ours = {key: shape for key, shape in ours.items() if not key.endswith(DERIVED)}
            try:
                theirs = shapes_of(config, prefix)
            except Exception as error:  # noqa: BLE001 - whatever keeps a class from being made
                print(f"{name:34} {prefix:17} {config.get('_class_name')}: {type(error).__name__} {error}")
                fine = False
                continue
            wrong = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
            kind = config.get("_class_name") or config["architectures"][0]
            print(f"{name:34} {prefix:17} {kind:28} {len(ours):5} tensors, {len(wrong)} differ {sorted(wrong)[:3]}")
            fine = fine and not wrong
        index = json.loads(draft.files.get("model_index.json", b"{}"))
        if index:
            print(f"{name:34} {'':17} {index['_class_name']}: {', '.join(draft.notes) or 'complete'}")
            fine = fine and hasattr(diffusers, index["_class_name"])
        source.close()
        return fine


def main() -> None:
    """All single files that there is a list for, or those named."""
    folders = [name for name in make.names() if make.is_pipeline(name) or "-diffusers" in name or name.endswith("-hf")]
    names = sys.argv[1:] or [name for name in make.names() if name not in folders or name.startswith("qwen")]
    wrong = [name for name in names if not compare(name)]
    print("all agree" if not wrong else f"not as they should be: {', '.join(wrong)}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
