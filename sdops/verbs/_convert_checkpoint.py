"""Convert a checkpoint: a plan from headers alone, then one pass of copying ranges of bytes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from sdops import __version__, standin
from sdops.archs.detect import MARKER, Detection, detect
from sdops.archs.junk import is_ema
from sdops.core.run import default_jobs, run
from sdops.core.sink import Sink
from sdops.core.source import Source
from sdops.core.spec import FP8
from sdops.errors import FormatError
from sdops.formats import FileSource, open_source
from sdops.formats.sharded import SHARD
from sdops.report import Progress, Report
from sdops.text import count
from sdops.verbs import _convert_extra
from sdops.verbs._convert_draft import Draft, Entry, restore_header, single_file, vae_scale
from sdops.verbs._convert_dtypes import casts, wanted_dtypes
from sdops.verbs._convert_layout import check_fit
from sdops.verbs._convert_order import as_inputs_lie
from sdops.verbs._convert_output import (
    assembled,
    carried_metadata,
    check_ending,
    check_output,
    extra_tensors,
    file_sink,
    folder_sink,
)
from sdops.verbs._convert_report import done, planned
from sdops.verbs._convert_select import Selection, select, take
from sdops.verbs._convert_wish import ALL, DTYPES, Wish
from sdops.verbs._space import lacking_space

FilePath = str | os.PathLike[str]
_ENDINGS = {"ckpt": ".ckpt", "gguf": ".gguf", "diffusers": ""}
_WORDS = {dtype: word for word, dtype in DTYPES.items()}


class Conversion:
    """A planned conversion of a checkpoint.

    Args:
        origin: The opened model.
        donors: Files that components are taken from, each with its role: unet, vae or text_encoder.
        output: Where to write; None derives a name.
        wish: The request.
        force: Replace an existing output.

    Attributes:
        draft: Every tensor of the output.
        tensors: The same, and those of the side file.
        dtypes: Those that shall be cast, and to which dtype.
        cast: Tensor -> the type that its numbers had, and the other that they get: dtypes, or types of GGUF.
        sink: The output, not begun.

    Raises:
        UsageError, MismatchError, FormatError, OutputError: it cannot be done.
    """

    def __init__(
        self,
        origin: FileSource,
        donors: Sequence[tuple[str, FileSource]],
        output: Path | None,
        wish: Wish,
        *,
        force: bool = False,
    ) -> None:
        self.origin, self.donors, self.wish = origin, donors, wish
        self.name = origin.name
        self.path = output or derived_name(origin.path, wish)
        self.warnings = [*origin.warnings, *(line for _, donor in donors for line in donor.warnings)]
        self.is_folder = origin.path.is_dir()
        self.extra = _convert_extra.open_extra(origin.path) if self.is_folder else None
        self.relay = wish.to in ("diffusers", "original") or (origin.path / "model_index.json").is_file()
        self.source, self.detection = self._readable(origin)
        main = self.detection.main
        if wish.to == "gguf" and main and main.kind == "model":
            self.relay = True  # programs look for the original names in GGUF files
        check_output(self.path, [file for each in self._inputs() for file in each.files])
        check_ending(self.path, wish.to)
        self.draft = self._draft()
        self.dtypes: dict[str, str] = {}
        self.cast: dict[str, tuple[str, str]] = {}
        self.tensors = dict(self.draft.tensors)
        self.lazy, self.sink = self._sink(force=force)

    def save(self, *, jobs: int | None = None, progress: Progress) -> Report:
        """Write the output.

        Raises:
            OutputError: it cannot be written.
            ChangedError: an input changed meanwhile.
            FormatError: with `strict`, a value is too large for its new dtype.
        """
        begin = time.monotonic()
        standin.prepare(file for each in self._inputs() for file in each.files)
        with self.sink:
            order = as_inputs_lie(self.sink, self.tensors) if standin.is_streaming() else self.sink
            with progress("converting", self.sink.nbytes) as advance:
                run(self.lazy, order, jobs=jobs or default_jobs(), progress=advance)
            for each in self._inputs():
                each.check_unchanged()
            counts = self._counts()
            self._check_strict(counts)
            self.sink.commit()
        return done(self, time.monotonic() - begin, counts)

    def dry_run(self) -> Report:
        """What `save` would do, after the same checks."""
        report = planned(self)
        report.data["dry_run"] = True
        report.warnings += lacking_space(self.sink.path, self.sink.nbytes)
        report.hints.append("nothing was written; leave `--dry-run` away to convert")
        return report

    def close(self) -> None:
        """Close the inputs."""
        for each in self._inputs():
            each.close()
        if self.extra is not None:
            self.extra.source.close()

    def _inputs(self) -> list[FileSource]:
        return [self.origin, *(donor for _, donor in self.donors)]

    def _readable(self, origin: Source) -> tuple[Source, Detection]:
        """The model, its fp8 weights multiplied by their scales if the scales cannot come along."""
        if check := getattr(origin, "check_readable", None):
            check()
        detection = detect(origin.specs)
        scaled = [key for key, how in detection.quantised.items() if how.kind != "fp8"]
        if not scaled or not (self.relay or self.wish.dtypes or self.wish.to == "gguf"):
            return origin, detection
        only_fp8 = all(how.kind in ("fp8", "fp8-scaled") for how in detection.quantised.values())
        if not only_fp8 or not (ALL in self.wish.dtypes or self.wish.to == "gguf"):
            why = (
                "its scales cannot come along without `--dtype fp16`"
                if only_fp8
                else "its numbers are codes, not weights"
            )
            hint = "that multiplies them in" if only_fp8 else "convert the unquantised model"
            kind = detection.quantised[scaled[0]].kind
            raise FormatError(
                f"`{origin.name}` is quantised ({kind}, `{scaled[0]}`): {why}",
                hint=f"{hint}; `sdops inspect` shows what a file holds",
                key=scaled[0],
            )
        from sdops.core.views import Dequantised

        source = Dequantised(origin)
        return source, detect(source.specs)

    def _draft(self) -> Draft:
        wish = self.wish
        to_gguf = wish.to == "gguf"
        components = wish.components or (self._only() if to_gguf else ())
        aside = self.extra is not None and wish.to != "diffusers" and any(map(is_ema, self.extra.tensors))
        ema = "drop" if wish.ema == "use" and aside else wish.ema  # the average in the side file is put in later
        selection = select(self.source, self.detection, components=components, ema=ema, prune=wish.prune or to_gguf)
        if self.donors:
            self._take_components(selection)
        if to_gguf:
            self._leave_to_gguf(selection)
        if wish.to == "diffusers":
            from sdops.verbs._convert_folder import folder, same_folder

            if self.is_folder:
                return same_folder(self.source, self.detection, selection, wish, self.extra, self.origin.path)
            return folder(self.source, self.detection, selection, wish)
        draft = single_file(self.source, self.detection, selection, wish, self.extra, relay=self.relay)
        if self.extra is not None and wish.keeps_everything and not self.donors:
            restore_header(draft, self.extra)
        draft.metadata = carried_metadata(self.extra.metadata if self.extra else self.source.metadata, self._made())
        return draft

    def _take_components(self, selection: Selection) -> None:
        """Take components from the donors, and refuse those that do not fit."""
        from sdops.pipelines.tables import pipeline

        whole = pipeline(self.detection.family)
        for role, donor in self.donors:
            kind = "model" if role == "unet" else role
            before = {each.name: each for each in selection.parts}
            readable, detection = self._readable(donor)
            take(selection, readable, detection, kind, whole.components if whole else ())
            scales = {vae_scale(self.detection.family), vae_scale(detection.family)} - {None}
            if kind == "vae" and len(scales) > 1:
                selection.notes.append(f"`{donor.name}` is {detection.title}, whose latents this model does not know")
            for each in selection.parts:
                if each.source is not self.source and each.name in before:
                    check_fit(before[each.name], each, donor.name)

    def _only(self) -> list[str]:
        """A GGUF file holds one model."""
        main = self.detection.main
        return [main.name] if main else []

    def _leave_to_gguf(self, selection: Selection) -> None:
        """Drop other components and what GGUF cannot hold: tensors without numbers, texts in bytes."""
        from sdops.core.ggml import PLAIN

        kept = {each.name for each in selection.parts}
        others = [part for part in self.detection.components if part.name not in kept]
        if not self.wish.components and others:
            alone = f"a GGUF file holds the {', '.join(kept)} alone"
            selection.dropped |= dict.fromkeys((key for part in others for key in part.keys), alone)
        for key in [key for key, kind in selection.others.items() if kind == MARKER]:
            spec = selection.elsewhere.get(key, self.source).specs[key]
            if not spec.numel or spec.dtype not in PLAIN:
                del selection.others[key]
                selection.dropped[key] = "a GGUF file cannot hold it"
                selection.notes.append(f"`{key}`, which says something of the model, has no place in a GGUF file")

    def _sink(self, *, force: bool) -> tuple[Source, Sink]:
        """The chain of Sources, and where it ends."""
        draft, wish = self.draft, self.wish
        tensors = self.tensors
        if wish.to == "diffusers":
            tensors |= self._side_file()
        self.dtypes = wanted_dtypes(tensors, self.detection, wish) if wish.dtypes else {}
        source: Source = assembled(self.name, tensors)
        weights = {
            key: dtype for key, dtype in self.dtypes.items() if wish.scaled and dtype in FP8 and key.endswith(".weight")
        }
        cast = {key: dtype for key, dtype in self.dtypes.items() if key not in weights}
        if cast:
            from sdops.core.cast_view import Cast

            source = Cast(source, cast, seed=wish.seed)
        self._cast = source
        if weights:
            source = self._scaled(source, weights)
        sink: Sink
        if wish.to == "diffusers":
            sink = folder_sink(source, draft, self.path, wish, force=force)
        else:
            source, sink = file_sink(source, draft, self.path, wish, self.detection.family, force=force)
        self.cast = casts(tensors, source)
        return source, sink

    def _scaled(self, source: Source, weights: Mapping[str, str]) -> Source:
        """Weights as fp8 with scales, which are told as invented."""
        from sdops.core.quantised_views import Quantised

        quantised = Quantised(
            source,
            weights,
            spelling="old" if self.wish.scaled == "old" else "new",
            prefixes=dict.fromkeys(key.removesuffix(self.draft.tensors[key].name) for key in weights),
            seed=self.wish.seed,
        )
        new = [key for key in quantised.specs if key not in source.specs]
        self.draft.invented |= dict.fromkeys(new, "scales of fp8 weights and what tells of them")
        return quantised

    def _side_file(self) -> dict[str, Entry]:
        """The tensors of the side file; sets its metadata. Folders of others need none."""
        draft, extra = self.draft, self.extra
        if self.is_folder and extra is None:
            return {}
        places = extra.components if extra else draft.places
        invented = extra.invented if extra else list(draft.invented)
        metadata = extra.metadata if extra else self.source.metadata
        header = extra.header if extra else _convert_extra.raw_header(self.source)
        if not self.wish.keeps_everything or self.donors:
            header = b""
        draft.metadata = _convert_extra.describe(places, invented, {} if header else metadata)
        return extra_tensors(draft, header)

    def _made(self) -> dict[str, Any] | None:
        """The recipe, if numbers change."""
        wish = self.wish
        if wish.keeps_everything and not self.donors and wish.to != "gguf":
            return None
        from sdops.verbs._hashes import reference_of

        told: dict[str, Any] = {"version": __version__, "verb": "convert", "to": wish.to}
        usual = Wish(wish.to)
        for name in ("dtype", "include", "exclude", "components", "ema", "prune", "unknown", "prefix", "seed"):
            if (value := getattr(wish, name)) != getattr(usual, name):
                told[name] = value
        first: dict[str, Any] = {"role": "a", "file": self.name}
        if made := getattr(self.origin, "recipe", None):  # of what was never written
            first["recipe"] = made
        elif recipe := self.source.metadata.get("sdops"):
            first["made"] = recipe
        inputs = [first, *({"role": role, "file": donor.name} for role, donor in self.donors)]
        for item, source in zip(inputs, self._inputs(), strict=True):
            if "recipe" not in item and (reference := reference_of(source.files)):
                item["hub"] = reference
        return told | {"inputs": inputs}

    def _counts(self) -> Mapping[str, Any]:
        """Tensor -> what casting it met; of a GGUF file what packing it did."""
        return getattr(self._cast, "counts", {}) | getattr(self.lazy, "counts", {})

    def _check_strict(self, counts: Mapping[str, Any]) -> None:
        overflow = [key for key, each in counts.items() if each.overflow]
        if self.wish.strict and overflow:
            raise FormatError(
                f"values of {count(len(overflow), 'tensor')} are too large for the new dtype, first in `{overflow[0]}`",
                hint="`--dtype bf16` holds them; without `--strict` they are clamped",
                keys=overflow,
            )


def derived_name(path: Path, wish: Wish) -> Path:
    """What the output is called when nobody names it: in this folder, after the input and what was done to it."""
    shard = SHARD.fullmatch(path.name)
    stem = path.resolve().name if path.is_dir() else path.stem.removesuffix(".safetensors.index")
    stem = shard["stem"] if shard else stem
    dtype = wish.gguf_type if wish.to == "gguf" else _WORDS.get(wish.dtypes.get(ALL, ""), "")
    done = {"ema": wish.ema == "use", "no-ema": wish.ema == "drop", "pruned": wish.prune}
    words = [stem, dtype, *(word for word, so in done.items() if so), "-".join(wish.components)]
    return Path(".".join(filter(None, words)) + _ENDINGS.get(wish.to, ".safetensors"))


def open_all(
    file: FilePath | Source, donors: Sequence[tuple[str, FilePath | Source]]
) -> tuple[FileSource, list[tuple[str, FileSource]]]:
    """Open a model and the files that components are taken from; Sources are taken as they are."""
    return _opened(file), [(role, _opened(donor)) for role, donor in donors]


def _opened(file: FilePath | Source) -> FileSource:
    if isinstance(file, str | os.PathLike):
        return open_source(file)
    if hasattr(file, "check_unchanged"):
        return cast("FileSource", file)
    from sdops.verbs._convert_source import Unfiled

    return cast("FileSource", Unfiled(file))
