"""Compare conversions with diffusers' official scripts, bit for bit.

    python tools/oracles/convert_scripts.py DIFFUSERS [NAME ...]

DIFFUSERS is a checkout of huggingface/diffusers, whose folder `scripts` is used; otherwise needs what
`convert_diffusers.py` needs, whose tiny models are taken. Of each
sd1, sd2, sdxl    the script makes a single file of a folder that sdops wrote: the same tensors as sdops' single file
flux, sd3, sd35   the script's function makes diffusers' tensors of sdops' single file: those of the model it came from;
                  Flux of true width with one block of each kind, the others narrow and deep
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import convert_diffusers as tiny
import torch
from safetensors.torch import load_file

_TO_SINGLE = {
    "sd1": "convert_diffusers_to_original_stable_diffusion.py",
    "sd2": "convert_diffusers_to_original_stable_diffusion.py",
    "sdxl": "convert_diffusers_to_original_sdxl.py",
}
_DENOISERS = {"flux": "flux-wide", "sd3": "sd3-alone", "sd35": "sd35-alone"}


def script(path: Path) -> ModuleType:
    """A script as a module; it looks at the command line when it is imported."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    given, sys.argv = sys.argv, [str(path)]
    try:
        spec.loader.exec_module(module)
    finally:
        sys.argv = given
    return module


def to_single(name: str, scripts: Path, scratch: Path) -> tuple[dict, dict]:
    """What the script and what sdops makes of a folder."""
    pipeline = getattr(tiny, name)(scratch)
    for module in tiny.modules(pipeline).values():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    pipeline.save_pretrained(scratch / "theirs")
    tiny.convert(scratch / "theirs", "--to", "original", "-o", scratch / "ours.safetensors")
    # transformers 5 saves CLIP without `text_model.`, which the scripts do not know
    tiny.convert(scratch / "ours.safetensors", "--to", "diffusers", "-o", scratch / "folder")
    subprocess.run(
        [sys.executable, scripts / _TO_SINGLE[name], "--model_path", scratch / "folder",
         "--checkpoint_path", scratch / "script.safetensors", "--use_safetensors"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return load_file(scratch / "script.safetensors"), load_file(scratch / "ours.safetensors")


def to_diffusers(name: str, scripts: Path, scratch: Path) -> tuple[dict, dict]:
    """What the script makes of sdops' single file, and the model."""
    kind, config = tiny.ALONE[_DENOISERS[name]]
    model = kind(**config).to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(scratch / "theirs")
    tiny.convert(scratch / "theirs", "--to", "original", "-o", scratch / "ours.safetensors")
    original = load_file(scratch / "ours.safetensors")
    if name == "flux":
        found = script(scripts / "convert_flux_to_diffusers.py").convert_flux_transformer_checkpoint_to_diffusers(
            original, num_layers=1, num_single_layers=1, inner_dim=3072, mlp_ratio=4.0
        )
    else:
        found = script(scripts / "convert_sd3_to_diffusers.py").convert_sd3_transformer_checkpoint_to_diffusers(
            original, 24, 128, list(config.get("dual_attention_layers", ())), "qk_norm" in config
        )
    return found, model.state_dict()


def compare(name: str, scripts: Path) -> bool:
    """Run one comparison; returns whether it is bit-equal."""
    torch.manual_seed(0)
    scratch = Path(tempfile.mkdtemp())
    try:
        theirs, ours = (to_single if name in _TO_SINGLE else to_diffusers)(name, scripts, scratch)
    finally:
        shutil.rmtree(scratch)
    wrong = [key for key in theirs.keys() | ours.keys() if not tiny.equal(theirs.get(key), ours.get(key))]
    print(f"{name:6} {len(ours):5} tensors, {len(wrong)} differ {sorted(wrong)[:3]}")
    return not wrong


if __name__ == "__main__":
    folder = Path(sys.argv[1]) / "scripts"
    results = [compare(name, folder) for name in sys.argv[2:] or [*_TO_SINGLE, *_DENOISERS]]
    sys.exit(not all(results))
