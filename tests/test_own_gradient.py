"""A user's own function: right ones pass in either kind, and wrong ones are told what is wrong."""

import json
import textwrap

import pytest

from manualnn.errors import InputError
from manualnn.own_gradient import check_function

GRADIENT = """
import numpy as np

def sigmoid(z):
    return 1 / (1 + np.exp(-z))

def gradient(X, y, W):
    h = sigmoid(X @ W["w_1"])
    y_hat = sigmoid(h @ W["w_2"])
    dz = (y_hat - y.reshape(-1, 1)) / len(X)
    w_2 = h.T @ dz
    w_1 = X.T @ (dz @ W["w_2"].T * h * (1 - h))
    return {"w_1": w_1, "w_2": w_2}
"""
LOSS = """
import numpy as np

def loss_and_gradients(params, x, y):
    a = x @ params["w1"] + params["b1"]
    h = np.maximum(a, 0)
    z = h @ params["w2"] + params["b2"]
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    B = len(x)
    loss = -np.log(p[np.arange(B), y]).sum() / B
    dz = p.copy()
    dz[np.arange(B), y] -= 1
    dz /= B
    dh = dz @ params["w2"].T * (a > 0)
    return loss, {"w1": x.T @ dh, "b1": dh.sum(0), "w2": h.T @ dz, "b2": dz.sum(0)}
"""
TORCH = """
import torch

def gradient(X, y, W):
    h = torch.sigmoid(X.mm(W["w_1"]))
    d = (torch.sigmoid(h.mm(W["w_2"])).squeeze(1) - y) / X.size(0)
    d = d.unsqueeze(1)
    return {"w_1": X.t().mm(d.mm(W["w_2"].t()) * h * (1 - h)), "w_2": h.t().mm(d)}
"""


def checked(tmp_path, source, *changes, name="", **options):
    """The report on `source` with each (old, new) of `changes` made."""
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    file = tmp_path / "own.py"
    file.write_text(textwrap.dedent(source))
    return check_function(f"{file}{name}", **options)


def how(report):
    return {row.tensor: row.how for row in report.wrong}


@pytest.mark.parametrize(
    "source", [GRADIENT, LOSS, TORCH, GRADIENT.replace("y_hat - y.re", "y_hat - 1.0 * y.re")]
)
def test_a_right_function_passes(tmp_path, source):
    report = checked(tmp_path, source)
    assert report.passed, report.finding
    assert report.title.endswith("(torch)" if source == TORCH else "(numpy)")


NO_DIVISION = "7 times too large, the batch size: 1/B is missing"
RIGHT = '"w_1": w_1, "w_2": w_2'
DIAGNOSES = {
    "sign": ([(RIGHT, '"w_1": -w_1, "w_2": w_2')], {"w_1": "the sign is flipped"}),
    "1/B": (
        [(" / len(X)", "")],
        dict.fromkeys(("w_1", "w_2"), NO_DIVISION),
    ),
    "1/B^2": (
        [(RIGHT, '"w_1": w_1, "w_2": w_2 / len(X)')],
        {"w_2": "7 times too small, the batch size: 1/B is there twice"},
    ),
    "both": (
        [(RIGHT, '"w_1": w_1, "w_2": -7 * w_2')],
        {"w_2": "the sign is flipped, and 7 times too large, the batch size: 1/B is missing"},
    ),
    "twice": ([(RIGHT, '"w_1": 2 * w_1, "w_2": w_2')], {"w_1": "twice as large as it should be"}),
    "half": ([(RIGHT, '"w_1": w_1 / 2, "w_2": w_2')], {"w_1": "half as large as it should be"}),
    "factor": ([(RIGHT, '"w_1": 1.23 * w_1, "w_2": w_2')], {"w_1": "1.23 times what it should be"}),
    "transposed": (
        [(RIGHT, '"w_1": w_1.T, "w_2": w_2')],
        {"w_1": "transposed: has shape (5, 6), should have (6, 5)"},
    ),
    "flat": (
        [(RIGHT, '"w_1": w_1, "w_2": w_2[:, 0]')],
        {"w_2": "the right numbers, but it has shape (5,), should have (5, 1)"},
    ),
    "shape": (
        [(RIGHT, '"w_1": w_1, "w_2": w_2[:3]')],
        {"w_2": "has shape (3, 1), should have (5, 1)"},
    ),
    "not summed": (
        [(RIGHT, '"w_1": X[:, :, None] * (dz @ W["w_2"].T * h * (1 - h))[:, None], "w_2": w_2')],
        {"w_1": "not summed over the batch: has shape (7, 6, 5), should have (6, 5)"},
    ),
    "swapped": (
        [(RIGHT, '"w_1": w_2, "w_2": w_1')],
        {
            "w_1": "has shape (5, 1), should have (6, 5)",
            "w_2": "has shape (6, 5), should have (5, 1)",
        },
    ),
    "zero": ([(RIGHT, '"w_1": 0 * w_1, "w_2": w_2')], {"w_1": "all 0"}),
    "nan": (
        [("    return {", "    w_1[2, 3] = np.nan\n    return {")],
        {"w_1": "1 of 30 numbers are nan or infinite"},
    ),
    "missing": ([(RIGHT, '"w_1": w_1')], {"w_2": "missing"}),
    "extra": (
        [(RIGHT, RIGHT + ', "b_1": h.sum(0)')],
        {"b_1": "not asked for: the keys are w_1, w_2"},
    ),
    "row": (
        [("    return {", "    w_1[2] *= 3\n    return {")],
        {"w_1": "only row 2 wrong"},
    ),
    "columns": (
        [("    return {", "    w_1[:, [0, 4]] += 1\n    return {")],
        {"w_1": "only columns 0, 4 wrong"},
    ),
    "B = 1": (
        [("w_2 = h.T @ dz", "w_2 = h.T[:, :1] @ dz[:1]")],
        {"w_2": "right for a batch of one example only"},
    ),
    "in place": (
        [("    return {", '    W["w_2"] -= w_2\n    return {')],
        {"W['w_2']": "an argument that it changes in place"},
    ),
    "no derivative": ([(" * h * (1 - h)", "")], {"w_1": ""}),
}


@pytest.mark.parametrize(("changes", "expected"), DIAGNOSES.values(), ids=DIAGNOSES)
def test_what_is_wrong_with_a_gradient(tmp_path, changes, expected):
    report = checked(tmp_path, GRADIENT, *changes)
    assert how(report) == expected
    assert not report.passed and report.finding.startswith("wrong: gradient: ")


LOSS_DIAGNOSES = {
    "bias not summed": (
        [('"b1": dh.sum(0)', '"b1": dh')],
        {"b1": "not summed over the batch: has shape (7, 5), should have (5,)"},
    ),
    "bias a mean": (
        [('"b2": dz.sum(0)', '"b2": dz.mean(0)')],
        {"b2": "7 times too small, the batch size: 1/B is there twice"},
    ),
    "entry": (
        [("    return loss", "    dz[:, 1] *= 2\n    return loss")],
        {"w2": "only column 1 wrong", "b2": "only entry 1 wrong"},
    ),
    "no mask": ([(" * (a > 0)", "")], {"w1": "", "b1": ""}),
    "1/B": (
        [("    dz /= B\n", "")],
        dict.fromkeys(("w1", "b1", "w2", "b2"), NO_DIVISION),
    ),
    "penalty": ([(".sum() / B\n", '.sum() / B + (params["w2"] ** 2).sum()\n')], {"w2": ""}),
}


@pytest.mark.parametrize(("changes", "expected"), LOSS_DIAGNOSES.values(), ids=LOSS_DIAGNOSES)
def test_what_is_wrong_with_loss_and_gradients(tmp_path, changes, expected):
    assert how(checked(tmp_path, LOSS, *changes)) == expected


def test_the_project_s_network_is_named(tmp_path):
    [note] = checked(tmp_path, LOSS).notes
    assert "note: the loss is that of the project's linear, relu, linear with cross_entropy" in note
    assert float(note.split("gradients are ")[1].split()[0]) < 1e-14
    summed = checked(tmp_path, LOSS, (".sum() / B\n", ".sum()\n"), ("    dz /= B\n", ""))
    assert summed.passed and "note: the loss is 7 times that of" in summed.notes[0]
    tanh = [("np.maximum(a, 0)", "np.tanh(a)"), ("(a > 0)", "(1 - h * h)")]
    report = checked(tmp_path, LOSS, *tanh)
    assert report.passed and "linear, tanh, linear" in report.notes[0]
    misshapen = checked(tmp_path, LOSS, ('"b1": dh.sum(0)', '"b1": dh'))
    assert misshapen.notes[0].endswith("with cross_entropy")
    sine = [("np.maximum(a, 0)", "np.sin(a)"), ("(a > 0)", "np.cos(a)")]
    report = checked(tmp_path, LOSS, *sine)
    assert report.passed and "none of the project's" in report.notes[0]


EXAMPLE = """
import {kind}

def example():
    return {{"w": {kind}.ones((3, 3)) / 2, "c": {kind}.zeros(3)}}, {kind}.eye(3), [1.0, 2.0, 3.0]

def fit(theta, x, y, weight=1.0):
    r = x @ theta["w"] + theta["c"] - {kind}.asarray(y)
    loss = weight * (r ** 2).sum() + abs(theta["c"]).sum()
    return loss, {{"w": 2 * x.T @ r, "c": 2 * r.sum(0)}}
"""


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_an_example_gives_the_arguments(tmp_path, kind):
    """The kinks of |c| at 0 are skipped: there is nothing left to judge of c."""
    report = checked(tmp_path, EXAMPLE.format(kind=kind), name=":fit")
    assert report.title.endswith(f"({kind})") and report.notes == ()
    assert [row.verdict for row in report.rows] == ["ok", "not judged"]
    assert report.rows[1].skipped == 3
    turned = ("2 * x.T @ r,", "(2 * x.T @ r).T,")
    report = checked(tmp_path, EXAMPLE.format(kind=kind), turned, name=":fit")
    assert how(report) == {"w": "transposed"}


def test_swapped_gradients_and_what_kinks_leave_out(tmp_path):
    """Two tensors of one shape; |b| at 0 is a kink, at 1 and 2 it is none."""
    source = """
        import numpy as np
        def example():
            return {"a": np.array([1.0, -2, 3]), "b": np.array([0.0, 1, -2])}, np.eye(3), np.ones(3)
        def loss_and_gradients(params, x, y):
            a, b = params["a"], params["b"]
            return (a**3).sum() / 3 + np.abs(b).sum(), {"a": a * a, "b": np.sign(b)}
    """
    report = checked(tmp_path, source)
    assert report.passed and [row.skipped for row in report.rows] == [0, 1]
    swap = ('"a": a * a, "b": np.sign(b)', '"b": a * a, "a": np.sign(b)')
    expected = {"a": "it is the gradient of b", "b": "it is the gradient of a"}
    assert how(checked(tmp_path, source, swap)) == expected
    report = checked(tmp_path, source, ("np.sign(b)", "-2 * np.sign(b)"))
    assert how(report) == {"b": "the sign is flipped, and twice as large as it should be"}
    name = f"{tmp_path / 'own.py'}"
    assert check_function(name, samples=2).rows[0].tried == 2


def test_float32_is_judged_by_its_own_precision(tmp_path):
    low = "    X, y, W = np.float32(X), np.float32(y), {k: np.float32(v) for k, v in W.items()}\n"
    report = checked(tmp_path, GRADIENT, ("    h = ", f"{low}    h = "))
    assert report.passed and max(row.worst for row in report.rows) > 1e-9
    low = "    x, params = np.float32(x), {k: np.float32(v) for k, v in params.items()}\n"
    to_low = ("    a = x", f"{low}    a = x")
    report = checked(tmp_path, LOSS, to_low)
    assert report.passed and max(row.worst for row in report.rows) > 1e-6
    report = checked(tmp_path, LOSS, to_low, ("    dz /= B\n", ""))
    assert how(report) == dict.fromkeys(("w1", "b1", "w2", "b2"), NO_DIVISION)


SMALL = """
def example():
    r = np.random.default_rng(0)
    w1, w2 = r.normal(size=(20, 15)) * 0.3, r.normal(size=(15, 5)) * 0.3
    params = {"w1": w1, "b1": np.zeros(15), "w2": w2, "b2": np.zeros(5)}
    return params, r.normal(size=(8, 20)), r.integers(0, 5, 8)
"""
LARGE = """
import torch

def example():
    g = torch.Generator().manual_seed(0)
    w1, w2 = torch.randn(784, 100, generator=g) / 20, torch.randn(100, 10, generator=g) / 10
    params = {"w1": w1, "b1": torch.zeros(100), "w2": w2, "b2": torch.zeros(10)}
    return params, torch.rand(32, 784, generator=g), torch.randint(0, 10, (32,), generator=g)

def loss_and_gradients(params, x, y):
    x = x.float()
    w1, b1, w2, b2 = (params[key].float() for key in ("w1", "b1", "w2", "b2"))
    a = x @ w1 + b1
    h = a.clamp(min=0)
    z = h @ w2 + b2
    B = torch.arange(len(x))
    p = torch.softmax(z, 1)
    loss = -torch.log(p[B, y]).mean()
    p[B, y] -= 1
    dz = p / len(x)
    dh = dz @ w2.T * (a > 0)
    return loss, {"w1": x.T @ dh, "b1": dh.sum(0), "w2": h.T @ dz, "b2": dz.sum(0)}
"""


@pytest.mark.parametrize("seed", range(3))
def test_kinks_within_the_step_of_float32_are_no_errors(tmp_path, seed):
    """Hundreds of ReLUs: the step that float32 needs crosses the kinks of some at most weights."""
    report = checked(tmp_path, LARGE, seed=seed)
    assert report.passed, report.finding
    assert sum(row.skipped for row in report.rows) > 0


LARGE_DIAGNOSES = {
    "1/B": (
        ("p / len(x)", "p"),
        dict.fromkeys(("w1", "b1", "w2", "b2"), NO_DIVISION.replace("7 times", "32 times")),
    ),
    "sign": (('"w1": x.T', '"w1": -x.T'), {"w1": "the sign is flipped"}),
    "no mask": ((" * (a > 0)", ""), {"w1": "", "b1": ""}),
    "of the last": (('"w2": h.T @ dz', '"w2": h[-1:].T @ dz[-1:]'), {"w2": ""}),
    "5 percent": (('"w1": x.T', '"w1": 1.05 * x.T'), {"w1": ""}),
}


@pytest.mark.parametrize(("change", "expected"), LARGE_DIAGNOSES.values(), ids=LARGE_DIAGNOSES)
def test_errors_in_float32_are_found_beside_kinks(tmp_path, change, expected):
    """None is said to be right for one example: differences in float32 are too coarse for that."""
    assert how(checked(tmp_path, LARGE, change)) == expected


def test_the_loss_says_in_which_precision_it_is(tmp_path):
    """Gradients in float32 of a loss in float64: small steps, as for those in float64. A loss in
    float32, summed in it and divided in float64 after: large ones."""
    to_low = ('"w1": x.T @ dh', '"w1": (x.T @ dh).astype("float32")')
    report = checked(tmp_path, LOSS + SMALL, to_low)
    assert report.passed and max(row.worst for row in report.rows) < 1e-4
    divided = ("-torch.log(p[B, y]).mean()", "-torch.log(p[B, y]).sum().item() / 32 / 3")
    report = checked(tmp_path, LARGE, divided, ("p / len(x)", "p / len(x) / 3"))
    assert report.passed, report.finding


@pytest.mark.parametrize("samples", [0, 50])
def test_lines_that_are_wrong_as_a_whole(tmp_path, samples):
    """Of a column of which some coordinates are sampled, each row that has one looks wrong."""
    back = "    return loss"
    column = (back, f"    dh[:, 3] = 0\n{back}")
    expected = {"w1": "only column 3 wrong", "b1": "only entry 3 wrong"}
    assert how(checked(tmp_path, LOSS + SMALL, column, samples=samples)) == expected
    rows = ('"w2": h.T @ dz', '"w2": np.where(np.arange(15)[:, None] < 6, 2, 1) * (h.T @ dz)')
    expected = {"w2": "only rows 0, 1, 2, 3, 4 and 1 more wrong"}
    assert how(checked(tmp_path, LOSS + SMALL, rows, samples=samples)) == expected
    cells = ('"w2": h.T @ dz', '"w2": h.T @ dz + np.eye(15, 5)')
    assert how(checked(tmp_path, LOSS + SMALL, cells, samples=samples)) == {"w2": ""}


def test_a_function_that_takes_y_as_a_column_alone(tmp_path):
    report = checked(tmp_path, GRADIENT, ("y.reshape(-1, 1)", "y * np.ones((y.shape[1], 1))"))
    assert report.passed and report.notes == (
        "note: right for y of shape (7, 1) only; (7,) would broadcast",
    )
    report = checked(tmp_path, GRADIENT, ("y.reshape(-1, 1)", "0 * y[:, 0:1]"))
    assert {row.tensor for row in report.wrong} == {"w_1", "w_2"}


def test_parameters_may_be_numbers(tmp_path):
    source = """
        def example():
            return {"slope": 2.0, "offset": 1}, [1.0, 2.0], [0.0, 1.0]
        def loss_and_gradients(params, x, y):
            r = [params["slope"] * a + params["offset"] - b for a, b in zip(x, y)]
            loss = sum(e * e for e in r) / 2
            return loss, {"slope": sum(e * a for e, a in zip(r, x)), "offset": sum(r)}
    """
    report = checked(tmp_path, source)
    assert report.passed and [row.index for row in report.rows] == [(), ()]
    assert how(checked(tmp_path, source, ('"offset": sum(r)', '"offset": -sum(r)'))) == {
        "offset": "the sign is flipped"
    }
    slightly = ('"offset": sum(r)', '"offset": 1.001 * sum(r)')
    assert how(checked(tmp_path, source, slightly)) == {"offset": "1.001 times what it should be"}
    with pytest.raises(InputError, match="params that are no arrays"):
        checked(tmp_path, source, ('"offset": 1}', '"offset": "1,"}'))


def test_torch_s_default_type_is_float32(tmp_path):
    """A product with a new tensor of torch's default type: float64 is refused by torch itself."""
    report = checked(tmp_path, TORCH, ('X.mm(W["w_1"])', 'X.mm(torch.eye(6)).mm(W["w_1"])'))
    assert report.passed and report.title.endswith("(torch in float32)")
    changes = [('"w_2": h.t().mm(d)', '"w_2": -h.t().mm(d)'), ("X.mm(", "X.mm(torch.eye(6)).mm(")]
    assert how(checked(tmp_path, TORCH, *changes)) == {"w_2": "the sign is flipped"}


def test_one_shape_of_y_may_do(tmp_path):
    """(B, 1) against (B,) is broadcast to (B, B): a note, for a course may ask for one of them."""
    report = checked(tmp_path, TORCH)
    assert report.passed and report.notes == (
        "note: right for y of shape (7,) only; (7, 1) would broadcast",
    )


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("x = 1", "", "has no function of a known name; it has none"),
        (
            "def gradeint(X, y, W): pass",
            ":gradient",
            "no function 'gradient'; did you mean 'gradeint'",
        ),
        ("def f(a, b): pass", ":f", r"f\(a, b\) is neither gradient\(X, y, W\) nor loss_and"),
        ("def gradient(X, y, W)\n    pass", "", "own.py:1: SyntaxError"),
        ("import nothing_like_it", "", "own.py:1: ModuleNotFoundError: No module named"),
        ("import sys\nsys.exit(3)", "", "own.py:2: SystemExit: 3"),
        (GRADIENT.replace("len(X)", "(1 // 0)"), "", "own.py:10: ZeroDivisionError: "),
        ("def gradient(X, y, W): return [1]", "", r"gradient gives a list, not a dict like W"),
        (
            "def gradient(X, y, W): return {'w_1': 'a', 'w_2': 1}",
            "",
            "a dict of what are no arrays",
        ),
        ("def loss_and_gradients(p, x, y): return {}, 1", "", r"must give \(loss, gradients\)"),
        (
            "def loss_and_gradients(p, x, y): return p['w3']",
            "",
            "own.py:1: KeyError.*given w1 .6, 5.",
        ),
        (
            "import random\ndef loss_and_gradients(p, x, y): return random.random(), p",
            "",
            "another loss",
        ),
        ("def loss_and_gradients(p, x, y): return float('nan'), p", "", "gives the loss nan"),
        (
            "def example(): return 1\ndef loss_and_gradients(p, x, y): pass",
            "",
            r"example\(\) must give",
        ),
    ],
)
def test_what_cannot_be_judged(tmp_path, source, name, message):
    with pytest.raises(InputError, match=message):
        checked(tmp_path, source, name=name)


def test_the_command(run, tmp_path):
    (tmp_path / "helper.py").write_text("from numpy import exp\n")
    own = "print('loaded')\nfrom helper import exp" + GRADIENT.replace("np.exp", "exp")
    (tmp_path / "own.py").write_text(own.replace("    h = sig", "    print('called')\n    h = sig"))
    code, out, err = run("gradcheck", "own.py:gradient", "--json")
    found = json.loads(out)  # what the file prints is not in it
    assert code == 0 and found["passed"] and "loaded\ncalled" in err
    assert [row["tensor"] for row in found["reports"][0]["rows"]] == ["w_1", "w_2"]
    (tmp_path / "own.py").write_text(own.replace("len(X)", "-len(X)"))
    code, out, _ = run("gradcheck", "own.py")
    assert code == 1 and "wrong: gradient: w_1 (the sign is flipped), w_2 (the sign is" in out
    code, out, err = run("gradcheck", "own.py", "--set", "train.l2=1")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "--set and --data-dir go with" in err
    code, out, err = run("gradcheck", "no.py:gradient")
    assert (code, out, err) == (2, "", "error: no.py: no such file; give FILE.py:FUNCTION\n")
