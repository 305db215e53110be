"""Add LoRAs to a model's weights.

sdops.apply("model.safetensors", lora=["style.safetensors:0.8"], output="styled.safetensors")     writes a file
lazy = sdops.apply("model.safetensors", lora=[("style.safetensors", 0.8)])                        a Source
sdops.merge(lazy, "other.safetensors", alpha=0.3, output="both.safetensors")                      one pass
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdops import __version__
from sdops.core.accel import check_device
from sdops.core.run import default_jobs
from sdops.core.sink import check_inputs
from sdops.errors import UsageError
from sdops.report import Progress, Report, silent
from sdops.verbs._apply_base import check_architectures, check_matched, foreign_base, open_base, output_of, unpacked
from sdops.verbs._apply_loras import Lora, Wish, open_loras
from sdops.verbs._apply_output import INDEX, SUFFIX, is_file, is_folder, is_pipeline, is_sharded, save, sink_of, stem_of
from sdops.verbs._apply_report import done_report, dry_report
from sdops.verbs._hashes import part_record
from sdops.verbs._inputs import Model, Opened
from sdops.verbs._provenance import LONGEST_NAME, RECIPE, compact, metadata

if TYPE_CHECKING:
    from sdops.core.applied import Applied
    from sdops.core.chain import Link, Links
    from sdops.verbs.merge import Merge

DTYPES = {"keep": "", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}
ROUNDINGS = ("nearest", "stochastic")
DORA = ("lerp", "peft")
_DEFAULTS = {
    "dtype": "keep",
    "touched_dtype": "keep",
    "rounding": "nearest",
    "seed": 0,
    "dora_strength": "lerp",
    "sequential": False,
    "allow_unmatched": False,
    "architecture": None,
    "allow_unknown": False,
}


def apply(
    model: Model,
    *,
    lora: Sequence[Wish],
    output: str | os.PathLike[str] | None = None,
    dtype: str = "keep",
    touched_dtype: str = "keep",
    rounding: str = "nearest",
    seed: int = 0,
    dora_strength: str = "lerp",
    sequential: bool = False,
    allow_unmatched: bool = False,
    allow_unknown: bool = False,
    architecture: str | None = None,
    jobs: int | None = None,
    device: str = "cpu",
    force: bool = False,
    hash_inputs: bool = True,
    progress: Progress = silent,
) -> Apply | Report:
    """Add LoRAs, and their relatives of all families and dialects, to a model's weights.

    W' = round(W + sum_l t_l b_l delta_l): all deltas are made from the original weights, added up in float32, and the
    sum is rounded once. t is a LoRA's strength and b its block weight; both are linear for all families, DoRA included:
    W + t (W' - W).

    Args:
        model: A path or Source: a checkpoint of any layout, or some of its components.
        lora: For each LoRA its path, `"PATH:STRENGTH"` (see `_apply_loras` for block weights and components), or a pair
            of path and strength. A strength is a dial: a number, or one per block, component or pattern.
        output: Where to write: a file, `NAME.safetensors.index.json` for shards, or, if the model is a folder of
            diffusers, a folder. None returns the result as a Source without writing anything.
        dtype: Of the result: keep (as the model's, per tensor), fp32, fp16 or bf16.
        touched_dtype: The same for the tensors that a LoRA changes alone.
        rounding: nearest, or stochastic: on average nothing of a small change is lost, at the cost of noise.
        seed: Of stochastic rounding.
        dora_strength: lerp, or peft: what DoRA adds is scaled before its norm, as PEFT does.
        sequential: Families whose change depends on the weight see it with the LoRAs before, as in ComfyUI.
        allow_unmatched: Leave out layers that the model does not have.
        allow_unknown: Leave out tensors of an adapter that are not understood.
        architecture: What the LoRAs were made for (sd1, sdxl, flux1 ...), where files do not tell.
        jobs: Threads; default: one per core.
        device: cpu, or cuda: plain LoRAs of large tensors are added on a GPU. Products are summed in another order
            there, so some elements in a hundred thousand may be rounded to the other neighbour.
        force: Replace an existing output.
        hash_inputs: Record the inputs' SHA-256 (remembered between runs).
        progress: Called as `progress(label, total_bytes)`.

    Returns:
        A report if `output` is given, else a lazy `Apply`.

    Raises:
        UsageError: an unknown word, a malformed strength, or no LoRA.
        MismatchError: a LoRA is for another architecture, has layers that the model lacks, or does not fit its shapes.
        FormatError: an input is damaged, holds NaN, or is not understood.
        OutputError: the output exists, is an input, or does not fit on the disk.
    """
    for option, value, allowed in (
        ("dtype", dtype, DTYPES),
        ("touched_dtype", touched_dtype, DTYPES),
        ("rounding", rounding, ROUNDINGS),
        ("dora_strength", dora_strength, DORA),
    ):
        if value not in allowed:
            raise UsageError(f"`{option}` cannot be `{value}`", hint=f"choose one of {', '.join(allowed)}")
    if device != "cpu":
        check_device(device)
    if not lora:
        raise UsageError("no LoRA was given", hint="name one with `--lora FILE:STRENGTH`")
    settings = {
        "dtype": dtype,
        "touched_dtype": touched_dtype,
        "rounding": rounding,
        "seed": seed,
        "dora_strength": dora_strength,
        "sequential": sequential,
        "allow_unmatched": allow_unmatched,
        "architecture": architecture,
        "allow_unknown": allow_unknown,
    }
    opened, folder = open_base(model), None
    if is_pipeline(opened):
        from sdops.verbs._folder_model import as_single_file

        opened, folder = as_single_file(opened), opened
    loras = open_loras(lora, opened, allow_unknown=allow_unknown, architecture=architecture)
    made = Apply(opened, loras, settings, folder=folder)
    made.use(device)
    if output is None:
        return made
    return made.save(output, jobs=jobs, force=force, hash_inputs=hash_inputs, progress=progress)


def on_merge(made: Merge, wide: Merge, lora: Sequence[Wish]) -> Apply:
    """LoRAs on a merge in progress: what they change is merged as float32, so that all of it is rounded once.

    Args:
        made: The merge as it would be written.
        wide: The same as float32.
        lora: As for `apply`.

    Raises:
        UsageError, MismatchError, FormatError: as `apply`.
    """
    opened = open_base(made)
    loras = open_loras(lora, opened, allow_unknown=False)
    result = Apply(opened, loras, _DEFAULTS, Opened(wide, wide, opened.detection))
    result.verb = "merge"
    result.made["rounded"] = "once"  # LoRAs on a merge that was rounded before give other numbers
    result.metadata[RECIPE] = compact(result.made)
    result.warnings[:0] = made.plan.warnings
    return result


class Apply:
    """A model with LoRAs, planned: a Source of the result, which `save` writes to a file. Made by `apply`.

    Args:
        model: The model as it is written where nothing changes.
        loras: What is added, in order.
        settings: The options of `apply`.
        wide: The same model with more digits, for the weights that change: a merge in progress as float32.
        folder: The model as the folder of diffusers that it is, for outputs that are folders, too.

    Attributes:
        parts: The inputs by role: model, lora1, lora2 ...
        changes: What every tensor gains.
        made: The recipe, with placeholders for hashes.
        warnings: What the user should know, one sentence each.
        verb: Of reports: `merge` where the model is one in progress.

    Raises:
        MismatchError: as `apply`.
    """

    def __init__(
        self,
        model: Opened,
        loras: Sequence[Lora],
        settings: Mapping[str, Any],
        wide: Opened | None = None,
        folder: Opened | None = None,
    ) -> None:
        from sdops.verbs._apply_changes import Changes  # numpy

        self.verb = "apply"
        self.device = "cpu"
        self.model = model
        self.loras = loras
        self.settings = settings
        self.folder = folder
        self.parts = {"model": model, **{f"lora{i}": lora.opened for i, lora in enumerate(loras, start=1)}}
        check_architectures(loras, model)
        self.changes = Changes(wide or model, loras, peft_dora=settings["dora_strength"] == "peft")
        check_matched(loras, self.changes, model, allowed=settings["allow_unmatched"])
        self.warnings = unpacked(model) + [
            text for lora in loras for text in (*lora.adapter.notes, *foreign_base(lora, model))
        ]
        self.made = self._recipe()
        self.name = self.derived_name()
        self._wide = wide
        self.computed = self._computed()
        self.specs = self.computed.specs
        names = [model.name, *(lora.name for lora in loras)]
        title = self.name.removesuffix(INDEX).removesuffix(SUFFIX)
        self.metadata = metadata(model.source.metadata, model.detection.modelspec, title, names, self.made)

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Compute bytes of a tensor."""
        self.computed.read_into(key, start, buffer)

    def piece_bytes(self, key: str) -> int:
        """Portions in which `key` is computed."""
        return self.computed.piece_bytes(key)

    def splits(self, key: str) -> bool:
        """Whether threads may share the tensor."""
        return self.computed.splits(key)

    def link(self, key: str, links: Links) -> Link | None:
        """How `key` is made of other tensors, for merges of this; see core.chain."""
        return self.computed.link(key, links)

    def close(self) -> None:
        """Close the inputs."""
        for part in self.parts.values():
            part.source.close()

    def use(self, device: str) -> None:
        """Compute on `cpu` or `cuda` from now on."""
        if device != self.device:
            self.device = device
            self.computed = self._computed()

    def derived_name(self) -> str:
        """What the output is called when nobody names it: `model+style0.8.safetensors`, of shards their index."""
        suffix = "" if self.folder or is_folder(self.model) else INDEX if is_sharded(self.model) else SUFFIX
        stems = [stem_of(self.model), *(Path(lora.name).stem + lora.spelled for lora in self.loras)]
        encoded = os.fsencode("+".join(stems))
        return os.fsdecode(encoded[: LONGEST_NAME - len(suffix)]) + suffix

    def check(self, output: str | os.PathLike[str], *, force: bool = False) -> None:
        """Everything that can be known to go wrong before a tensor of the model is read.

        Raises:
            OutputError: the output exists, is an input or cannot be written.
            FormatError: a LoRA holds NaN or infinity.
        """
        from sdops.verbs._adapter_source import check_finite  # numpy

        path = Path(output)
        check_inputs(path, [file for part in self.parts.values() for leaf in part.leaves() for file in leaf.files])
        made = self._for(path)
        sink_of(made.specs, made.model, path, self.metadata, force=force)
        for lora in self.loras:
            check_finite(lora.adapter)

    def save(
        self,
        output: str | os.PathLike[str],
        *,
        jobs: int | None = None,
        force: bool = False,
        hash_inputs: bool = True,
        progress: Progress = silent,
    ) -> Report:
        """Write the result.

        Args:
            output: As of `apply`; the folder that it lies in must exist.
            jobs: Threads; default: one per core.
            force: Replace an existing file.
            hash_inputs: Record the inputs' SHA-256, computed beside the work if they are not remembered.
            progress: Called as `progress(label, total_bytes)`.

        Raises:
            OutputError, FormatError, ChangedError: as `apply`.
        """
        made = self._for(Path(output))
        if made is not self:
            return made.save(output, jobs=jobs, force=force, hash_inputs=hash_inputs, progress=progress)
        self.check(output, force=force)
        begin = time.monotonic()
        self.computed = self._computed()  # counts begin at zero
        recipe = save(
            self.computed, list(self.parts.values()), Path(output), self.metadata,
            jobs=jobs or default_jobs(), force=force, hash_inputs=hash_inputs, progress=progress,
        )  # fmt: skip
        return done_report(self, Path(output), time.monotonic() - begin, json.loads(recipe))

    def dry_run(self, output: str | os.PathLike[str], *, force: bool = False, jobs: int | None = None) -> Report:
        """What `save` would do, after the same checks."""
        self.check(output, force=force)
        return dry_report(self._for(Path(output)), Path(output), jobs or default_jobs())

    def _for(self, output: Path) -> Apply:
        """The same for an output that is a folder, where that is asked for."""
        if self.folder is None or is_file(output):
            return self
        made = Apply(self.folder, self.loras, self.settings)
        made.use(self.device)
        return made

    def _computed(self) -> Applied:
        """The Source that does the work."""
        seed = self.settings["seed"] if self.settings["rounding"] == "stochastic" else None
        dtypes = DTYPES[self.settings["dtype"]], DTYPES[self.settings["touched_dtype"]]
        weights = (self._wide or self.model).source
        sequential = self.settings["sequential"]
        made = output_of(self.model, weights, self.changes, dtypes, sequential=sequential, seed=seed)
        if self.device == "cpu":
            return made
        from sdops.core.applied_on_device import AppliedOnDevice

        return AppliedOnDevice(
            made.source, made.changes, device=self.device, weights=made.weights, sequential=sequential, seed=seed
        )

    def _recipe(self) -> dict[str, Any]:
        """Everything needed to make the file again; defaults are left out."""
        own = {name: value for name, value in self.settings.items() if value != _DEFAULTS[name] or name == "seed"}
        if self.settings["rounding"] == "nearest":
            own.pop("seed")
        strengths = [{}, *({"strength": lora.strength.to_json()} for lora in self.loras)]
        inputs = [
            part_record(role, part) | more for (role, part), more in zip(self.parts.items(), strengths, strict=True)
        ]
        return {"version": __version__, "verb": "apply", **own, "inputs": inputs}
