"""AdamW over the flat buffer, with clipping after unscaling, a stop at the first number that is not finite, and EMA.

Nothing here waits for the device: whether a step was good is known there, and a step that was not changes nothing, nor
does any step after it. The loop looks at the flag when it likes to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from sdops.training.parameters import Parameters

_FIRST_SCALE = 2.0**16
_GROWTH_STEPS = 2000  # good steps in a row after which the loss is scaled up again


class Optimizer:
    """One optimizer step per call.

    Args:
        parameters: What learns; their gradients were added up by autograd.
        betas: Of AdamW.
        epsilon: Of AdamW.
        clip: Largest norm of the whole gradient; 0 = no limit.
        decay: Of the moving average; 0 = none.
        scaled: Whether the loss is multiplied by a scale, as float16 needs it. Gradients that are too large then lower
            the scale, and only a scale that has come down to 1 makes them an error.

    Attributes:
        norm: Of the last gradient, before clipping.
        stopped: 1 from the first step on whose loss or gradient was not finite.
        scale: What the loss is to be multiplied by.
        average: The moving average of the buffer, or None.
    """

    def __init__(
        self,
        parameters: Parameters,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        clip: float = 0.0,
        decay: float = 0.0,
        scaled: bool = False,
    ) -> None:
        self._parameters, self._clip, self._decay, self._scaled = parameters, clip, decay, scaled
        flat = parameters.flat.detach()
        self._betas, self._epsilon = betas, epsilon
        self.first, self.second = torch.zeros_like(flat), torch.zeros_like(flat)  # moments
        number = torch.zeros((), device=flat.device)
        self.norm, self.stopped = number.clone(), number.clone()
        self.steps = torch.zeros(len(parameters.groups), device=flat.device)  # good ones, as AdamW counts them
        self.scale, self._good = number + (_FIRST_SCALE if scaled else 1.0), number.clone()
        self._rates = torch.zeros(len(parameters.groups), device=flat.device)
        self._is_cuda = flat.device.type == "cuda"
        self.average = flat.clone() if decay else None
        self._pull = number.clone()  # of the values on the average: 0 if the step was not good

    def set_rates(self, factor: float, step: int) -> None:
        """Set the learning rates of a step, before it is taken.

        Args:
            factor: The schedule's, from 0 to 1.
            step: From 0; groups whose time is over, or has not come, stand still.
        """
        rates = [group.lr * factor if group.learns(step) else 0.0 for group in self._parameters.groups]
        told = torch.tensor(rates, pin_memory=self._is_cuda)  # from other memory the copy would wait for the device
        self._rates.copy_(told, non_blocking=True)

    def step(self, loss: Tensor) -> None:
        """Take one step; the gradient is zero afterwards.

        Args:
            loss: Of this step, not scaled; only looked at.
        """
        with torch.no_grad():
            gradient = self._parameters.gradient
            for number, group in enumerate(self._parameters.groups):
                if group.rests:  # what stands still is in no norm
                    gradient[group.start : group.stop].masked_fill_(self._rates[number] == 0, 0)
            self.norm.copy_(torch.linalg.vector_norm(gradient) / self.scale)
            finite = torch.isfinite(self.norm)
            divisor = self.scale.clone()
            if self._clip:
                divisor.div_((self._clip / (self.norm + 1e-6)).clamp(max=1.0))
            self._judge(finite, torch.isfinite(loss))
            good = (finite & (self.stopped == 0)).float()
            self._adamw(gradient, divisor, 1 - good)
            self._pull.copy_(good * (1 - self._decay))
            gradient.zero_()

    def follow(self) -> None:
        """Move the average towards the values, when the method has done with them what it does after a step."""
        if self.average is not None:
            self.average.lerp_(self._parameters.flat.detach(), self._pull)

    def _judge(self, finite: Tensor, sound: Tensor) -> None:
        """Decide whether to stop, and what the scale becomes."""
        bad = ~sound | (~finite & (self.scale <= 1))
        self.stopped.copy_(torch.maximum(self.stopped, bad.float()))
        if self._scaled:
            self._good.copy_(torch.where(finite, self._good + 1, 0.0))
            grown = torch.where(self._good >= _GROWTH_STEPS, self.scale * 2, self.scale)
            self._good.copy_(torch.where(self._good >= _GROWTH_STEPS, 0.0, self._good))
            self.scale.copy_(torch.where(finite, grown, self.scale / 2).clamp(1.0, 2.0**24))

    def _adamw(self, gradient: Tensor, divisor: Tensor, bad: Tensor) -> None:
        """Loshchilov and Hutter 2019, arXiv:1711.05101, by torch's fused kernel: one pass over each group.

        Args:
            gradient: Of the scaled loss.
            divisor: What it is divided by: the scale, and what clipping takes.
            bad: 1 leaves everything as it is.
        """
        flat = self._parameters.flat
        still = torch.maximum((self._rates == 0).float(), bad)  # a group without a rate keeps moments and count, too
        for number, group in enumerate(self._parameters.groups):
            stretch = slice(group.start, group.stop)
            adamw(
                [flat[stretch]],
                [gradient[stretch]],
                [self.first[stretch]],
                [self.second[stretch]],
                [],
                [self.steps[number]],
                fused=True,
                capturable=True,
                grad_scale=divisor,
                found_inf=still[number],
                lr=self._rates[number],
                beta1=self._betas[0],
                beta2=self._betas[1],
                weight_decay=group.weight_decay,
                eps=self._epsilon,
                amsgrad=False,
                maximize=False,
            )

    def state(self) -> dict[str, Tensor]:
        """Everything that a continuation needs, by name."""
        found: dict[str, Any] = {
            "flat": self._parameters.flat.detach(),
            "first": self.first,
            "second": self.second,
            "steps": self.steps,
            "scale": self.scale,
            "good": self._good,
        }
        return found | ({"average": self.average} if self.average is not None else {})

    def everything(self) -> list[Tensor]:
        """All that a step changes."""
        return [*self.state().values(), self.norm, self.stopped]

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on where another run stopped."""
        with torch.no_grad():
            for name, value in self.state().items():
                value.copy_(state[name])
