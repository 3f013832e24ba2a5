"""Optimizers against torch.optim on one given sequence of gradients; schedules; penalties."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


def test_sgd_without_momentum_keeps_no_velocity():
    start, gradients, _ = given()
    theta, grad = start.clone(), gradients[0].clone()
    plain = SGD(theta, None)
    plain.step(theta, grad, column([0.1] * R))
    assert plain.state == {} and not plain.nesterov
    torch.testing.assert_close(theta, start - 0.1 * gradients[0], rtol=1e-15, atol=1e-15)
    assert grad.equal(gradients[0])


def test_the_state_has_the_names_of_what_it_holds():
    """A checkpoint stores it by name. One step from 0, by hand."""
    start, gradients, _ = given()
    g, rate = gradients[0], column([0.1] * R)
    theta = start.clone()
    sgd = SGD(theta, column([0.9] * R))
    sgd.step(theta, g.clone(), rate)
    assert list(sgd.state) == ["velocity"] and sgd.state["velocity"].equal(g)
    adam = Adam(start.clone(), 0.9, 0.99)
    adam.prepare(rate, 1)
    adam.step(start.clone(), g.clone(), rate)
    assert list(adam.state) == ["first_moment", "second_moment"]
    torch.testing.assert_close(adam.state["first_moment"], 0.1 * g)
    torch.testing.assert_close(adam.state["second_moment"], 0.01 * g * g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta2", [0.0, 0.9, 0.9999])
def test_adams_second_moment_is_never_0(dtype, beta2):
    """Without gradient it goes to 10^4 times the smallest normal number over 1 - beta2; its inverse
    root times the rate's stays finite, and the parameters as they are."""
    theta = torch.ones(2, 3, dtype=dtype)
    adam = Adam(theta, beta2=beta2)
    rate = torch.tensor([[0.1], [0.0]], dtype=dtype)
    for t in range(1, 4):
        adam.prepare(rate, t)
        assert adam._slope.isfinite().all() and adam._slope[1] == 1e18
        adam.step(theta, torch.zeros_like(theta), rate)
    v, tiny = adam.state["second_moment"].double(), torch.finfo(dtype).tiny
    expected = torch.full_like(v, tiny * 1e4 * (1 - beta2**3) / (1 - beta2))
    torch.testing.assert_close(v, expected, rtol=1e-3, atol=0)
    assert theta.eq(1).all()


def test_what_changes_with_the_step_stays_in_its_place():
    """A recorded step reads it there; and only AdamW has memory for the decay."""
    theta, rate = given()[0], column([0.1] * R)
    adam = Adam(theta)
    places = [t.data_ptr() for t in (adam._slope, adam._floor)]
    assert all(places) and adam._decayed is None
    for t in (1, 2):
        adam.prepare(rate, t)
        assert [t.data_ptr() for t in (adam._slope, adam._floor)] == places


@pytest.mark.parametrize("decay", [None, 0.1])
def test_a_rate_of_0_leaves_theta_alone_in_a_population(decay):
    """And its neighbour moves as torch's does."""
    start, gradients, mask = given()
    theta = start.clone()
    columns = column([0.0, 0.01, 0.0])
    adam = Adam(theta, decay=None if decay is None else column([decay] * R) * mask)
    kind = torch.optim.Adam if decay is None else torch.optim.AdamW
    leaf = start[1, :-5].clone().requires_grad_()
    theirs = kind([leaf], lr=0.01, weight_decay=decay or 0.0)
    for t, gradient in enumerate(gradients, 1):
        adam.prepare(columns, t)
        adam.step(theta, gradient.clone(), columns)
        leaf.grad = gradient[1, :-5].clone()
        theirs.step()
    assert theta[0].equal(start[0]) and theta[2].equal(start[2])
    torch.testing.assert_close(theta[1, :-5], leaf.detach(), rtol=1e-12, atol=1e-13)


def test_a_step_works_in_the_memory_it_has():
    """Scratch is the gradient or made before: a step gives the same numbers in the same places."""
    start, gradients, mask = given()
    theta, rate = start.clone(), column([0.1] * R)
    for optimizer in (
        SGD(theta, column([0.9] * R), nesterov=True),
        Adam(theta),
        Adam(theta, decay=column([0.1] * R) * mask),
    ):
        grad = gradients[0].clone()
        penalty = Penalty(column([0.1] * R), column([0.1] * R), mask)
        optimizer.prepare(rate, 1)
        with Made() as made:
            penalty.add(theta, grad)
            optimizer.step(theta, grad, rate)
        assert made.sizes == []


class Made(TorchDispatchMode):
    """Notes the names of operations, and how many numbers each tensor has that one makes in new
    memory."""

    def __enter__(self):
        self.sizes, self.names = [], []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [*args, *(kwargs or {}).values()]
        known = {a.untyped_storage().data_ptr() for a in given if isinstance(a, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
            self.sizes.append(out.numel())
        return out


@pytest.mark.parametrize("zero", ["l1", "l2", "both", "none"])
def test_a_penalty_of_0_costs_nothing(zero):
    start, _, mask = given()
    values = {
        name: column([0.0] * R if zero in (name, "both") else [0.0, 1.0, 0.25])
        for name in ("l1", "l2")
    }
    penalty = Penalty(**values, mask=mask)
    assert (penalty.l1 is None, penalty.l2 is None) == (
        zero in ("l1", "both"),
        zero in ("l2", "both"),
    )
    grad = start.clone()
    penalty.add(start, grad)
    expected = start + (values["l2"] * start + values["l1"] * start.sign()) * mask
    torch.testing.assert_close(grad, expected, rtol=1e-14, atol=1e-15)


def test_a_penalty_of_one_everywhere():
    start, _, mask = given()
    grad = torch.zeros_like(start)
    Penalty(column([1.0] * R), column([1.0] * R), mask).add(start, grad)
    torch.testing.assert_close(grad, (start + start.sign()) * mask, rtol=1e-14, atol=1e-15)


COSINE = [1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0.0]  # in four steps


@pytest.mark.parametrize(
    ("name", "total", "options", "expected"),
    [
        ("constant", 3, {}, [1, 1, 1]),
        ("constant", 5, {"warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1]),
        ("constant", 3, {"warmup_steps": 1}, [1, 1, 1]),
        ("linear", 5, {}, [1, 0.75, 0.5, 0.25, 0]),
        ("linear", 5, {"final_fraction": 0.2}, [1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 7, {"warmup_steps": 2}, [0.5, 1, 1, 0.75, 0.5, 0.25, 0]),
        ("linear", 1, {}, [1]),
        ("linear", 2, {"warmup_steps": 1}, [1, 1]),
        ("linear", 3, {"warmup_steps": 1}, [1, 1, 0]),
        ("cosine", 5, {}, COSINE),
        ("cosine", 5, {"final_fraction": 0.5}, [0.5 + v / 2 for v in COSINE]),
        ("cosine", 7, {"warmup_steps": 2}, [0.5, 1, *COSINE]),
        # three steps an epoch, and a new rate every two epochs
        ("step", 13, {"step_epochs": 2, "gamma": 0.5}, [1] * 6 + [0.5] * 6 + [0.25]),
        ("step", 32, {}, [1] * 30 + [0.1] * 2),
        # up in four of eight steps, down in four
        ("one_cycle", 9, {"peak": 0.5, "initial_fraction": 0.0}, COSINE[::-1] + COSINE[1:]),
        ("one_cycle", 9, {"warmup_steps": 4, "initial_fraction": 0.5, "final_fraction": 0.5},
         [0.5 + v / 2 for v in COSINE[::-1] + COSINE[1:]]),
        ("one_cycle", 3, {"peak": 1.0, "initial_fraction": 0.2}, [0.2, 0.6, 1]),
        ("one_cycle", 3, {"peak": 0.0}, [1, 0.5, 0]),
        ("one_cycle", 3, {"warmup_steps": 1, "initial_fraction": 0.5}, [0.5, 1, 0]),
        # by default from 0.04 up to 1 at 3 of 10 steps, then to 0 in 7
        ("one_cycle", 11, {}, [0.04, 0.28, 0.76, 1]
         + [(1 + math.cos(math.pi * i / 7)) / 2 for i in range(1, 8)]),
        ("one_cycle", 1, {}, [1]),
    ],
)  # fmt: skip
def test_schedules_by_hand(name, total, options, expected):
    values = [schedule(name, s, total, steps_per_epoch=3, **options) for s in range(total)]
    assert values == pytest.approx(expected, abs=1e-15)


def test_an_unknown_schedule_is_a_mistake_of_the_code():
    with pytest.raises(AssertionError, match="triangle"):
        schedule("triangle", 0, 1, steps_per_epoch=1)
