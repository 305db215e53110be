"""diffusers' own conversion of a single file to a folder: `from_single_file`, then `save_pretrained`.

python run_diffusers_convert.py StableDiffusionPipeline IN OUT CONFIG      CONFIG: a folder of the same family
"""

from __future__ import annotations

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import torch


def main(kind: str, source: str, output: str, config: str) -> None:
    """In fp16, without network."""
    pipeline = getattr(diffusers, kind).from_single_file(
        source, config=config, local_files_only=True, torch_dtype=torch.float16
    )
    pipeline.save_pretrained(output)


main(*sys.argv[1:5])
