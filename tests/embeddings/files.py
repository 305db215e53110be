"""Files in every layout, written as the programs write them that made it up: with torch, safetensors and no sdops."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

Values = dict[str, dict[str, np.ndarray]]  # name -> encoder -> rows


def rows(number: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + width)
    return torch.randn(number, width, generator=generator) * 0.0137


def _numpy(**parts: torch.Tensor) -> dict[str, np.ndarray]:
    return {name: part.detach().float().reshape(-1, part.shape[-1]).numpy() for name, part in parts.items()}


def a1111_dict(vectors: Any, name: str = "inner") -> dict[str, Any]:
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors},
        "name": name,
        "step": 1234,
        "sd_checkpoint": "81761151",
        "sd_checkpoint_name": "v1-5-pruned",
    }


def a1111(folder: Path) -> tuple[Path, Values]:
    vectors = rows(3, 768).requires_grad_(True)
    torch.save(a1111_dict(vectors), folder / "style.pt")
    return folder / "style.pt", {"inner": _numpy(clip_l=vectors)}


def a1111_legacy(folder: Path) -> tuple[Path, Values]:
    vectors = rows(2, 1024)
    torch.save(a1111_dict(vectors), folder / "style.pt", _use_new_zipfile_serialization=False)
    return folder / "style.pt", {"inner": _numpy(clip_h=vectors)}


def rinongal(folder: Path) -> tuple[Path, Values]:
    one, two = rows(1, 768, 1), rows(2, 768, 2)
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(one), "@": torch.nn.Parameter(two)})
    tokens = {"*": torch.tensor(265), "@": torch.tensor(287)}
    torch.save({"string_to_token": tokens, "string_to_param": parameters}, folder / "embeddings_gs-100.pt")
    return folder / "embeddings_gs-100.pt", {"*": _numpy(clip_l=one), "@": _numpy(clip_l=two)}


def rinongal_legacy(folder: Path) -> tuple[Path, Values]:
    one = rows(1, 768, 1)
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(one)})
    path = folder / "embeddings.pt"
    with_tokens = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}
    torch.save(with_tokens, path, _use_new_zipfile_serialization=False)
    return path, {"embeddings": _numpy(clip_l=one)}


def hcp(folder: Path) -> tuple[Path, Values]:
    first, second = rows(4, 768), rows(4, 1280)
    torch.save({"string_to_param": {"*": torch.cat([first, second], 1)}}, folder / "hcp.pt")
    return folder / "hcp.pt", {"hcp": _numpy(clip_l=first, clip_g=second)}


def diffusers_bin(folder: Path) -> tuple[Path, Values]:
    one = rows(1, 768)[0]
    torch.save({"<Le Petit Prince-moon >": one}, folder / "learned_embeds.bin")
    return folder / "learned_embeds.bin", {"<Le Petit Prince-moon >": _numpy(clip_l=one)}


def diffusers_safetensors(folder: Path) -> tuple[Path, Values]:
    one, two = rows(2, 1024, 1), rows(1, 1024, 2)[0]
    save_file({"<a>": one, "<ü.b>": two}, folder / "learned.safetensors", metadata={"format": "pt"})
    return folder / "learned.safetensors", {"<a>": _numpy(clip_h=one), "<ü.b>": _numpy(clip_h=two)}


def diffusers_sdxl(folder: Path) -> tuple[Path, Values]:
    first, second = rows(2, 768), rows(2, 1280)
    save_file({"<x>": first}, folder / "learned_embeds.safetensors", metadata={"format": "pt"})
    save_file({"<x>": second}, folder / "learned_embeds_2.safetensors", metadata={"format": "pt"})
    return folder / "learned_embeds_2.safetensors", {"<x>": _numpy(clip_l=first, clip_g=second)}


def kohya_pt(folder: Path) -> tuple[Path, Values]:
    vectors = rows(5, 768).half()
    torch.save({"emb_params": vectors}, folder / "last.pt")
    return folder / "last.pt", {"last": _numpy(clip_l=vectors)}


def kohya_safetensors(folder: Path) -> tuple[Path, Values]:
    vectors = rows(5, 768).bfloat16()
    save_file({"emb_params": vectors}, folder / "last.safetensors", metadata={"modelspec.title": "last"})
    return folder / "last.safetensors", {"last": _numpy(clip_l=vectors)}


def sdxl(folder: Path) -> tuple[Path, Values]:
    first, second = rows(2, 768), rows(2, 1280)
    save_file({"clip_l": first, "clip_g": second}, folder / "xl.safetensors")
    return folder / "xl.safetensors", {"xl": _numpy(clip_l=first, clip_g=second)}


def sd3(folder: Path) -> tuple[Path, Values]:
    parts = {"clip_l": rows(2, 768), "clip_g": rows(2, 1280), "t5": rows(2, 4096), "t5_out": rows(2, 4096, 1)}
    save_file(parts, folder / "sd3.safetensors")
    renamed = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl", "t5_out": "t5xxl_out"}
    return folder / "sd3.safetensors", {"sd3": _numpy(**{renamed[key]: part for key, part in parts.items()})}


def cog(folder: Path) -> tuple[Path, Values]:
    first, second = rows(2, 768), rows(2, 1280)
    save_file({"text_encoders_0": first, "text_encoders_1": second}, folder / "embeddings.pti")
    return folder / "embeddings.pti", {"embeddings": _numpy(clip_l=first, clip_g=second)}


def onetrainer(folder: Path) -> tuple[Path, Values]:
    vectors, behind = rows(2, 768), rows(2, 768, 1)
    save_file({"emp_params": vectors, "emp_params_out": behind}, folder / "one.safetensors")
    return folder / "one.safetensors", {"one": _numpy(clip_l=vectors, clip_l_out=behind)}


def history_dict(folder: Path) -> tuple[Path, Values]:
    pair = {"emb": rows(1, 768)[0].bfloat16(), "emb2": rows(1, 1280)[0].bfloat16()}
    torch.save(pair, folder / "xl.pt")
    return folder / "xl.pt", {"xl": _numpy(clip_l=pair["emb"], clip_g=pair["emb2"])}


def history_list(folder: Path) -> tuple[Path, Values]:
    pairs = [{"emb": rows(1, 768, n)[0].bfloat16(), "emb2": rows(1, 1280, n)[0].bfloat16()} for n in range(3)]
    torch.save(pairs, folder / "xl.pt")
    names = ("xl-0", "xl-1", "xl")
    return folder / "xl.pt", {
        name: _numpy(clip_l=pair["emb"], clip_g=pair["emb2"]) for name, pair in zip(names, pairs, strict=True)
    }


def bare_t5(folder: Path) -> tuple[Path, Values]:
    vectors = rows(1, 4096)[0].bfloat16()
    torch.save(vectors, folder / "t5.pt")
    return folder / "t5.pt", {"t5": _numpy(t5xxl=vectors)}


def bare_rows(folder: Path) -> tuple[Path, Values]:
    vectors = rows(2, 768)
    torch.save(vectors, folder / "two.pt")
    return folder / "two.pt", {"two": _numpy(clip_l=vectors)}


def bundle(folder: Path) -> tuple[Path, Values]:
    first, second, plain = rows(2, 768), rows(2, 1280), rows(1, 768, 5)
    tensors = {
        "bundle_emb.my.v1.0.clip_l": first,
        "bundle_emb.my.v1.0.clip_g": second,
        "bundle_emb.b.string_to_param.*": plain,
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.zeros(4, 1),
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(1, 4),
        "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0),
    }
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors", {"my.v1.0": _numpy(clip_l=first, clip_g=second), "b": _numpy(clip_l=plain)}


def cloneofsimo(folder: Path) -> tuple[Path, Values]:
    one, two = rows(1, 768, 1)[0], rows(1, 768, 2)[0]
    tensors = {"<s1>": one, "<s2>": two, "unet:0:up": torch.zeros(4, 1), "unet:0:down": torch.zeros(1, 4)}
    metadata = {"<s1>": "<embed>", "<s2>": "<embed>", "unet:0:rank": "1", "unet": "[]"}
    save_file(tensors, folder / "clone.safetensors", metadata=metadata)
    return folder / "clone.safetensors", {"<s1>": _numpy(clip_l=one), "<s2>": _numpy(clip_l=two)}


def custom_diffusion(folder: Path) -> tuple[Path, Values]:
    word = rows(1, 768)[0]
    matrices = {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.zeros(4, 768)}
    torch.save({"unet": matrices, "modifier_token": {"<new1>": word}}, folder / "delta.bin")
    return folder / "delta.bin", {"<new1>": _numpy(clip_l=word)}


def custom_diffusion_ldm(folder: Path) -> tuple[Path, Values]:
    words = rows(2, 768)
    state = {"model.diffusion_model.input_blocks.1.1.attn2.to_k.weight": torch.zeros(4, 768), "embed": words}
    torch.save({"state_dict": state}, folder / "delta.ckpt")
    return folder / "delta.ckpt", {"<new1>": _numpy(clip_l=words[0]), "<new2>": _numpy(clip_l=words[1])}


def checkpoint(folder: Path) -> tuple[Path, Values]:
    added = rows(2, 8)
    table = torch.cat([torch.zeros(49408, 8), added]).half()
    key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    save_file({key: table}, folder / "model.safetensors")
    halves = added.half()
    return folder / "model.safetensors", {f"added{n}": _numpy(width8=halves[n]) for n in range(2)}


def clip_image(folder: Path) -> tuple[Path, Values]:
    vector = rows(1, 768)
    save_file({"clip_image_embed": vector}, folder / "sac.safetensors")
    return folder / "sac.safetensors", {"sac": _numpy(clip_image=vector)}


def null_text_list(folder: Path) -> tuple[Path, Values]:
    steps = [rows(77, 768, n)[None] for n in range(3)]
    torch.save(steps, folder / "null.pt")
    return folder / "null.pt", {"null": {"clip_l": torch.cat(steps).numpy()}}


def null_text_stack(folder: Path) -> tuple[Path, Values]:
    steps = torch.stack([rows(77, 768, n)[None] for n in range(3)])
    torch.save(steps, folder / "null.pt")
    return folder / "null.pt", {"null": {"clip_l": steps[:, 0].numpy()}}


def png_chunk(folder: Path) -> tuple[Path, Values]:
    """The text chunk that the web UI writes through Pillow, here by hand."""
    vectors = rows(2, 768)
    text = json.dumps(a1111_dict({"TORCHTENSOR": vectors.tolist()}, "rick"))
    content = b"sd-ti-embedding\0" + base64.b64encode(text.encode())
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)), (b"tEXt", content)]
    parts += [(b"IDAT", zlib.compress(bytes(4))), (b"IEND", b"")]
    data = b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in parts)
    (folder / "rick.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return folder / "rick.png", {"rick": _numpy(clip_l=vectors)}


def _generator(count: int) -> np.ndarray:
    """s <- 1664525 s + 1013904223 mod 2^32, each mod 255, one by one."""
    state, found = 0, []
    for _ in range(count):
        state = (1664525 * state + 1013904223) % 2**32
        found.append(state % 255)
    return np.array(found, np.uint8)


def pixels(folder: Path) -> tuple[Path, Values]:
    """The picture whose low bits hold an embedding, as the web UI makes it: decorated, with a black column each."""
    image = pytest.importorskip("PIL.Image")
    vectors = rows(2, 768)
    packed = zlib.compress(json.dumps(a1111_dict({"TORCHTENSOR": vectors.tolist()}, "rick")).encode())
    data, height = np.frombuffer(packed, np.uint8), 128
    data = np.resize(data, -(-data.size // (height * 3)) * height * 3)  # repeated up to whole columns
    halves = []
    for half in (data & 0x0F, data >> 4):
        low = half ^ (_generator(half.size) & 0x0F)
        block = low.reshape(height, -1, 3)
        y, x = np.mgrid[: block.shape[0], : block.shape[1]]
        circle = ((x - 20) ** 2 + (y - 60) ** 2 < 900).astype(np.uint8)[..., None] * 0x50
        halves.append(block | 0x80 | (circle & 0xF0))
    gap = np.full((height, 2, 3), 0x80, np.uint8)
    between = np.full((height, 30, 3), 0x87, np.uint8)
    picture = np.concatenate([halves[0], gap, between, gap, halves[1]], axis=1)
    image.fromarray(picture).save(folder / "hidden.png")
    return folder / "hidden.png", {"rick": _numpy(clip_l=vectors)}


def flux(folder: Path) -> tuple[Path, Values]:
    parts = {"clip_l": rows(2, 768), "t5": rows(2, 4096)}
    save_file(parts, folder / "flux.safetensors")
    return folder / "flux.safetensors", {"flux": _numpy(clip_l=parts["clip_l"], t5xxl=parts["t5"])}


Writer = Callable[[Path], tuple[Path, Values]]
# The layout that each must be found in.
WRITERS: dict[Writer, str] = {
    a1111: "a1111",
    a1111_legacy: "a1111",
    rinongal: "rinongal",
    rinongal_legacy: "rinongal",
    hcp: "hcp",
    diffusers_bin: "diffusers",
    diffusers_safetensors: "diffusers",
    diffusers_sdxl: "diffusers_sdxl",
    kohya_pt: "kohya",
    kohya_safetensors: "kohya",
    sdxl: "encoders",
    sd3: "encoders",
    flux: "encoders",
    cog: "cog",
    onetrainer: "onetrainer",
    history_dict: "history",
    history_list: "history",
    bare_t5: "bare",
    bare_rows: "bare",
    bundle: "bundle",
    cloneofsimo: "cloneofsimo",
    custom_diffusion: "custom_diffusion",
    custom_diffusion_ldm: "custom_diffusion",
    checkpoint: "checkpoint",
    clip_image: "clip_image",
    null_text_list: "null_text",
    null_text_stack: "null_text",
    png_chunk: "png",
    pixels: "png",
}
