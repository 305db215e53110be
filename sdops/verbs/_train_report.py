"""What a checked training is, to be read before the first step: what was found, the prompts, what it takes."""

from __future__ import annotations

from sdops.report import Report, Section
from sdops.text import duration, size
from sdops.training.pictures import Picture
from sdops.verbs._train_origin import Origin
from sdops.verbs._train_plan import Course

# Bytes of activations per latent pixel in half precision: reported peaks (SD1.5 at 512, SDXL at 1024) less weights.
_ACTIVATIONS = {"sd1": 290_000, "sd2": 290_000, "sdxl": 520_000}
_KEPT = 0.25  # share of them that checkpointing keeps
# Multiply-adds of a forward pass per latent pixel: 402 G at 64 x 64 (SD1), 2,980 G at 128 x 128 (SDXL).
_WORK = {"sd1": 98e6, "sd2": 98e6, "sdxl": 182e6}
_GPU, _CPU = 100.0, 0.1  # TFLOP/s: of a fast GPU in bf16, of some cores in fp32
_SHOWN = 5


def report_of(course: Course) -> Report:
    """What was found, the prompts, and what it takes."""
    config, plan = course.config, course.plan
    boxes = course.folder.buckets(config.resolution, config.bucket_step, squares=not config.buckets)
    per_step = config.batch * config.accumulate * (plan.batch // config.batch)
    dtypes = ("bf16", "fp32") if config.dtype == "auto" else (config.dtype,)
    memory, work = {dtype: memory_of(course, dtype) for dtype in dtypes}, work_of(course)
    facts = [
        ["model", f"{course.origin.path.name}: {course.origin.title}, predicts {course.origin.prediction}"],
        ["pictures", _found(course)],
        ["sizes", ", ".join(f"{width}x{height}: {number}" for (width, height), number in boxes.most_common(_SHOWN))],
        ["samples", f"{len(plan.samples):,} an epoch, {per_step} a step; batches of an epoch: {plan.batches:,}"],
        ["learns", f"{course.parameters:,} numbers"],
        ["steps", f"{config.steps:,} = {config.steps * per_step / max(len(plan.samples), 1):.1f} epochs"],
        ["memory", "about " + ", ".join(f"{size(bytes_)} in {dtype}" for dtype, bytes_ in memory.items())],
        ["time", f"about {_time(work, config.steps, _GPU)} on a fast GPU, {_time(work, config.steps, _CPU)} on a CPU"],
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
        "memory": max(memory.values()),
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


def _time(work: float, steps: int, speed: float) -> str:
    return duration(work * steps / speed)


def memory_of(course: Course, dtype: str) -> int:
    """Bytes that the device needs at most, about: weights, what learns with its moments, activations."""
    config, origin = course.config, course.origin
    width = 4 if dtype == "fp32" else 2
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
    return float(course.config.resolution / course.origin.cell) ** 2


def _relative(origin: Origin) -> float:
    """Width of the UNet against that of the full model."""
    return float(max(origin.configs["unet"]["block_out_channels"])) / 1280
