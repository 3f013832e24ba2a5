"""Optimizers against torch.optim on one given sequence of gradients; schedules; penalties."""

import math

import pytest
import torch

from manualnn.optimizers import SCHEDULES, SGD, Adam, Penalty, schedule

R, P, STEPS = 3, 20, 50


def column(values):
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def given(seed=0):
    draw = torch.Generator().manual_seed(seed)
    start = torch.randn(R, P, generator=draw, dtype=torch.float64)
    gradients = torch.randn(STEPS, R, P, generator=draw, dtype=torch.float64)
    mask = torch.ones(P, dtype=torch.float64)
    mask[-5:] = 0  # the last five stand for biases
    return start, gradients, mask


CASES = {
    "sgd": (dict(), {}),
    "sgd, momentum": (dict(momentum=0.9), {}),
    "sgd, Nesterov": (dict(momentum=0.9), dict(nesterov=True)),
    "adam": (dict(), {}),
    "adam, betas": (dict(), dict(beta1=0.7, beta2=0.95, epsilon=1e-4)),
    "adamw": (dict(), {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rate", [0.01, 10.0])
@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_equals_torch_optim(case, rate, l2, differs):
    columns, options = CASES[case]
    start, gradients, mask = given()
    rates = [rate, rate / 2, rate / 3]
    momenta = [columns.get("momentum", 0.0)] * R
    theta = start.clone()
    decay = column([l2] * R) * mask
    if case.startswith("sgd"):
        ours = SGD(theta, column(momenta), **options)
    else:
        ours = Adam(theta, decay=decay if case == "adamw" else None, **options)
    coupled = 0.0 if case == "adamw" else l2
    penalty = Penalty(column([0.0] * R), column([coupled] * R), mask)

    leaves, optimizers = [], []
    for r in range(R):
        weights = start[r, :-5].clone().requires_grad_()
        biases = start[r, -5:].clone().requires_grad_()
        groups = [dict(params=[weights], weight_decay=l2), dict(params=[biases], weight_decay=0.0)]
        if case.startswith("sgd"):
            theirs = torch.optim.SGD(groups, lr=rates[r], momentum=momenta[r], **options)
        else:
            betas = (options.get("beta1", 0.9), options.get("beta2", 0.999))
            kind = torch.optim.AdamW if case == "adamw" else torch.optim.Adam
            theirs = kind(groups, lr=rates[r], betas=betas, eps=options.get("epsilon", 1e-8))
        leaves.append((weights, biases))
        optimizers.append(theirs)

    for t, gradient in enumerate(gradients, 1):
        grad = gradient.clone()
        penalty.add(theta, grad)
        ours.prepare(column(rates), t)
        ours.step(theta, grad, column(rates))
        for r, (weights, biases) in enumerate(leaves):
            weights.grad, biases.grad = gradient[r, :-5].clone(), gradient[r, -5:].clone()
            optimizers[r].step()
    expected = torch.stack([torch.cat(pair).detach() for pair in leaves])
    scale = expected.abs().clamp(min=1)
    differs(f"{case}, rate {rate:g} (relative)", theta / scale, expected / scale)


def test_momentum_columns_equal_single_runs():
    start, gradients, _ = given()
    momenta = [0.0, 0.5, 0.9]
    together = start.clone()
    population = SGD(together, column(momenta), nesterov=True)
    for gradient in gradients:
        population.step(together, gradient.clone(), column([0.1] * R))
    for r, momentum in enumerate(momenta):
        alone = start[r : r + 1].clone()
        single = SGD(alone, column([momentum]), nesterov=True)
        for gradient in gradients:
            single.step(alone, gradient[r : r + 1].clone(), column([0.1]))
        assert alone[0].equal(together[r])


def test_penalties_are_the_gradients_of_their_terms():
    start, _, mask = given()
    l1, l2 = column([0.0, 0.2, 0.5]), column([0.3, 0.0, 0.1])
    grad = torch.zeros_like(start)
    Penalty(l1, l2, mask).add(start, grad)
    leaf = start.clone().requires_grad_()
    ((l2 * leaf.square() / 2 + l1 * leaf.abs()) * mask).sum().backward()
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-14, atol=1e-15)


def fractions(name, total=100, **options):
    return [schedule(name, s, total, steps_per_epoch=10, **options) for s in range(total)]


def torch_rates(make, total=100):
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_schedules_equal_torch():
    rates = torch.optim.lr_scheduler
    cosine = torch_rates(lambda o: rates.CosineAnnealingLR(o, 99, eta_min=0.1))
    assert fractions("cosine", final_fraction=0.1) == pytest.approx(cosine)
    linear = torch_rates(lambda o: rates.LinearLR(o, 1.0, 0.2, total_iters=99))
    assert fractions("linear", final_fraction=0.2) == pytest.approx(linear)
    step = torch_rates(lambda o: rates.StepLR(o, 30, 0.5))
    assert fractions("step", step_epochs=3, gamma=0.5) == pytest.approx(step)
    # torch puts the peak at pct_start * total - 1; 28 / 99 of the way is its step 29 of 0..99.
    options = dict(total_steps=100, pct_start=0.3, div_factor=25, final_div_factor=1e4)
    cycle = torch_rates(lambda o: rates.OneCycleLR(o, 1.0, **options), total=99)
    ours = fractions("one_cycle", peak=29 / 99, initial_fraction=1 / 25, final_fraction=4e-6)
    assert ours[:99] == pytest.approx(cycle)
    assert fractions("constant") == [1.0] * 100


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 20])
def test_schedules_are_sane(name, warmup):
    values = fractions(name, warmup_steps=warmup)
    assert all(0 <= v <= 1 + 1e-12 for v in values)
    if warmup:
        assert values[: warmup + 1] == sorted(values[: warmup + 1])
        assert max(values) == pytest.approx(1)
        assert values[0] < 0.1
    if name in ("linear", "cosine", "one_cycle"):
        assert values[-1] == pytest.approx(0, abs=1e-12)
    assert all(math.isfinite(schedule(name, s, 1, steps_per_epoch=1)) for s in range(2))
