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
    start: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    _pending: list[tuple[int, float, Tensor, Tensor]] = field(default_factory=list)

    def run(self) -> int:
        """Train; returns the number of steps done.

        Raises:
            DivergedError: the loss or the gradient is not finite; the values from before were saved.
        """
        config = self.config
        end = min(config.until or config.steps, config.steps)
        take = self._stepper()
        if self.start == 0:
            self._validate(0)
        last = time.monotonic()
        for step in range(self.start, end):
            self._seed(step)
            self.optimizer.set_rates(self._rate(step), step)
            loss = take(step)
            done = step + 1
            now = time.monotonic()
            self._pending.append((done, now - last, loss.detach().clone(), self.optimizer.norm.clone()))
            last = now
            self.advance(1)
            self._between(done, end)
        return max(end, self.start)

    def _between(self, done: int, end: int) -> None:
        """What happens after a step."""
        config = self.config
        saves = bool(config.save_every) and done % config.save_every == 0 and done < end
        paints = bool(config.sample_every) and done % config.sample_every == 0
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
        """Eager, or with recorded graphs where that is possible."""
        config, device = self.config, self.feeder.model.device
        reason = graphs.why_not(
            device,
            accumulate=config.accumulate,
            ranks=self.workers.size,
            dropout=config.dropout,
            checkpointing=config.checkpointing,
        )
        if not config.graph or reason:
            if config.graph and device.type == "cuda":
                self.note(f"no CUDA graph, so steps are launched one by one, which is slower: {reason}")
            return self._eager
        recorded = graphs.Graphs(self._whole, list(self.optimizer.state().values()))

        def take(step: int) -> Tensor:
            if self._graphs_failed:
                return self._eager(step)
            try:
                return recorded(self.feeder.batch(step))
            except RuntimeError as error:
                self._graphs_failed = True
                self.note(f"CUDA cannot record the step, so it is launched piece by piece, which is slower: {error}")
                return self._eager(step)

        return take

    _graphs_failed = False

    def _eager(self, step: int) -> Tensor:
        """One step of the optimizer; returns its loss, the mean over all processes."""
        number = self.config.accumulate
        losses = [self._backward(self.feeder.batch(step * number + part), number) for part in range(number)]
        loss = self.workers.mean(torch.stack(losses).sum())
        self.workers.average(self.parameters.gradient)
        self._optimize(loss)
        return loss

    def _whole(self, batch: Batch) -> Tensor:
        loss = self._backward(batch, 1)
        self._optimize(loss)
        return loss

    def _backward(self, batch: Batch, number: int) -> Tensor:
        """Add up the gradient of one batch; returns its part of the loss."""
        self.method.use(self.parameters.current())
        loss = (self.method.loss(batch) * batch.shares).sum() / number
        (loss * self.optimizer.scale).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _optimize(self, loss: Tensor) -> None:
        self.optimizer.step(loss)
        with torch.no_grad():
            self.method.after_step(self.parameters.views())

    # ------------------------------------------------------------------------------------------------ looking at it

    def _look(self) -> None:
        """Write what happened since the last look to the log.

        Raises:
            DivergedError: it was not finite.
        """
        for done, seconds, loss, norm in self._pending:
            value, length = float(loss), float(norm)
            if not isfinite(value) or (bool(self.optimizer.stopped) and not isfinite(length)):
                self._stop(done)
            if self.log is not None:
                rate = self._rate(done - 1)
                norm_told = length if isfinite(length) else None  # float16 looks for its scale
                entry = {"step": done, "loss": value, "norm": norm_told, "rate": rate, "seconds": round(seconds, 6)}
                self.log.write(entry)
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
        """The loss with noise that never changes, not weighed: mean over the samples and eight noise steps."""
        self.method.use(self.parameters.current())
        groups: dict[tuple[int, int], list[Sample]] = {}
        for sample in self.validation:
            groups.setdefault(sample.box, []).append(sample)
        total = 0.0
        for group in groups.values():
            for step in _VALIDATION_STEPS:
                for start in range(0, len(group), self.config.batch):
                    part = group[start : start + self.config.batch]
                    total += float(self.method.loss(self.feeder.fixed(part, step, start)).sum())
        return total / (len(self.validation) * len(_VALIDATION_STEPS))

    def _validate(self, done: int) -> None:
        if self.config.validate_every and self.log is not None:
            self.losses[done] = self.measure()
            self.log.write({"step": done, "validation": self.losses[done]})
