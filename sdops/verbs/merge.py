"""Merge checkpoints.

sdops.merge("a.safetensors", "b.safetensors", alpha=0.3, output="c.safetensors")     writes a file
lazy = sdops.merge("a.safetensors", "b.safetensors", alpha=0.3)                      a Source, nothing read yet
sdops.merge(lazy, "c.safetensors", alpha=0.1).save("d.safetensors")                  one pass, no file between
sdops.merge("a.safetensors", "b.safetensors", lora=["x.safetensors:0.8"])            so is this, with LoRAs on top
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdops.card import Card, find
from sdops.core.accel import check_device
from sdops.core.dial import Dial
from sdops.core.method import load
from sdops.core.run import default_jobs, run
from sdops.core.sink import SafetensorsSink, check_inputs, check_target
from sdops.errors import OutputError, UsageError
from sdops.report import Progress, Report, silent
from sdops.verbs._adapter_peek import are_adapters
from sdops.verbs._hashes import Hashes, part_record
from sdops.verbs._inputs import Model, Opened, alike, check_families, open_model, same_names
from sdops.verbs._knobs import check_knobs, parse_knobs
from sdops.verbs._memory import whole_tensor_memory
from sdops.verbs._merge_adapters_wish import request
from sdops.verbs._merge_report import done_report, dry_report
from sdops.verbs._merge_request import check_count
from sdops.verbs._pairing import Pairing, Policy
from sdops.verbs._provenance import RECIPE, derived_name, metadata, recipe, with_hashes, without_hashes
from sdops.verbs._swap import swap

if TYPE_CHECKING:
    from sdops.core.chain import Link, Links
    from sdops.core.merged import Merged
    from sdops.core.spec import Spec
    from sdops.verbs._apply_loras import Wish
    from sdops.verbs.apply import Apply

DTYPES = {"keep": "", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}
MISSING = ("error", "keep", "drop")
PASSES = {"gram": 2, "ranked": 3, "model": 2}  # over the inputs; one for all others
SWAPS = {"vae": "vae", "text_encoder": "text_encoder"}  # role -> kind of component that the file replaces


def merge(
    *models: Model,
    method: str = "weighted-sum",
    base: Model | None = None,
    output: str | os.PathLike[str] | None = None,
    dtype: str = "keep",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    missing: str = "error",
    vae: Model | None = None,
    text_encoder: Model | None = None,
    lora: Sequence[Wish] = (),
    prune: bool = False,
    seed: int = 0,
    jobs: int | None = None,
    memory: int | None = None,
    device: str = "cpu",
    force: bool = False,
    hash_inputs: bool = True,
    progress: Progress = silent,
    **knobs: Any,
) -> Merge | Apply | Report:
    """Merge models into one.

    Args:
        models: Paths or Sources, in the order of the method's inputs. If all are LoRAs or their relatives, the rest is
            as in verbs/_merge_adapters.py.
        method: Name of a merge method; `sdops methods` lists them.
        base: The common ancestor, for methods that have one.
        output: Where to write; None returns the merge as a Source without writing anything.
        dtype: Of the result: keep (as the first model's, per tensor), fp32, fp16 or bf16.
        include: Merge only tensors that match one of these patterns, copy the first model's others.
        exclude: Copy the first model's tensors that match one of these patterns.
        missing: Tensors that not all models have: error, keep (copy) or drop.
        vae: A file whose VAE replaces the result's, or is added; in its own dtype unless `dtype` says another.
        text_encoder: A file whose text encoders replace the result's, or are added; likewise.
        lora: LoRAs to add to the result, as `sdops.apply` takes them; merge and LoRAs are rounded together, once.
        prune: Leave out EMA weights, noise schedules and other ballast.
        seed: For random methods.
        jobs: Threads; default: one per core.
        memory: Bytes to stay below.
        device: cpu, or cuda: large tensors are merged on a GPU, with the same bytes as on the CPU.
        force: Replace an existing output.
        hash_inputs: Record the inputs' SHA-256 (remembered between runs).
        progress: Called as `progress(label, total_bytes)`.
        knobs: The method's knobs. A float knob may be a number, a mapping of blocks, components or patterns to
            numbers, a list of block weights, or the text form of these (see core.dial).

    Returns:
        A report if `output` is given, else a lazy `Merge`, or `Apply` with LoRAs.

    Raises:
        UsageError: unknown method, knob or pattern, or a wrong number of models.
        MismatchError: the models do not fit each other.
        FormatError: an input is damaged.
        OutputError: the output exists, is an input, or does not fit on the disk.
    """
    if device != "cpu":
        check_device(device)
    if are_adapters(models):
        options: dict[str, Any] = {
            "base": base,
            "dtype": dtype,
            "include": include,
            "exclude": exclude,
            "missing": missing,
            "vae": vae,
        }
        options |= {"text_encoder": text_encoder, "lora": lora, "prune": prune, "seed": seed, "memory": memory}
        return _merged_adapters(
            models,
            request(method, options | knobs),
            output,
            device=device,
            jobs=jobs,
            force=force,
            hash_inputs=hash_inputs,
            progress=progress,
        )
    card = find(method)
    check_knobs(card, knobs)
    _check_request(card, len(models), base is not None, dtype, missing)
    parts = _open_parts(models, base, {"vae": vae, "text_encoder": text_encoder})
    policy = Policy(DTYPES[dtype], tuple(include), tuple(exclude), missing, prune)
    parsed = parse_knobs(card, knobs, parts["a"].detection, len(models))
    if device != "cpu" and card.execution != "linear":
        from sdops.core.on_device import check_method

        check_method(card.name, card.execution)
    merged = Merge(card, parts, parsed, policy, seed=seed, memory=memory, device=device)
    made: Merge | Apply = merged
    if lora:
        from sdops.verbs.apply import on_merge

        wide = Merge(card, parts, parsed, replace(policy, dtype="F32"), seed=seed, memory=memory, device=device)
        made = on_merge(merged, wide, lora)
        made.use(device)
    if output is None:
        return made
    return made.save(output, jobs=jobs, force=force, hash_inputs=hash_inputs, progress=progress)


def _merged_adapters(
    models: Sequence[Model], options: Mapping[str, Any], output: str | os.PathLike[str] | None, **others: Any
) -> Report:
    """LoRAs go another way: it is their changes that are merged, not their tensors."""
    from sdops.verbs._merge_adapters import merge_adapters

    if output is None:
        raise UsageError("LoRAs are merged into a file, not lazily", hint='give `output="both.safetensors"`')
    return merge_adapters(models, **options, output=output, **others)


class Merge:
    """A planned merge: a Source of its result, which `save` writes to a file. Made by `merge`.

    Attributes:
        card: The method.
        parts: The inputs by role: a, b, c ..., base, vae, text_encoder.
        knobs: The method's knobs as given; float ones as dials.
        plan: What will be written and how each tensor comes about.
        made: The recipe, with placeholders for hashes.
    """

    def __init__(
        self,
        card: Card,
        parts: Mapping[str, Opened],
        knobs: Mapping[str, Any],
        policy: Policy,
        *,
        seed: int = 0,
        memory: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.card = card
        self.parts = parts
        self.knobs = knobs
        self.policy = policy
        self.memory = memory
        self.device = device
        self._seed = seed
        self._jobs = default_jobs()
        self._computed: Merged | None = None
        self._is_saved = False
        self._lock = threading.Lock()
        inputs = [model for role, model in parts.items() if role not in SWAPS]
        linear = load(f"sdops.merges.{card.name}", card.execution, card.needs) if card.execution == "linear" else None
        self.plan = Pairing(inputs, parts["a"], card, linear, knobs, policy).build(self.derived_name())
        self.plan.warnings[:0] = [text for part in parts.values() for text in part.warnings()]
        for role, kinds in SWAPS.items():
            if role in parts:
                swap(self.plan, parts["a"], parts[role], kinds, policy)
        self.plan.passes = PASSES.get(card.execution, 2 if "gram" in card.needs else 1)
        self.made = recipe(card, self._settings(), [part_record(role, model) for role, model in parts.items()], seed)
        names = [part.name for part in inputs]
        first = parts["a"]
        self.plan.metadata = metadata(
            first.source.metadata, first.detection.modelspec, Path(self.plan.name).stem, names, self.made
        )
        self.name = self.plan.name
        specs = self.plan.steps.specs
        alike = list(specs.items()) == list(first.source.specs.items())
        self.specs: Mapping[str, Spec] = first.source.specs if alike else specs  # a recipe holds many of these
        self.metadata: Mapping[str, str] = self.plan.metadata

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Compute bytes of a tensor."""
        step = self.plan.steps[key]
        if step.action == "copy":  # plans of other merges look at small tensors, before anything is computed
            step.inputs[0].source.read_into(step.inputs[0].key, start, buffer)
        else:
            self.computed.read_into(key, start, buffer)

    def pour(self, key: str, start: int, stop: int, file: int, position: int) -> bool:
        """Compute bytes of a tensor right into a file, if that can be; see core.merged."""
        return self.computed.pour(key, start, stop, file, position)

    def piece_bytes(self, key: str) -> int:
        """Portions in which `key` is computed."""
        return self.computed.piece_bytes(key)

    def splits(self, key: str) -> bool:
        """Whether threads may share the tensor."""
        return self.computed.splits(key)

    def link(self, key: str, links: Links) -> Link | None:
        """How `key` is made of other tensors, for merges of this one; see core.chain."""
        return self.computed.link(key, links)

    def close(self) -> None:
        """Close the inputs."""
        for part in self.parts.values():
            part.source.close()

    @property
    def computed(self) -> Merged:
        """The Source that does the work, made when something is read: it needs numpy, or torch."""
        with self._lock:
            if self._computed is None:
                from sdops.core.merged import Merged

                method = load(f"sdops.merges.{self.card.name}", self.card.execution, self.card.needs)
                memory = whole_tensor_memory(self, self._jobs)
                if self.device == "cpu":
                    computed = Merged(
                        self.plan, method, seed=self._seed, memory=memory, sampled=self._is_saved, specs=self.specs
                    )
                else:
                    from sdops.core.on_device import MergedOnDevice

                    computed = MergedOnDevice(self.plan, method, device=self.device, seed=self._seed, memory=memory)
                computed.check_knobs()
                self._computed = computed
            return self._computed

    def derived_name(self) -> str:
        """What the file is called when nobody names it."""
        models = [model.name for role, model in self.parts.items() if role not in (*SWAPS, "base")]
        dtype = next(name for name, spelled in DTYPES.items() if spelled == self.policy.dtype)
        return derived_name(self.card, models, self.knobs, "" if dtype == "keep" else dtype)

    def check(self, output: str | os.PathLike[str], *, force: bool = False, jobs: int | None = None) -> None:
        """Everything that can be known to go wrong before a tensor is read.

        Raises:
            OutputError: the output exists, is an input or cannot be written.
            UsageError: the memory does not suffice.
        """
        path = _file_path(output)
        check_inputs(path, [file for part in self.parts.values() for leaf in part.leaves() for file in leaf.files])
        check_target(path, force=force)
        whole_tensor_memory(self, jobs or default_jobs())

    def save(
        self,
        output: str | os.PathLike[str],
        *,
        jobs: int | None = None,
        force: bool = False,
        hash_inputs: bool = True,
        progress: Progress = silent,
    ) -> Report:
        """Write the result to a file.

        Args:
            output: The file; its folder must exist.
            jobs: Threads; default: one per core.
            force: Replace an existing file.
            hash_inputs: Record the inputs' SHA-256, computed beside the merge if they are not remembered.
            progress: Called as `progress(label, total_bytes)`.

        Raises:
            OutputError, FormatError, ChangedError: as `merge`.
        """
        from sdops.core import native
        from sdops.core.blas import one_thread
        from sdops.core.heap import stay_small

        self.check(output, force=force, jobs=jobs)
        begin = time.monotonic()
        self._jobs = jobs or default_jobs()
        self._computed, self._is_saved = None, True  # counts begin at zero
        if native.library() is not None:  # else numpy's temporaries are many and large, and new memory takes time
            stay_small()
        computed = self.computed
        metadata = dict(self.metadata)
        if not hash_inputs:
            metadata[RECIPE] = without_hashes(metadata[RECIPE])
        with SafetensorsSink(Path(output), self.specs, metadata, force=force) as sink:
            with Hashes(self.parts.values(), enabled=hash_inputs) as hashes:
                with progress("merging", sink.nbytes) as advance, one_thread():
                    run(computed, sink, jobs=self._jobs, progress=advance)
                digests = hashes.wait(progress)
            for part in self.parts.values():
                part.check_unchanged()
            if hash_inputs:
                metadata[RECIPE] = with_hashes(metadata[RECIPE], digests)
            sink.commit({RECIPE: metadata[RECIPE]})
        return done_report(self, Path(output), time.monotonic() - begin, json.loads(metadata[RECIPE]))

    def dry_run(self, output: str | os.PathLike[str], *, force: bool = False, jobs: int | None = None) -> Report:
        """What `save` would do, after the same checks."""
        self.check(output, force=force, jobs=jobs)
        return dry_report(self, Path(output), jobs or default_jobs())

    def _settings(self) -> dict[str, Any]:
        """Knobs and policies for the recipe; defaults of policies are left out."""
        knobs = {name: value.to_json() if isinstance(value, Dial) else value for name, value in self.knobs.items()}
        policy = {
            "dtype": next(name for name, spelled in DTYPES.items() if spelled == self.policy.dtype),
            "include": list(self.policy.include),
            "exclude": list(self.policy.exclude),
            "missing": self.policy.missing,
            "prune": self.policy.prune,
        }
        default = {"dtype": "keep", "include": [], "exclude": [], "missing": "error", "prune": False}
        return {"knobs": knobs, **{name: value for name, value in policy.items() if value != default[name]}}


def _check_request(card: Card, count: int, base: bool, dtype: str, missing: str) -> None:
    """Refuse a wrong number of models and unknown words, before any file is opened."""
    check_count(card, count, base)
    for option, value, allowed in (("dtype", dtype, DTYPES), ("missing", missing, MISSING)):
        if value not in allowed:
            raise UsageError(f"`{option}` cannot be `{value}`", hint=f"choose one of {', '.join(allowed)}")


def _open_parts(models: Sequence[Model], base: Model | None, swaps: Mapping[str, Model | None]) -> dict[str, Opened]:
    """Open all inputs, in the order of the method's parameters, and make them comparable with the first model."""
    roles = [chr(ord("a") + i) if i < 26 else f"model{i + 1}" for i in range(len(models))]
    opened = {role: open_model(model) for role, model in zip(roles, models, strict=True)}
    if base is not None:
        opened = {"base": open_model(base), **opened}
    first = opened["a"] = _as_written(opened["a"])
    check_families(first, [part for part in opened.values() if part is not first])
    opened = {role: part if part is first else alike(part, first) for role, part in opened.items()}
    for role, model in swaps.items():
        if model is not None:
            opened[role] = same_names(open_model(model), first, SWAPS[role])
    return opened


def _as_written(first: Opened) -> Opened:
    """The first model, whose names the output has: a folder's as a single file would have them."""
    if not any(part.prefix.endswith("/") for part in first.detection.components):
        return first
    from sdops.verbs._folder_model import as_single_file

    return as_single_file(first)


def _file_path(output: str | os.PathLike[str]) -> Path:
    """An output as a path; what ends in a slash is meant to be a folder, which `Path` would forget.

    Raises:
        OutputError: it ends in a slash.
    """
    path = Path(output)
    if os.fspath(output).endswith(os.sep):
        making = "" if path.is_dir() else f"`mkdir -p {path}`, then "
        raise OutputError(f"`{output}` is a folder, not a file", hint=f"{making}`-o {path}/NAME.safetensors`")
    return path
