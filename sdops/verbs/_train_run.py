"""A checked training, carried out: modules, latents, the loop, and the files that come out of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdops.errors import SdopsError
from sdops.report import Report, Section
from sdops.text import count, duration, size
from sdops.trainers import METHODS, trainer
from sdops.trainers._cards import TEXTS, VECTOR
from sdops.training import latents, sampling, state
from sdops.training.batches import Sample
from sdops.training.feeder import Feeder
from sdops.training.interruption import Interruption
from sdops.training.latent_store import LatentStore
from sdops.training.log import Log, read
from sdops.training.loop import Course as Loop
from sdops.training.method import Beginning, Method
from sdops.training.model import Model
from sdops.training.optimizer import Optimizer
from sdops.training.parameters import Parameters
from sdops.training.tokens import VOCABULARY, Tokens
from sdops.training.workers import Workers, join
from sdops.verbs._train_model import build, device_of, dtype_of
from sdops.verbs._train_plan import Course
from sdops.verbs._train_report import memory_of
from sdops.verbs._train_save import check_writable, write
from sdops.verbs.train import Say

_TELL_SECONDS = 5.0


def train(course: Course, report: Report, say: Say) -> Report:
    """Train, and complete the report.

    Raises:
        SdopsError: see `verbs.train.run`.
    """
    device = device_of(course.config.device)
    workers = join(device)
    if device.type == "cuda" and workers.size > 1:
        torch.cuda.set_device(workers.local)
        course = replace(course, config=replace(course.config, device=f"cuda:{workers.local}"))
    try:
        running = Running(course, workers, say if workers.rank == 0 else _silent)
        done = running.run()
        workers.wait()
    except torch.OutOfMemoryError as error:
        raise _too_large(course, device) from error
    finally:
        workers.close()
    return running.complete(report, done)


def _too_large(course: Course, device: torch.device) -> SdopsError:
    """The run needs more memory than the device has free."""
    config = course.config
    ways = {
        f"`--batch {max(config.batch // 2, 1)} --accumulate {config.accumulate * 2}`": config.batch > 1,
        "`--checkpointing`": not config.checkpointing,
        "`--dtype bf16`": config.dtype == "fp32",
        f"a `--resolution` below {config.resolution}": True,
    }
    whole = f" ({size(torch.cuda.mem_get_info(device)[1])})" if device.type == "cuda" else ""
    needed = size(memory_of(course, "fp32" if dtype_of(config.dtype, device) == torch.float32 else "bf16"))
    return SdopsError(
        f"the memory of `{device}` is not enough{whole}; this run needs about {needed}",
        hint=", ".join(way for way, helps in ways.items() if helps),
    )


def _silent(text: str) -> None:
    del text


@dataclass(eq=False)
class Running:
    """A training that runs.

    Attributes:
        course: What was checked.
        workers: This process among all.
        say: Tells the user something.
        outputs: Files that were written.
    """

    course: Course
    workers: Workers
    say: Say
    outputs: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        course, config = self.course, self.course.config
        self.model: Model = build(course.origin, config)
        self.method: Method = trainer(course.method)(self.model, config)
        self.parameters = Parameters(self.method.parameters(), self.model.device, self.model.dtype)
        self.optimizer = Optimizer(
            self.parameters,
            betas=(config.beta1, config.beta2),
            epsilon=config.adam_epsilon,
            clip=config.clip,
            decay=config.ema,
            scaled=self.model.dtype == torch.float16,
        )
        self.tokens = Tokens(course.words | self.method.words, VOCABULARY)
        self._identity = state.identity(
            course.method, config, course.plan.batch, self.parameters.names, course.folder.pictures
        )
        if METHODS[course.method].saves not in (TEXTS, VECTOR):
            check_writable(self.method.product(self._values()), course)
        self._start = self._resumed() if config.resume else 0

    def _values(self) -> dict[str, torch.Tensor]:
        """What is saved, on the CPU."""
        return {name: value.cpu() for name, value in self._views().items()}

    def _views(self) -> dict[str, torch.Tensor]:
        """What was learnt so far, or its moving average, float32."""
        return self.parameters.views(self.optimizer.average)

    def _resumed(self) -> int:
        found = state.load(self.course.state, self._identity)
        self.optimizer.load(found.tensors)
        self.say(f"going on after step {found.step}")
        return found.step

    def run(self) -> int:
        """Train; returns the steps done."""
        course, config = self.course, self.course.config
        begin = time.monotonic()
        feeder = self._feeder()
        pictures = [picture.path for picture in course.folder.pictures]
        self.method.begin(Beginning(feeder, pictures, self.parameters.views(), self._start))
        is_first = self.workers.rank == 0
        log = None
        if is_first:
            first = {"method": course.method, "settings": config.as_dict(), "model": course.origin.path.name}
            log = Log(course.log, first, self._start)
        teller = _Teller(self.say, config.steps, self._start)
        self.loop = Loop(
            self.method,
            config,
            self.parameters,
            self.optimizer,
            feeder,
            self.workers,
            log,
            self._validation(),
            self._save_between if is_first else _no_step,
            self._paint if is_first else _no_step,
            self.say,
            teller,
            start=self._start,
        )
        teller.loop = self.loop
        try:
            done = self._looped()
            if is_first:
                self._save(course.output, done)
                state.write(course.state, state.State(done, self.optimizer.state()), self._identity)
        finally:
            if log is not None:
                log.close()
        self.seconds = time.monotonic() - begin
        return done

    def _looped(self) -> int:
        """The steps. Ctrl-C saves what was learnt; processes that wait for each other end at once instead."""
        if self.workers.size > 1:
            return self.loop.run()
        with Interruption(lambda: self.say("ending after this step; once more ends at once")) as interruption:
            self.loop.ends = lambda: interruption.came
            done = self.loop.run()
        if done < self.loop.end:
            self.say(f"what was learnt in {count(done, 'step')} is saved; `--resume` goes on")
            interruption.act()
        return done

    def _feeder(self) -> Feeder:
        """Latents of all pictures, outputs of all texts; what made them is not needed afterwards but to paint."""
        course, config = self.course, self.course.config
        distinct = list(dict.fromkeys(course.plan.samples))
        self.say(f"reading {count(len(distinct), 'picture')} into latents")
        store = LatentStore(Path(config.latents), self.model) if config.latents else None
        cached = latents.make(self.model, course.folder.pictures, distinct, store)
        of_class: dict[Sample, latents.Latent] = {}
        if course.class_folder is not None:
            boxes = list(dict.fromkeys(sample.box for sample in distinct))
            pictures = course.class_folder.pictures
            wanted = [Sample(index, box) for box in boxes for index in range(len(pictures))]
            of_class = latents.make(self.model, pictures, wanted, store)
        feeder = Feeder(
            self.model,
            config,
            course.plan,
            cached,
            course.captions,
            self.tokens,
            self.method.encodes,
            self.workers.rank,
            self.workers.size,
            of_class,
        )
        encoded = feeder.encode_texts()
        if not (config.sample_prompts or self.method.decodes):  # samples need everything
            self.model.vae.to("meta")
            for encoder in self.model.encoders if encoded else ():
                encoder.module.to("meta")
        return feeder

    def _validation(self) -> list[Sample]:
        """The samples to measure on: spread over the folder, none mirrored."""
        plain = list(dict.fromkeys(sample for sample in self.course.plan.samples if not sample.mirrored))
        number = min(self.course.config.validation, len(plain))
        return [plain[index * len(plain) // number] for index in range(number)]

    # --------------------------------------------------------------------------------------------------------- files

    def _save_between(self, done: int) -> None:
        self._save(self.course.at_step(done), done)
        state.write(self.course.state, state.State(done, self.optimizer.state()), self._identity)

    def _save(self, path: Path, done: int) -> None:
        course, config = self.course, self.course.config
        product = self.method.product(self._values())
        force = config.force or config.resume or path != course.output
        written = write(product, course, path, done, force=force)
        self.outputs += [each for each in written if each not in self.outputs]

    def _paint(self, done: int) -> None:
        """Paint the sample prompts with what was learnt so far."""
        from PIL import Image

        config = self.course.config
        self.course.samples.mkdir(exist_ok=True)
        self.method.use(self.parameters.current(self.optimizer.average))
        side = config.resolution
        for index, prompt in enumerate(config.sample_prompts):
            text = prompt.replace("{}", " ".join(self.course.words))
            picture = sampling.paint(
                self.model, self.tokens, text, steps=config.sample_steps, seed=config.seed, size=(side, side)
            )
            pixels = ((picture.permute(1, 2, 0) + 1) * 127.5).round().numpy().astype(np.uint8)
            path = self.course.samples / f"step{done:06d}-{index}.png"
            Image.fromarray(pixels).save(path)
            self.outputs.append(path)

    def complete(self, report: Report, done: int) -> Report:
        """The report with what came out."""
        losses = {line["step"]: line["validation"] for line in read(self.course.log) if "validation" in line}
        rows = [["steps", f"{done:,} in {duration(self.seconds)}"]]
        if losses:
            first, last = min(losses), max(losses)
            rows.append([self.method.measured, f"{losses[first]:.6f} before, {losses[last]:.6f} after step {last}"])
        findings = self.method.findings(self._views())
        rows += [[name.replace("_", " "), f"{value:.2f}"] for name, value in findings.items()]
        rows += [["wrote", str(path)] for path in self.outputs]
        rows.append(["log", f"{self.course.log}"])
        report.data |= {
            "steps_done": done,
            "seconds": round(self.seconds, 3),
            **findings,
            "losses": {str(step): loss for step, loss in losses.items()},
            "outputs": [str(path) for path in self.outputs],
            "log": str(self.course.log),
            "state": str(self.course.state),
        }
        report.sections = [Section("Trained", rows)]
        report.result = [str(path) for path in self.outputs]
        if done < self.course.config.steps:
            report.hints.append("the run is not complete: go on with `--resume`")
        report.hints.append(f"`sdops train plot {self.course.log}` shows the curves")
        return report


def _no_step(done: int) -> None:
    del done


class _Teller:
    """Says now and then how far the run is."""

    loop: Loop

    def __init__(self, say: Say, steps: int, start: int) -> None:
        self._say, self._steps, self._done, self._start = say, steps, start, start
        self._begin = self._last = time.monotonic()

    def __call__(self, number: int) -> None:
        self._done += number
        now = time.monotonic()
        if now - self._last < _TELL_SECONDS:
            return
        self._last = now
        speed = (self._done - self._start) / (now - self._begin)
        left = duration((self._steps - self._done) / speed)
        told: dict[int, Any] = self.loop.losses
        loss = f", {self.loop.method.measured} {told[max(told)]:.5f}" if told else ""
        self._say(f"step {self._done:,} of {self._steps:,}, {speed:.2f} steps/s, {left} left{loss}")
