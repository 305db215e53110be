"""ModelSpec, the metadata that say what a model is: names, what their values must look like, thumbnails.

https://github.com/Stability-AI/ModelSpec (1.0.1). All values are text; in files the names begin with `modelspec.`.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from sdops.errors import SdopsError, UsageError
from sdops.text import size, suggest

PREFIX = "modelspec."
VERSION = "1.0.1"
REQUIRED = ("architecture", "implementation", "title")  # beside the version, which is always written

# Layout of the tensors -> the program whose names they are, in the words that ComfyUI and kohya's trainer write.
IMPLEMENTATIONS = {"ldm": "sgm", "sgm": "sgm", "sai": "sgm", "diffusers": "diffusers"}

_ANY = (r".*", "a text")
_SOME = (r"(?s)\s*\S.*", "a text")
_NUMBER = (r"\d+", "a whole number")

# Name -> pattern of its values, and what they are in words.
FIELDS: dict[str, tuple[str, str]] = {
    "sai_model_spec": (r"\d+\.\d+\.\d+", "a version such as 1.0.1"),
    "architecture": (r"\S+", "an id such as stable-diffusion-xl-v1-base/lora"),
    "implementation": (r"\S+", "an address of source code, or sgm, diffusers"),
    "title": _SOME,
    "resolution": (r"[1-9]\d*x[1-9]\d*", "width x height such as 1024x1024"),
    "description": _ANY,
    "author": _ANY,
    "date": (r"", "a date such as 2026-11-20 or 2026-11-20T18:30:00"),
    "hash_sha256": (r"0x[0-9a-f]{64}", "0x and the 64 digits of `sdops hash`"),
    "implementation_version": _ANY,
    "license": _ANY,
    "usage_hint": _ANY,
    "thumbnail": (r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]+", "a data URL; `--thumbnail IMAGE` makes one"),
    "tags": _ANY,
    "merged_from": _ANY,
    "trigger_phrase": _ANY,
    "prediction_type": (r"v|epsilon", "v or epsilon"),
    "timestep_range": (r"\d+,\d+", "two numbers such as 0,999"),
    "encoder_layer": _NUMBER,
    "preprocessor": _ANY,
    "is_negative_embedding": (r"true|false", "true or false"),
    "unet_dtype": _ANY,
    "vae_dtype": _ANY,
    "data_format": _ANY,  # this and the following of language models
    "format_type": _ANY,
    "language": _ANY,
    "format_template": _ANY,
}

_IMAGES = {b"\xff\xd8\xff": "jpeg", b"\x89PNG\r\n\x1a\n": "png", b"GIF8": "gif"}
_LARGEST = 4_000_000  # bytes of an image; ModelSpec recommends 256x256
LARGE = 200_000


def full_name(name: str) -> str:
    """`title` -> `modelspec.title`; names that are not ModelSpec's stay as they are."""
    return PREFIX + name if name in FIELDS else name


def check(name: str, value: str) -> None:
    """See that a value is as ModelSpec wants it; other keys may hold anything.

    Raises:
        UsageError: it is not, or ModelSpec has no such name.
    """
    field = name.removeprefix(PREFIX)
    if field == name:
        return
    if field.startswith("hash_") and field not in FIELDS:
        raise UsageError(f"sdops cannot tell whether `{name}` is true", hint="`hash_sha256` is checked")
    if field not in FIELDS:
        close = suggest(field, FIELDS)
        hint = f"did you mean `{close}`?" if close else f"it has {' '.join(FIELDS)}"
        raise UsageError(f"ModelSpec has no `{field}`", hint=hint)
    pattern, words = FIELDS[field]
    sound = _is_date(value) if field == "date" else re.fullmatch(pattern, value) is not None
    if not sound:
        raise UsageError(f"`{value[:80]}` is no value for `{name}`", hint=f"it must be {words}")


def lacking(metadata: Mapping[str, str]) -> list[str]:
    """What ModelSpec requires and is not there; nothing where no ModelSpec is used.

    A resolution is required of image models, but not of adapters and components, whose architecture has a slash.
    """
    if not any(key.startswith(PREFIX) for key in metadata):
        return []
    whole = "/" not in metadata.get(f"{PREFIX}architecture", "/") and f"{PREFIX}data_format" not in metadata
    return [field for field in (*REQUIRED, *["resolution"] * whole) if not metadata.get(PREFIX + field)]


def thumbnail(image: Path) -> str:
    """An image file as a data URL, unchanged.

    Raises:
        SdopsError: it cannot be read.
        UsageError: it is no image, or too large.
    """
    try:
        data = image.read_bytes()
    except OSError as error:
        raise SdopsError(f"`{image}` cannot be read: {error.strerror}", hint="name an image file") from error
    kind = next((kind for magic, kind in _IMAGES.items() if data.startswith(magic)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "webp"
    if kind is None:
        raise UsageError(f"`{image}` is no JPEG, PNG, WebP or GIF image", hint="convert it to JPEG first")
    if len(data) > _LARGEST:
        raise UsageError(
            f"`{image}` has {size(len(data))}, too much for a thumbnail",
            hint=f"`convert {image} -resize 256x256 -quality 85 thumbnail.jpg` makes one",
        )
    return f"data:image/{kind};base64,{b64encode(data).decode()}"


def shown(value: str) -> str:
    """A value for people: an image is told, not printed."""
    found = re.match(r"data:(image/\w+);base64,", value)
    return f"{found[1]}, {size((len(value) - found.end()) * 3 // 4)}" if found else value


def _is_date(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
