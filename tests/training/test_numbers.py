"""The formulas, against the papers'; buckets, orders and rates, by their laws."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdops.training import diffusion, rates
from sdops.training.batches import Plan, Sample
from sdops.training.optimizer import Optimizer
from sdops.training.parameters import Parameter, Parameters
from sdops.training.pictures import bucket_of, covered
from sdops.training.sampling import clean_of
from sdops.training.tokens import END, START, Tokens

ABAR = diffusion.abar_of()


def test_the_schedule_is_stable_diffusions():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    assert np.allclose(ABAR.numpy(), np.cumprod(1 - betas), rtol=1e-12)
    assert float(ABAR[-1]) == pytest.approx(0.00466, rel=1e-3)  # as is known of SD1


def test_zero_terminal_snr_keeps_the_first_step_and_empties_the_last():
    found = diffusion.with_zero_terminal_snr(ABAR)
    assert float(found[-1]) == 0
    assert float(found[0]) == pytest.approx(float(ABAR[0]), rel=1e-12)
    assert bool((found.diff() < 0).all())


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_right_prediction_gives_back_picture_and_noise(prediction):
    z, n = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    abar = ABAR[torch.tensor([5, 500, 990])]
    noisy = diffusion.noised(z, n, abar)
    target = diffusion.target_of(prediction, z, n, abar)
    clean, noise = clean_of(prediction, target, noisy, abar.view(-1, 1, 1, 1))
    assert torch.allclose(clean, z, atol=1e-9)
    assert torch.allclose(noise, n, atol=1e-9)


def test_weights_are_those_of_the_papers():
    snr = ABAR / (1 - ABAR)
    epsilon = diffusion.weights_of(ABAR, "epsilon", min_snr=5.0)
    v = diffusion.weights_of(ABAR, "v", min_snr=5.0)
    assert torch.allclose(epsilon, torch.minimum(snr, torch.tensor(5.0)) / snr)
    assert torch.allclose(v, torch.minimum(snr, torch.tensor(5.0)) / (snr + 1))
    assert torch.allclose(diffusion.weights_of(ABAR, "epsilon", debiased=True), 1 / snr.clamp(1e-3, 1000).sqrt())
    # the error of v is sqrt(snr + 1) times that of the picture: kohya's 1 / (snr + 1) leaves the picture's
    v = diffusion.weights_of(ABAR, "v", debiased=True)
    assert torch.allclose(v, 1 / (snr.clamp(max=1000) + 1))
    ending = diffusion.with_zero_terminal_snr(ABAR)
    assert float(diffusion.weights_of(ending, "v", debiased=True)[-1]) == 1
    assert bool(torch.isfinite(diffusion.weights_of(ending, "epsilon", min_snr=5.0, debiased=True)).all())


def test_a_mask_of_ones_changes_nothing_and_another_takes_the_mean_inside():
    predicted, target = torch.randn(2, 2, 4, 4, 4)
    plain = diffusion.loss_of(predicted, target, torch.ones(2))
    assert torch.allclose(diffusion.loss_of(predicted, target, torch.ones(2), torch.ones(2, 1, 4, 4)), plain)
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, :2] = 1
    inside = (predicted - target)[:, :, :2].square().mean(dim=(1, 2, 3))
    assert torch.allclose(diffusion.loss_of(predicted, target, torch.ones(2), mask), inside)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_the_optimizer_is_torchs_adamw(clip):
    """Over 20 steps, with groups of their own rates and decays, and clipping."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)]
    ours = Parameters(
        [Parameter("a", starts[0], 1e-2, 0.1), Parameter("b", starts[1], 3e-3)], torch.device("cpu"), torch.float32
    )
    optimizer = Optimizer(ours, clip=clip)
    theirs = [torch.nn.Parameter(start.clone()) for start in starts]
    reference = torch.optim.AdamW(
        [
            {"params": [theirs[0]], "lr": 1e-2, "weight_decay": 0.1},
            {"params": [theirs[1]], "lr": 3e-3, "weight_decay": 0.0},
        ]
    )
    optimizer.set_rates(1.0, 0)
    for _ in range(20):
        wanted = [torch.randn(start.shape, generator=generator) for start in starts]
        loss = sum((x * w).sum() + (x**2).sum() for x, w in zip(ours.current().values(), wanted, strict=True))
        loss.backward()
        optimizer.step(loss.detach())
        reference.zero_grad()
        sum((x * w).sum() + (x**2).sum() for x, w in zip(theirs, wanted, strict=True)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs, clip)
        reference.step()
    for view, parameter in zip(ours.views().values(), theirs, strict=True):
        assert torch.allclose(view, parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rest", [{"until": 0}, {"since": 5}, {"lr": 0.0}], ids=str)
def test_what_stands_still_clips_nothing(rest):
    """Nor does it stop the run."""
    moved = []
    for gradient in (0.0, 1e6, math.nan):
        parts = [Parameter("a", torch.ones(3), 1e-2), Parameter("b", torch.ones(3), **{"lr": 1e-2, **rest})]
        parameters = Parameters(parts, torch.device("cpu"), torch.float32)
        optimizer = Optimizer(parameters, clip=1.0)
        for step in range(2):
            optimizer.set_rates(1.0, step)
            parameters.views(parameters.gradient)["a"].fill_(0.1 / (step + 1))
            parameters.views(parameters.gradient)["b"].fill_(gradient)
            optimizer.step(torch.tensor(1.0))
        assert torch.equal(parameters.views()["b"], torch.ones(3))
        assert float(optimizer.norm) == pytest.approx(0.05 * math.sqrt(3))
        moved.append(parameters.views()["a"].clone())
    assert torch.equal(moved[1], moved[0])
    assert torch.equal(moved[2], moved[0])
    assert not torch.equal(moved[0], torch.ones(3))


def test_float16_lowers_its_scale_instead_of_stopping():
    parameters = Parameters([Parameter("a", torch.ones(3), 1e-2)], torch.device("cpu"), torch.float32)
    optimizer = Optimizer(parameters, scaled=True)
    optimizer.set_rates(1.0, 0)
    parameters.gradient.fill_(math.inf)
    optimizer.step(torch.tensor(1.0))
    assert float(optimizer.scale) == 2.0**15
    assert float(optimizer.stopped) == 0
    assert torch.equal(parameters.flat.detach(), torch.ones(3))
    parameters.gradient.fill_(1.0)
    optimizer.step(torch.tensor(math.nan))
    parameters.gradient.fill_(1.0)
    optimizer.step(torch.tensor(1.0))  # nothing happens any more
    assert float(optimizer.stopped) == 1
    assert torch.equal(parameters.flat.detach(), torch.ones(3))


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([64, 512, 1024]), st.sampled_from([8, 64]))
@settings(max_examples=60, deadline=None)
def test_buckets_have_the_shape_and_no_more_pixels(width, height, resolution, step):
    box = bucket_of((width, height), resolution, step, squares=False)
    assert box[0] % step == box[1] % step == 0
    assert box[0] * box[1] <= resolution * resolution
    size, corner = covered((width, height), box)
    assert all(c >= 0 and c + b <= s for c, b, s in zip(corner, box, size, strict=True))
    assert any(b == s for b, s in zip(box, size, strict=True))  # no more is cropped than needed


@given(st.lists(st.sampled_from([(8, 8), (8, 16)]), min_size=1, max_size=20), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_an_epoch_has_every_sample_and_only_full_batches_of_one_size(boxes, batch, seed):
    samples = tuple(Sample(index, box) for index, box in enumerate(boxes))
    plan = Plan(samples, batch, seed)
    epoch = [plan.at(number) for number in range(plan.batches)]
    assert all(len(each) == batch and len({sample.box for sample in each}) == 1 for each in epoch)
    assert {sample for each in epoch for sample in each} == set(samples)
    assert [plan.at(number) for number in range(plan.batches)] == epoch


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial", "restarts"])
def test_rates_rise_and_fall(schedule):
    found = [rates.factor(step, 100, schedule, warmup=10, least=0.1) for step in range(101)]
    assert found[:11] == [pytest.approx(min((step + 1) / 11, 1.0)) for step in range(11)]
    assert found[10] == 1
    assert all(a >= b for a, b in pairwise(found[10:]))
    assert found[100] == pytest.approx(0.1)


def test_new_words_stand_for_their_vectors_and_nothing_else():
    tokens = Tokens({"sks": 2, "sksneg": 1}, 49408)
    assert tokens.of("a sks dog") == [320, 49408, 49409, 1929]
    assert tokens.of("sksneg, sks.") == [49410, 267, 49408, 49409, 269]
    assert tokens.of("asks") == Tokens({}, 49408).of("asks")
    [row] = tokens.rows(["dog " * 100], pad=0)
    assert (len(row), row[0], row[-1]) == (77, START, END)
