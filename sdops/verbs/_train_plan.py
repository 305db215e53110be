"""Everything about a training that can be known before the first step, without torch: what was found, what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdops.core.sink import check_parent, check_space, check_target
from sdops.errors import OutputError, UsageError
from sdops.report import Report, Section
from sdops.text import count, size
from sdops.trainers import METHODS
from sdops.trainers._named import words_of
from sdops.training import pictures as look_at
from sdops.training.batches import Plan, Sample
from sdops.training.config import Config, settings_of
from sdops.training.pictures import Folder, Picture
from sdops.training.tokens import CHUNK, VOCABULARY, Tokens
from sdops.verbs._train_origin import Origin
from sdops.verbs._train_output import files_of, place_of

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "auto": 4}
# Bytes of activations per latent pixel in half precision: reported peaks (SD1.5 at 512, SDXL at 1024) less weights.
_ACTIVATIONS = {"sd1": 290_000, "sd2": 290_000, "sdxl": 520_000}
_KEPT = 0.25  # share of them that checkpointing keeps
# Multiply-adds of a forward pass per latent pixel: 402 G at 64 x 64 (SD1), 2,980 G at 128 x 128 (SDXL).
_WORK = {"sd1": 98e6, "sd2": 98e6, "sdxl": 182e6}
_SHOWN = 5


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
    def log(self) -> Path:
        """Where the log goes."""
        return self.output.with_suffix(".jsonl")

    @property
    def state(self) -> Path:
        """Where the state goes, to go on from."""
        return self.output.with_name(f"{self.output.stem}.state.safetensors")

    @property
    def samples(self) -> Path:
        """The folder of painted samples."""
        return self.output.with_name(f"{self.output.stem}-samples")

    def at_step(self, step: int) -> Path:
        """The output as it is after so many steps."""
        return self.output.with_name(f"{self.output.stem}-step{step:06d}{self.output.suffix}")


def check(method: str, config: Config, origin: Origin, ranks: int = 1) -> Course:
    """Look at everything that the run needs.

    Raises:
        SdopsError: whatever would go wrong.
    """
    words = words_of(config) if any(each.name == "tokens" for each in settings_of(method)) else {}
    template = config.template or ("a photo of {}" if words else "")
    folder = look_at.look(_folder(config.images), caption=config.caption, template=template, masks=config.masks)
    look_at.check(folder, config.masks)
    resolution = config.resolution or origin.resolution
    if config.buckets and config.bucket_step > resolution:
        raise UsageError(
            f"sides of pictures are multiples of {config.bucket_step}, more than the resolution of {resolution}",
            hint=f"e.g. `--bucket-step {max(resolution // 8, 8)}`",
            key="bucket_step",
        )
    plan = Plan(tuple(_samples(folder.pictures, config, resolution)), config.batch * ranks, config.seed)
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
    _warn(course, resolution)
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


def _samples(pictures: Sequence[Picture], config: Config, resolution: int) -> list[Sample]:
    found = []
    for index, picture in enumerate(pictures):
        box = look_at.bucket_of(picture.size, resolution, config.bucket_step, squares=not config.buckets)
        ways = [Sample(index, box), Sample(index, box, True)] if config.flip else [Sample(index, box)]
        found += ways * config.repeats
    return found


# ------------------------------------------------------------------------------------------------------------ checks


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
            course.warnings.append(f"{count(len(found) - having, 'caption')} do not have the new word `{word}`")


def _check_output(course: Course) -> None:
    """Refuse an output that is there, or has no room."""
    config = course.config
    for path in files_of(course.method, course.output, course.to, list(course.words)):
        check_target(path, force=config.force or config.resume)
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
    check_space(course.output.resolve(), copies * output + state)
    if config.latents:
        _check_latents(course, Path(config.latents))


def _check_latents(course: Course, folder: Path) -> None:
    """Refuse a folder for latents that is none, or has no room."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"`{folder}` is no folder", hint="`--latents` names the folder to keep latents in")
    target = check_parent(folder / "latents" if folder.is_dir() else folder)
    cell = _cell(course.origin)
    pixels = sum(sample.box[0] * sample.box[1] for sample in dict.fromkeys(course.plan.samples))
    numbers = 2 * course.origin.shapes("unet")["conv_in.weight"][1] * pixels // cell**2  # means and deviations
    check_space(target, 4 * numbers)


def _warn(course: Course, resolution: int) -> None:
    tokens = Tokens(course.words, VOCABULARY)
    most = course.config.chunks * CHUNK
    long = [caption for caption in course.captions if len(tokens.of(caption)) > most]
    if long:
        course.warnings.append(
            f"{count(len(long), 'caption')} longer than {most} tokens; what follows is not seen (`--most-tokens`)"
        )
    small = [p for p in course.folder.pictures if look_at.enlarged(p.size, resolution) > 1.05]
    if small:
        course.warnings.append(f"{count(len(small), 'picture')} are smaller than {resolution}^2 and are enlarged")
    if course.folder.strays:
        course.warnings.append(f"{count(len(course.folder.strays), 'caption file')} have no picture")
    config = course.config
    if config.zero_terminal_snr and course.origin.prediction == "epsilon":
        course.warnings.append("a zero terminal SNR makes sense with v prediction only: the last step has no signal")


# ------------------------------------------------------------------------------------------------------------ report


def report_of(course: Course) -> Report:
    """What was found, the prompts, and what it takes."""
    config, plan = course.config, course.plan
    boxes = course.folder.buckets(config.resolution or course.origin.resolution, config.bucket_step,
                                  squares=not config.buckets)  # fmt: skip
    per_step = config.batch * config.accumulate * (plan.batch // config.batch)
    memory, work = memory_of(course), work_of(course)
    facts = [
        ["model", f"{course.origin.path.name}: {course.origin.title}, predicts {course.origin.prediction}"],
        ["pictures", _found(course)],
        ["sizes", ", ".join(f"{width}x{height}: {number}" for (width, height), number in boxes.most_common(_SHOWN))],
        ["samples", f"{len(plan.samples):,} an epoch, {per_step} a step, {plan.batches:,} batches an epoch"],
        ["learns", f"{course.parameters:,} numbers"],
        ["steps", f"{config.steps:,} = {config.steps * per_step / max(len(plan.samples), 1):.1f} epochs"],
        ["memory", f"about {size(memory)} (weights, what learns, activations)"],
        ["work", f"about {work:.2g} TFLOP a step, {work * config.steps / 3.6e5:.2g} h at 100 TFLOP/s"],
        ["output", f"{course.output} ({course.to})"],
    ]
    prompts = [[picture.path.name, picture.origin, text] for picture, text in _some(course)]
    data = {
        "method": course.method,
        "settings": config.as_dict(),
        "family": course.origin.family,
        "prediction": course.origin.prediction,
        "pictures": len(course.folder.pictures),
        "buckets": {f"{width}x{height}": number for (width, height), number in boxes.items()},
        "parameters": course.parameters,
        "memory": memory,
        "teraflops_per_step": work,
        "prompts": [text for _, _, text in prompts],
        "output": str(course.output),
    }
    sections = [Section("Training", facts), Section("Prompts", prompts, ["picture", "from", "prompt"])]
    return Report(f"train {course.method}", data, sections, warnings=list(course.warnings))


def _found(course: Course) -> str:
    origins = {picture.origin for picture in course.folder.pictures}
    masked = sum(picture.mask is not None for picture in course.folder.pictures)
    text = f"{len(course.folder.pictures):,} in {course.folder.path}, captions from {', '.join(sorted(origins))}"
    if course.class_folder is not None:
        text += f"; {len(course.class_folder.pictures)} of the class"
    return text + (f"; {masked} masks" if masked else "")


def _some(course: Course) -> list[tuple[Picture, str]]:
    pairs = list(zip(course.folder.pictures, course.captions, strict=True))
    step = max(1, len(pairs) // _SHOWN)
    return pairs[::step][:_SHOWN]


def memory_of(course: Course) -> int:
    """Bytes that the device needs at most, about."""
    config, origin = course.config, course.origin
    width = _BYTES[config.dtype]
    weights = origin.numbers("unet") * width
    weights += sum(origin.numbers(place) for place in origin.encoders.values()) * width
    activations = _ACTIVATIONS[origin.family] * _relative(origin) * _pixels(course) * config.batch * width / 2
    activations *= (_KEPT if config.checkpointing else 1.0) * (2 if course.class_folder else 1)
    return round(weights + course.parameters * 4 * 4 + activations)


def work_of(course: Course) -> float:
    """TFLOP of a step: forward, the gradient through every layer, and little for what learns."""
    config, origin = course.config, course.origin
    number = config.batch * config.accumulate * (2 if course.class_folder else 1)
    passes = 3.0 if config.checkpointing else 2.0
    return 2 * _WORK[origin.family] * _relative(origin) ** 2 * _pixels(course) * number * passes / 1e12


def _pixels(course: Course) -> float:
    return float((course.config.resolution or course.origin.resolution) / _cell(course.origin)) ** 2


def _cell(origin: Origin) -> int:
    """Pixels of a latent's side."""
    return int(2 ** (len(origin.configs["vae"]["block_out_channels"]) - 1))


def _relative(origin: Origin) -> float:
    """Width of the UNet against that of the full model."""
    return float(max(origin.configs["unet"]["block_out_channels"])) / 1280
