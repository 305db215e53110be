"""What a folder of pictures holds: sizes, captions, masks, and what is wrong with it. No torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

from sdops.errors import FormatError, SdopsError, UsageError
from sdops.hub import is_reference
from sdops.text import count

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
INSTALL = "pip install 'sdops[train]'"
_SHOWN = 5
_THREADS = 8


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of the folder.

    Attributes:
        path: Where it is.
        size: Width and height as it is shown (turned as EXIF says).
        caption: Its text; None if there is none.
        origin: Where the caption is from: `txt`, `caption`, `filename`, `template`; empty without one.
        mask: A picture of the same name in the folder of masks; the picture itself for `alpha`; else None.
        digest: Of the file's bytes.
    """

    path: Path
    size: tuple[int, int]
    caption: str | None
    origin: str
    mask: Path | None
    digest: str


@dataclass(slots=True)
class Folder:
    """A folder that was looked through.

    Attributes:
        path: Which.
        pictures: Those that can be read, by name.
        broken: File -> what is wrong with it.
        strays: Caption files without a picture.
    """

    path: Path
    pictures: list[Picture] = field(default_factory=list)
    broken: dict[Path, str] = field(default_factory=dict)
    strays: list[Path] = field(default_factory=list)

    def duplicates(self) -> list[list[Path]]:
        """Pictures that are the same file byte for byte, in groups."""
        groups: dict[str, list[Path]] = {}
        for picture in self.pictures:
            groups.setdefault(picture.digest, []).append(picture.path)
        return [group for group in groups.values() if len(group) > 1]

    def uncaptioned(self) -> list[Path]:
        """Pictures without a text."""
        return [picture.path for picture in self.pictures if picture.caption is None]

    def buckets(self, resolution: int, step: int, *, squares: bool) -> Counter[tuple[int, int]]:
        """Width and height -> how many pictures are brought to that size."""
        return Counter(bucket_of(picture.size, resolution, step, squares=squares) for picture in self.pictures)


def look(path: Path, *, caption: str = "auto", template: str = "", masks: str = "") -> Folder:
    """Look through a folder and everything below it.

    Args:
        path: The folder.
        caption: `auto`, `txt`, `caption`, `filename` or `template`.
        template: The text of pictures without one (`auto`) or of all (`template`).
        masks: Folder of masks, `alpha`, or nothing.

    Raises:
        SdopsError: there is no such folder, or no Pillow.
    """
    if is_reference(path):
        raise SdopsError(
            f"`{path}` is on the Hub, pictures are read from this disk", hint="`hf download` brings them", path=path
        )
    if not path.is_dir():
        raise SdopsError(f"`{path}` is no folder", hint="name the folder that holds the pictures", path=path)
    _pillow()
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    images = [file for file in files if file.suffix.lower() in ENDINGS]
    stems = {file.with_suffix("") for file in images}
    texts = [file for file in files if file.suffix.lower() in (".txt", ".caption")]
    folder = Folder(path, strays=[file for file in texts if file.with_suffix("") not in stems])
    with ThreadPoolExecutor(_THREADS) as pool:
        for file, (size, problem, digest) in zip(images, pool.map(_measured, images), strict=True):
            if problem:
                folder.broken[file] = problem
                continue
            text, origin = _caption(file, caption, template)
            folder.pictures.append(Picture(file, size, text, origin, _mask(file, path, masks), digest))
    return folder


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise SdopsError("pictures are read with Pillow, which is not installed", hint=f"`{INSTALL}`") from error
    return Image


def _measured(path: Path) -> tuple[tuple[int, int], str, str]:
    """Size, what is wrong (nothing if it can be read to its end), and digest of the bytes."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        data = path.read_bytes()
        with Image.open(path) as image:
            image.load()
            size = ImageOps.exif_transpose(image).size
    except UnidentifiedImageError:
        return (0, 0), "no picture, whatever its name says" if data else "empty", ""
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return (0, 0), str(error).splitlines()[0] or type(error).__name__, ""
    return size, "", hashlib.sha256(data).hexdigest()


def _caption(path: Path, way: str, template: str) -> tuple[str | None, str]:
    """The text of a picture and where it is from."""
    for origin in ("txt", "caption"):
        beside = path.with_suffix(f".{origin}")
        if way in ("auto", origin) and beside.is_file():
            return " ".join(_text(beside).split()), origin
    if way == "filename":
        return path.stem.replace("_", " ").strip(), "filename"
    if way in ("auto", "template") and template:
        return template, "template"
    return None, ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"`{path}` is no UTF-8 text", hint="save it as UTF-8", path=path) from error


def _mask(path: Path, folder: Path, masks: str) -> Path | None:
    if not masks:
        return None
    if masks == "alpha":
        return path
    stem = Path(masks) / path.relative_to(folder).with_suffix("")
    return next((file for ending in ENDINGS if (file := stem.with_name(stem.name + ending)).is_file()), None)


def check(folder: Folder, masks: str = "") -> None:
    """Refuse a folder that cannot be trained on as it is.

    Raises:
        UsageError: there are no pictures, or some lack a caption or a mask.
        FormatError: some cannot be read.
    """
    path, command = folder.path, f"`sdops dataset check {folder.path}` lists all"
    if folder.broken:
        first = next(iter(folder.broken))
        raise FormatError(
            f"{count(len(folder.broken), 'picture')} in `{path}` cannot be read: {_names(folder.broken)} "
            f"({folder.broken[first]})",
            hint=f"remove or replace them; {command}",
            broken=list(folder.broken),
        )
    if not folder.pictures:
        raise UsageError(f"there are no pictures in `{path}`", hint=f"they end in {', '.join(ENDINGS)}")
    if missing := folder.uncaptioned():
        raise UsageError(
            f"{count(len(missing), 'picture')} in `{path}` {_has(missing)} no caption: {_names(missing)}",
            hint="put NAME.txt beside each; or `--template 'a photo of ...'`, or `--caption filename`",
            missing=missing,
        )
    lacking = [picture.path for picture in folder.pictures if masks and picture.mask is None]
    if lacking:
        raise UsageError(
            f"{count(len(lacking), 'picture')} {_has(lacking)} no mask in `{masks}`: {_names(lacking)}",
            hint="a white picture of the same name masks nothing",
            missing=lacking,
        )


def _has(paths: Sequence[Path]) -> str:
    return "has" if len(paths) == 1 else "have"


def _names(paths: Iterable[Path]) -> str:
    listed = [f"`{path.name}`" for path in paths]
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def bucket_of(size: tuple[int, int], resolution: int, step: int, *, squares: bool) -> tuple[int, int]:
    """The width and height that a picture is brought to: its shape, `resolution`^2 pixels, sides multiples of `step`.

    Of all such sizes between half and twice the resolution the one whose shape is nearest, by the logarithm of the
    ratio; of two shapes as near the one with more pixels. Pictures are scaled to cover it and cropped in the middle.
    """
    if squares:
        return resolution, resolution
    wanted = size[0] / size[1]
    return max(_sizes(resolution, step), key=lambda box: (-_distance(box, wanted), box[0] * box[1]))


def _distance(box: tuple[int, int], wanted: float) -> float:
    ratio = box[0] / box[1] / wanted
    return round(max(ratio, 1 / ratio), 9)


def _sizes(resolution: int, step: int) -> Sequence[tuple[int, int]]:
    """Widths and heights with at most as many pixels as the square, and no room for another step."""
    found = {(resolution - resolution % step, resolution - resolution % step)}
    for width in range(max(step, resolution // 2 // step * step), 2 * resolution + 1, step):
        height = resolution * resolution // width // step * step
        if resolution / 2 <= height <= resolution * 2:
            found |= {(width, height), (height, width)}
    return sorted(box for box in found if min(box) > 0)


def covered(size: tuple[int, int], box: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size to scale to so that the box is covered, and the left upper corner of the crop in the middle."""
    scale = max(box[0] / size[0], box[1] / size[1])
    width, height = max(box[0], round(size[0] * scale)), max(box[1], round(size[1] * scale))
    return (width, height), ((width - box[0]) // 2, (height - box[1]) // 2)


def enlarged(size: tuple[int, int], resolution: int) -> float:
    """How much a picture is enlarged to have the pixels of the square; 1 or less: not at all."""
    return resolution / sqrt(size[0] * size[1])
