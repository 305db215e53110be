"""Everything about a training that can be known before the first step, without torch: what was found, what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sdops.core.sink import check_parent, check_space, check_target
from sdops.dialects.peft import CONFIG
from sdops.errors import OutputError, UsageError
from sdops.text import count
from sdops.trainers import METHODS
from sdops.trainers._named import words_of
from sdops.training import pictures as look_at
from sdops.training.batches import Plan, Sample
from sdops.training.config import Config, settings_of
from sdops.training.pictures import Folder, Picture
from sdops.training.tokens import CHUNK, VOCABULARY, Tokens
from sdops.verbs._adapter_path import check_place, workplace
from sdops.verbs._train_origin import Origin
from sdops.verbs._train_output import files_of, place_of

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "auto": 4}


@dataclass(slots=True)
class Course:
    """A training that was checked.

    Attributes:
        method: Name of the trainer.
        config: Settings, with the resolution filled in.
        origin: The model.
        folder: Of the pictures.
        class_folder: Of pictures of the class, to preserve it.
        plan: Which samples when.
        captions: Of every picture, the new words in place.
        words: New word -> vectors.
        output: The file.
        to: Dialect or layout.
        parameters: Numbers that learn.
        warnings: What the user should know.
    """

    method: str
    config: Config
    origin: Origin
    folder: Folder
    class_folder: Folder | None
    plan: Plan
    captions: list[str]
    words: dict[str, int]
    output: Path
    to: str
    parameters: int
    warnings: list[str] = field(default_factory=list)

    @property
    def stem(self) -> Path:
        """What the files beside the output begin with: its name without the ending, of PEFT that of its folder."""
        folder = self.output.parent
        return folder if self.to == "peft" and folder.name else self.output.with_suffix("")

    @property
    def log(self) -> Path:
        """Where the log goes."""
        return self._beside(".jsonl")

    @property
    def state(self) -> Path:
        """Where the state goes, to go on from."""
        return self._beside(".state.safetensors")

    @property
    def samples(self) -> Path:
        """The folder of painted samples."""
        return self._beside("-samples")

    def at_step(self, step: int) -> Path:
        """The output as it is after so many steps."""
        end = f"-step{step:06d}"
        return self._beside(end) / self.output.name if self.to == "peft" else self._beside(end + self.output.suffix)

    def _beside(self, end: str) -> Path:
        return self.stem.with_name(self.stem.name + end)


def check(method: str, config: Config, origin: Origin, ranks: int = 1) -> Course:
    """Look at everything that the run needs.

    Raises:
        SdopsError: whatever would go wrong.
    """
    config = replace(config, resolution=config.resolution or origin.resolution)
    _check_settings(config, origin)
    words = words_of(config) if any(each.name == "tokens" for each in settings_of(method)) else {}
    template = config.template or ("a photo of {}" if words else "")
    folder = look_at.look(_folder(config.images), caption=config.caption, template=template, masks=config.masks)
    look_at.check(folder, config.masks)
    plan = Plan(tuple(_samples(folder.pictures, config)), config.batch * ranks, config.seed)
    captions = [(picture.caption or "").replace("{}", " ".join(words)) for picture in folder.pictures]
    METHODS[method].check(config, folder.pictures)
    output, to = place_of(method, config, list(words), folder, len(origin.encoders))
    shapes = {name: origin.shapes(place) for name, place in {"unet": "unet", **origin.encoders}.items()}
    course = Course(
        method,
        config,
        origin,
        folder,
        _class_folder(config),
        plan,
        captions,
        words,
        output,
        to,
        METHODS[method].numbers(config, shapes),
    )
    _check_words(course)
    _check_output(course)
    _warn(course)
    return course


def _folder(name: str) -> Path:
    if not name:
        raise UsageError("the folder of the pictures is not named", hint="`--images FOLDER`, or `images = ...`")
    return Path(name)


def _class_folder(config: Config) -> Folder | None:
    if not config.class_images:
        return None
    if not config.class_prompt:
        raise UsageError("pictures of the class need their caption", hint="e.g. `--class-prompt 'a photo of a dog'`")
    found = look_at.look(Path(config.class_images), caption="template", template=config.class_prompt)
    look_at.check(found)
    return found


def _samples(pictures: Sequence[Picture], config: Config) -> list[Sample]:
    found = []
    for index, picture in enumerate(pictures):
        box = look_at.bucket_of(picture.size, config.resolution, config.bucket_step, squares=not config.buckets)
        ways = [Sample(index, box), Sample(index, box, True)] if config.flip else [Sample(index, box)]
        found += ways * config.repeats
    return found


# ------------------------------------------------------------------------------------------------------------ checks


def _check_settings(config: Config, origin: Origin) -> None:
    """Refuse settings that make no sense together, or with this model."""
    side, step, cell = config.resolution, config.bucket_step, origin.cell
    if config.least_step > config.most_step:
        told = f"`least_step` {config.least_step} is behind `most_step` {config.most_step}: no noise step is left"
        raise UsageError(told, hint="steps go from 0 (no noise) to 999", key="least_step")
    if config.sample_every and not config.sample_prompts:
        raise UsageError(
            "samples are to be painted, but there are no prompts",
            hint="`--sample-prompts 'a photo of ...'`",
            key="sample_prompts",
        )
    if config.zero_terminal_snr and origin.prediction == "epsilon":
        raise UsageError(
            f"`{origin.path}` predicts noise, and a last step of nothing but noise says nothing about it",
            hint="`zero_terminal_snr` is for v prediction; a model that predicts v: `--prediction v`",
            key="zero_terminal_snr",
        )
    if config.clip_skip > (most := min(origin.layers(place) for place in origin.encoders.values()) - 2):
        raise UsageError(f"`clip_skip` is {config.clip_skip}, of this model's at most {most}", key="clip_skip",
                         hint="1 is what is called CLIP skip 2 elsewhere")  # fmt: skip
    if config.buckets and step > side:
        raise UsageError(
            f"sides of pictures are multiples of {step}, more than the resolution of {side}",
            hint=f"e.g. `--bucket-step {max(side // 8, 8)}`",
            key="bucket_step",
        )
    name, value = ("bucket_step", step) if config.buckets else ("resolution", side)
    if value % cell:
        raise UsageError(
            f"`{name}` is {value}, and the VAE makes squares of {cell} pixels", hint=f"a multiple of {cell}", key=name
        )


def _check_words(course: Course) -> None:
    """Refuse a word that no caption has: nothing would be learnt."""
    if not course.words:
        return
    tokens = Tokens(course.words, VOCABULARY)
    found = [set(tokens.names(caption)) for caption in course.captions]
    for word in course.words:
        having = sum(word in names for names in found)
        if not having:
            raise UsageError(
                f"no caption has the new word `{word}`, so nothing would be learnt for it",
                hint="write it, or `{}`, into the captions, or use `--caption template --template 'a photo of {}'`",
                word=word,
            )
        if having < len(found):
            course.warnings.append(f"{count(len(found) - having, 'caption')} without the new word `{word}`")


def _check_output(course: Course) -> None:
    """Refuse an output that is there, or has no room."""
    config = course.config
    force = config.force or config.resume
    if course.to == "peft":
        check_place(course.output, (CONFIG,), force=force)
    else:
        for path in files_of(course.method, course.output, course.to, list(course.words)):
            check_target(path, force=force)
    if config.resume and not course.state.is_file():
        raise UsageError(f"there is nothing to go on with: no `{course.state}`", hint="leave `--resume` away to begin")
    if course.state.exists() and not (config.force or config.resume):
        raise OutputError(
            f"`{course.state}` is the state of a run that was begun",
            hint="`--resume` goes on with it, `--force` begins anew",
            path=course.state,
        )
    copies = 1 + (config.steps // config.save_every if config.save_every else 0)
    state = course.parameters * 4 * (4 if config.ema else 3)
    output = course.parameters * _BYTES[config.save_dtype]
    check_space(workplace(course.output) / course.output.name, copies * output + state)
    if config.latents:
        _check_latents(course, Path(config.latents))


def _check_latents(course: Course, folder: Path) -> None:
    """Refuse a folder for latents that is none, or has no room."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"`{folder}` is no folder", hint="`--latents` names the folder to keep latents in")
    target = check_parent(folder / "latents" if folder.is_dir() else folder)
    pixels = sum(sample.box[0] * sample.box[1] for sample in dict.fromkeys(course.plan.samples))
    numbers = (
        2 * course.origin.shapes("unet")["conv_in.weight"][1] * pixels // course.origin.cell**2
    )  # means and deviations
    check_space(target, 4 * numbers)


def _warn(course: Course) -> None:
    tokens = Tokens(course.words, VOCABULARY)
    most = course.config.chunks * CHUNK
    long = [caption for caption in course.captions if len(tokens.of(caption)) > most]
    if long:
        course.warnings.append(
            f"{count(len(long), 'caption')} longer than {most} tokens; what follows is not seen (`--most-tokens`)"
        )
    resolution = course.config.resolution
    small = [p for p in course.folder.pictures if look_at.enlarged(p.size, resolution) > 1.05]
    if small:
        course.warnings.append(f"{count(len(small), 'picture')} smaller than {resolution}^2, to be enlarged")
    if course.folder.strays:
        course.warnings.append(f"{count(len(course.folder.strays), 'caption file')} without picture")
    empty = sum(not caption for caption in course.captions)
    if empty:
        course.warnings.append(f"{count(empty, 'caption')} without any text")
