"""A folder of diffusers, seen as the single file that the model's authors would write: nothing is computed.

A merge writes one file. With the names of a folder in it (`unet/conv_in.weight`) no program would load it.
"""

from __future__ import annotations

from dataclasses import replace

from sdops.archs.detect import detect
from sdops.errors import SdopsError
from sdops.verbs import _convert_extra
from sdops.verbs._convert_draft import Draft, single_file
from sdops.verbs._convert_output import assembled
from sdops.verbs._convert_select import select
from sdops.verbs._convert_wish import Wish
from sdops.verbs._inputs import Opened


def as_single_file(model: Opened) -> Opened:
    """The model in the original layout; as it is if that cannot be."""
    path = getattr(model.origin, "path", None)
    if path is None:
        return model
    extra = _convert_extra.open_extra(path)
    selection = select(model.source, model.detection)
    try:
        wish = Wish("original", unknown="keep")
        draft = single_file(model.source, model.detection, selection, wish, extra, relay=True)
    except SdopsError as error:
        note = f"`{model.name}` keeps the names of its folder: {error.message}"
        return replace(model, notes=(*model.notes, note))
    return _seen(model, draft)


def _seen(model: Opened, draft: Draft) -> Opened:
    metadata = dict(draft.metadata) or model.source.metadata
    source = assembled(model.source.name, draft.tensors, metadata)
    detection = detect(source.specs)
    before = {part.name: part for part in model.detection.components}
    layouts = {
        part.name: (before[part.name].layout, part.layout)
        for part in detection.components
        if part.name in before and before[part.name].layout != part.layout
    }
    notes = [f"`{key}` of `{model.name}` is left out: {why}" for key, why in draft.dropped.items()]
    return replace(model, source=source, detection=detection, layouts=layouts, notes=(*model.notes, *notes))
