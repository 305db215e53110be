"""The loop: the only one, whatever is trained."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor

from sdops.errors import SdopsError
from sdops.training import graphs, rates
from sdops.training.batches import Sample
from sdops.training.config import Config
from sdops.training.feeder import Batch, Feeder
from sdops.training.log import Log
from sdops.training.method import Method
from sdops.training.optimizer import Optimizer
from sdops.training.parameters import Parameters
from sdops.training.workers import Workers

_LOOK_EVERY = 10  # steps on a GPU between two looks at the losses: every look waits for the device
_VALIDATION_STEPS = tuple(range(62, 1000, 125))


class DivergedError(SdopsError):
    """The loss or its gradient is NaN or infinite."""


@dataclass(eq=False)
class Course:
    """A training and what goes on around it.

    Attributes:
        method, config, parameters, optimizer, feeder, workers: What there is.
        log: Of the first process; None in the others.
        validation: Samples to measure the loss on.
        save: Called with the number of steps done; writes the output and the state.
        paint: Called with the number of steps done; paints samples.
        note: Tells the user something.
        advance: Told of every step.
        ends: Asked after every step whether the run is to end; what was learnt is then saved.
        start: Steps that were done before.
        losses: Step -> validation loss, of this process' part of the run.
    """

    method: Method
    config: Config
    parameters: Parameters
    optimizer: Optimizer
    feeder: Feeder
    workers: Workers
    log: Log | None
    validation: Sequence[Sample]
    save: Callable[[int], None]
    paint: Callable[[int], None]
    note: Callable[[str], None]
    advance: Callable[[int], None] = lambda _: None
    ends: Callable[[], bool] = lambda: False
    start: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    _pending: list[tuple[int, float, Tensor]] = field(default_factory=list)

    @property
    def end(self) -> int:
        """The step after which the run is over."""
        return min(self.config.until or self.config.steps, self.config.steps)

    def run(self) -> int:
        """Train; returns the number of steps done.

        Raises:
            DivergedError: the loss or the gradient is not finite; the values from before were saved.
        """
        end, take = self.end, self._stepper()
        if self.start == 0:
            self._validate(0)
        done, last = self.start, time.monotonic()
        for step in range(self.start, end):
            self._seed(step)
            self.optimizer.set_rates(self._rate(step), step)
            loss = take(step)
            done = step + 1
            now = time.monotonic()
            told = torch.stack([loss, self.optimizer.norm, self.optimizer.stopped])
            self._pending.append((done, now - last, told))
            last = now
            self.advance(1)
            if self._between(done, end):
                break
        return done

    def _between(self, done: int, end: int) -> bool:
        """What happens after a step; whether the run ends with it, before its time."""
        config = self.config
        ends = done < end and self.ends()
        saves = ends or (bool(config.save_every) and done % config.save_every == 0 and done < end)
        paints = bool(config.sample_prompts) and (done == end or done % (config.sample_every or end) == 0)
        measures = bool(config.validate_every) and (done % config.validate_every == 0 or done == end)
        is_cpu = self.feeder.model.device.type == "cpu"
        if is_cpu or saves or paints or measures or done == end or done % _LOOK_EVERY == 0:
            self._look()
        if measures:
            self._validate(done)
        if saves:
            self.save(done)
        if paints:
            self.paint(done)
        return ends

    def _rate(self, step: int) -> float:
        config = self.config
        return rates.factor(
            step,
            config.steps,
            config.schedule,
            warmup=config.warmup,
            least=config.least_lr,
            cycles=config.cycles,
        )

    def _seed(self, step: int) -> None:
        """Dropout draws from torch's own numbers; everything else has numbers of its own."""
        if self.config.dropout:
            text = f"{self.config.seed} dropout {step} {self.workers.rank}"
            torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little"))

    # ------------------------------------------------------------------------------------------------------- one step

    def _stepper(self) -> Callable[[int], Tensor]:
        """What takes a step and returns its loss, the mean over all processes; recorded where that is possible."""
        config, device = self.config, self.feeder.model.device
        whole, part = self._whole, self._part
        reason = graphs.why_not(
            device,
            repeats=self.method.repeats,
            dropout=bool(config.dropout),
            checkpointing=config.checkpointing,
        )
        if config.graph and not reason:
            whole = graphs.Graphs(whole, [*self.optimizer.everything(), self.parameters.gradient], self.note)
            part = graphs.Graphs(part, [self.parameters.gradient], self.note)
        elif config.graph and device.type == "cuda":
            self.note(f"no CUDA graph, so steps are launched one by one, which is slower: {reason}")
        if config.accumulate == 1 and self.workers.size == 1:
            return lambda step: whole(self.feeder.batch(step))
        return lambda step: self._joined(part, step)

    def _whole(self, batch: Batch) -> Tensor:
        """A step of one batch in one process."""
        loss = self._part(batch)
        self._optimize(loss)
        return loss

    def _joined(self, part: Callable[[Batch], Tensor], step: int) -> Tensor:
        """A step of several batches, or in several processes."""
        number = self.config.accumulate
        losses = [part(self.feeder.batch(step * number + index)).clone() for index in range(number)]
        loss = self.workers.mean(torch.stack(losses).sum())
        self.workers.average(self.parameters.gradient)
        self._optimize(loss)
        return loss

    def _part(self, batch: Batch) -> Tensor:
        """Add up the gradient of one batch; returns its part of the loss."""
        self.method.use(self.parameters.current())
        loss = (self.method.loss(batch) * batch.shares).sum() / self.config.accumulate
        (loss * self.optimizer.scale).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _optimize(self, loss: Tensor) -> None:
        self.optimizer.step(loss)
        with torch.no_grad():
            self.method.after_step(self.parameters.views())
            self.optimizer.follow()
            if self.optimizer.average is not None:
                self.method.after_step(self.parameters.views(self.optimizer.average))

    # ------------------------------------------------------------------------------------------------ looking at it

    def _look(self) -> None:
        """Write what happened since the last look to the log.

        Raises:
            DivergedError: it was not finite.
        """
        if not self._pending:
            return
        numbers = torch.stack([told for _, _, told in self._pending]).tolist()  # waits for the device, once
        for (done, seconds, _), (loss, norm, stopped) in zip(self._pending, numbers, strict=True):
            if stopped:
                self._stop(done)
            if self.log is not None:
                norm_told = norm if isfinite(norm) else None  # float16 looks for its scale
                rate = self._rate(done - 1)
                self.log.write(
                    {"step": done, "loss": loss, "norm": norm_told, "rate": rate, "seconds": round(seconds, 6)}
                )
        self._pending.clear()

    def _stop(self, step: int) -> None:
        good = step - 1
        if good > self.start:
            self.save(good)
        if self.log is not None:
            self.log.write({"step": good, "stopped": "the loss or its gradient is not finite"})
        kept = f"the values after step {good} were saved" if good > self.start else "nothing was learnt before"
        raise DivergedError(
            f"the loss or its gradient became NaN or infinite in step {step}; {kept}",
            hint="a lower `--lr`, `--dtype fp32`, or a look at the pictures with `sdops dataset check`",
            step=step,
        )

    @torch.no_grad()
    def measure(self) -> float:
        """The loss with noise that never changes, not weighed: mean over the samples and eight noise steps.

        Or what the method measures in its place; of what would be saved.
        """
        self.method.use(self.parameters.current(self.optimizer.average))
        own = self.method.measure(self.parameters.views(self.optimizer.average))
        if own is not None:
            return own
        groups: dict[tuple[int, int], list[Sample]] = {}
        for sample in self.validation:
            groups.setdefault(sample.box, []).append(sample)
        found: list[Tensor] = []
        for group in groups.values():
            for step in _VALIDATION_STEPS:
                for start in range(0, len(group), self.config.batch):
                    part = group[start : start + self.config.batch]
                    found.append(self.method.loss(self.feeder.fixed(part, step, start)))
        return float(torch.cat(found).cpu().double().mean())

    def _validate(self, done: int) -> None:
        if self.config.validate_every and self.log is not None:
            self.losses[done] = self.measure()
            self.log.write({"step": done, "validation": self.losses[done]})
