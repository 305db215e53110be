"""Look at a folder of pictures as the trainer would: sdops.dataset.check("photos")."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from sdops.pipelines.clip_words import clip_words
from sdops.report import Report, Section
from sdops.text import count, shorten
from sdops.training.pictures import Folder, Picture, enlarged, look

_SHOWN = 20
_LONG = 75  # tokens that CLIP reads


def check(
    folder: str | os.PathLike[str],
    *,
    resolution: int = 512,
    bucket_step: int = 64,
    caption: str = "auto",
    template: str = "",
    masks: str = "",
) -> Report:
    """Sizes, buckets, captions, duplicates, and pictures that cannot be read.

    Args:
        folder: Of pictures; everything below it belongs to it.
        resolution: Pixels of a square that training would use.
        bucket_step: Sides of buckets are multiples of it.
        caption: Where captions come from: auto, txt, caption, filename, template.
        template: Caption of pictures that have none.
        masks: Folder of masks, or `alpha`.

    Returns:
        A report that has failed if pictures cannot be read, lack a caption or a mask.

    Raises:
        SdopsError: there is no such folder.
    """
    found = look(Path(folder), caption=caption, template=template, masks=masks)
    boxes = found.buckets(resolution, bucket_step, squares=False)
    small = [picture for picture in found.pictures if enlarged(picture.size, resolution) > 1]
    maskless = [picture.path for picture in found.pictures if masks and picture.mask is None]
    long = [picture.path for picture in found.pictures if len(clip_words().numbers(picture.caption or "")) > _LONG]
    sections = [
        Section("Folder", _facts(found, resolution, small)),
        Section("Buckets", [[f"{w} x {h}", f"{n:,}"] for (w, h), n in boxes.most_common()], ["size", "pictures>"]),
        Section("Most frequent tags", [[tag, f"{n:,}"] for tag, n in _tags(found.pictures)], ["tag", "pictures>"]),
        _listed("Cannot be read", [f"{path}: {problem}" for path, problem in found.broken.items()]),
        _listed("Without caption", [str(path) for path in found.uncaptioned()]),
        _listed("Without mask", [str(path) for path in maskless]),
        _listed("Captions longer than 75 tokens", [str(path) for path in long]),
        _listed("Captions without picture", [str(path) for path in found.strays]),
        _listed("The same file", [" = ".join(path.name for path in group) for group in found.duplicates()]),
        _listed(f"Smaller than {resolution}^2", [f"{p.path} {p.size[0]}x{p.size[1]}" for p in small]),
    ]
    failed = bool(found.broken or found.uncaptioned() or maskless or not found.pictures)
    data = {
        "folder": str(folder),
        "pictures": len(found.pictures),
        "buckets": {f"{width}x{height}": number for (width, height), number in boxes.items()},
        "captions": dict(Counter(picture.origin for picture in found.pictures)),
        "broken": {str(path): problem for path, problem in found.broken.items()},
        "without_caption": [str(path) for path in found.uncaptioned()],
        "without_mask": [str(path) for path in maskless],
        "long_captions": [str(path) for path in long],
        "captions_without_picture": [str(path) for path in found.strays],
        "duplicates": [[str(path) for path in group] for group in found.duplicates()],
        "small": [str(picture.path) for picture in small],
        "sound": not failed,
    }
    return Report("dataset check", data, sections, [str(folder)], failed=failed)


def _facts(found: Folder, resolution: int, small: list[Picture]) -> list[list[str]]:
    origins = Counter(picture.origin or "none" for picture in found.pictures)
    sides = [picture.size for picture in found.pictures]
    rows = [
        ["pictures", f"{len(found.pictures):,} that can be read" + (f", {len(found.broken)} not" * bool(found.broken))],
        ["captions", ", ".join(f"{origin}: {number:,}" for origin, number in origins.most_common()) or "none"],
    ]
    if sides:
        least, most = min(sides, key=lambda s: s[0] * s[1]), max(sides, key=lambda s: s[0] * s[1])
        rows.append(["sizes", f"{least[0]}x{least[1]} to {most[0]}x{most[1]}"])
        rows.append(["enlarged", f"{count(len(small), 'picture')} for {resolution}^2"])
    return rows


def _tags(pictures: list[Picture]) -> list[tuple[str, int]]:
    tags: Counter[str] = Counter()
    for picture in pictures:
        tags.update({tag.strip() for tag in (picture.caption or "").split(",") if tag.strip()})
    return [(shorten(tag, 60), number) for tag, number in tags.most_common(10)]


def _listed(heading: str, lines: list[str]) -> Section:
    more = [[f"and {len(lines) - _SHOWN:,} more"]] if len(lines) > _SHOWN else []
    return Section(f"{heading} ({len(lines):,})", [*([line] for line in lines[:_SHOWN]), *more])
