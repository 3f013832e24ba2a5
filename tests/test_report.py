"""The PDF: its pages, what they say, notes that fit or do not, and what is refused."""

import csv
import re
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from manualnn import classes, derivation, load_config, markdown, train
from manualnn.errors import InputError
from manualnn.pages import new_page, stack
from manualnn.report import Options, draw, report
from manualnn.report_parts import _mean, ranked
from manualnn.results import Trained

from .conftest import write_folder

LAYERS = [
    "data.valid=60",
    "train.epochs=2",
    'model.layers=[["conv2d", 3, 3, {padding = 1}], ["relu"], ["max_pool2d", 2], ["linear", 5],'
    ' ["tanh"], ["dropout", 0.1], ["linear", "classes"]]',
]


def _pages(folders, author, notes, **options):
    return draw(folders, Options(author, notes, **options))


@pytest.fixture
def trained(folder, tmp_path):
    """A finished run of a small convolutional network."""
    config = load_config("mnist-mlp", LAYERS, {"data.name": "idx", "data.dir": str(folder)})
    train(config, tmp_path / "first", device="cpu")
    return tmp_path / "first"


@pytest.fixture
def memorised(run, folder, tmp_path):
    arguments = ["--data", folder, "--samples", 40, "--epochs", 30, "--device", "cpu"]
    assert run("random-labels", *arguments, "--out", "coins")[0] == 0
    return tmp_path / "coins"


def pages(path):
    return len(re.findall(rb"/Type\s*/Page\b", path.read_bytes()))


def words(figures):
    """All text on pages, as it was given to the drawing library."""
    found = []
    for page in figures:
        found += [text.get_text() for text in page.texts]
        for axes in page.axes:
            found += [text.get_text() for text in (*axes.texts, axes.title)]
    return "\n".join(found)


def test_a_training_run_is_one_page(trained):
    assert report([trained]) == trained / "report.pdf"
    assert pages(trained / "report.pdf") == 1
    text = words(_pages([trained], "Ada, 1", None))
    for part in (
        "Ada, 1", "Conv 3\u00d73, 3", "padding 1\u00d71", "3\u00d73\u00d73", "30 parameters",
        "Max-pool 2\u00d72", "Linear 5", "Dropout 0.1", "SGD, learning rate 0.2, momentum 0.9",
        "cross entropy, label smoothing 0.1", "of 128, 2 epochs", "idx test: ",
    ):  # fmt: skip
        assert part in text, part
    import json

    metrics = json.loads((trained / "metrics.json").read_text())
    for key in ("train", "valid", "test"):
        assert f"{100 * metrics[f'{key}_accuracy']:.2f}" in text
        assert f"{metrics[f'{key}_loss']:.4f}" in text


def test_random_labels_notes_and_derivation(trained, memorised, tmp_path):
    notes = tmp_path / "notes.md"
    notes.write_text("# Tried\n- **more** `layers`, for 5 $ or 10 $\n- fewer\n\nThe end.\n")
    out = report([trained, memorised], tmp_path / "r.pdf", "Ada", notes, derivation=True)
    assert pages(out) == 2  # the derivation included
    [first, second] = _pages([trained, memorised], "Ada", notes, derivation=True, title="By hand")
    text = words([second])
    assert "Tried" in text and "more layers, for 5 $ or 10 $" in text and "\u2022" in text
    assert "Test loss after the last update" in text and "ln 2 = 0.6931" in text
    assert "mean over the epochs" in text.replace("\n", " ") and "memoris" in text
    assert "By hand: coins" in text and "By hand" in words([first])
    assert words([first, second]).count(FIRST) == 1
    page = report([trained, memorised], tmp_path / "p.pdf", derivation=True, derivation_page=True)
    assert pages(page) == 3 and pages(report([memorised])) == 1
    streams = re.findall(rb"stream\r?\n(.*?)endstream", out.read_bytes(), re.DOTALL)
    assert any(b"BT" in zlib.decompress(s) for s in streams if s[:1] == b"x")  # text, no picture


FIRST = r"\sum_k \hat y_i\, (\delta_{ik} - \hat y_k)\, \dfrac{\partial f_k}{\partial w}$"


def test_the_derivation_begins_with_any_loss_of_any_model():
    short, page = new_page("x"), derivation.page()
    stack(short, 1.0, derivation.short())
    for figure in (short, page):
        formulas = [t.get_text() for t in figure.texts if r"\partial" in t.get_text()]
        assert formulas[0].startswith(r"$\dfrac{\partial L}{\partial w}") and FIRST in formulas[0]
    assert all(t.get_position()[1] > 0.05 for t in page.texts)


def test_headings_touch_no_panel_and_captions_can_be_read(trained, memorised, tmp_path):
    notes = tmp_path / "notes.md"
    notes.write_text("# Tried\nThis and that.\n" + "\nMore.\n" * 9)
    for page in _pages([trained, memorised], "Ada", notes, derivation=True):
        renderer = FigureCanvasAgg(page).get_renderer()
        panels = [axes.get_tightbbox(renderer) for axes in page.axes if axes.get_images() or
                  (axes.lines and axes.axison)]  # fmt: skip
        for text in [t for t in page.texts if t.get_fontsize() == 11]:
            box = text.get_window_extent(renderer)
            assert not any(box.overlaps(panel) for panel in panels), text.get_text()
        sizes = [t.get_fontsize() for t in page.texts if t.get_text()]
        sizes += [axes.title.get_fontsize() for axes in page.axes if axes.get_title()]
        assert min(sizes) >= 6.5


def test_markdown_is_drawn_as_what_it_means():
    text = r"""
# Head
A *word*, `$HOME` and $x_1^2$; 5 $ or \$6, $no\such$.

1. one
   goes on
- two

| a | b |
|---|--:|
| $\alpha$ | a cell that has many more words than there is room for on one line of this page |

```
a  = "$b$"
```
$$y =
x$$
end
"""
    page = new_page("x")
    end = stack(page, 1.0, markdown.blocks(text, width=3))
    found = {t.get_text(): t for t in page.texts}
    assert "A word, $HOME and $x_1^2$; 5" in " ".join(found).replace(r"\$", "$")
    assert found["$y = x$"].get_parse_math() and found[r"$\alpha$"].get_parse_math()
    assert r"$6, $no\such$." in " ".join(found).replace(r"\$", "$")
    assert {"Head", "1.", "one goes on", "\u2022", "two", "end", 'a  = "$b$"'} <= set(found)
    assert not any("|" in text or "---" in text for text in found)
    assert found["a"].get_fontweight() == "bold"
    renderer = FigureCanvasAgg(page).get_renderer()
    right = max(t.get_window_extent(renderer).x1 for text, t in found.items() if text)
    assert right / page.dpi < 0.6 + 3 * 1.1  # a tenth for hinting
    assert 2 < end < 5


@pytest.mark.parametrize(
    "text",
    [
        r"a\bad\${}$a",
        r"\\`$x$ $^$ ${}$",
        "|",
        "| a",
        "|a|\n|---|",
        "$$",
        "$$ x",
        "```",
        "```\n\t$x",
        "#",
    ],
)
def test_no_text_breaks_a_page(text):
    page = new_page("x")
    stack(page, 1.0, markdown.blocks(text, width=3))
    FigureCanvasAgg(page).draw()


def test_names_and_examples_of_a_csv_files_classes(run, folder, tmp_path, monkeypatch):
    """What the CSV exercise's report shows: classes, their names, the sweep's findings."""
    write_folder(tmp_path / "big", classes=10, side=28)
    run("data", "export-csv", "idx", "--data-dir", tmp_path / "big", "--out", "csv")
    sets = ["--data", tmp_path / "csv", "--epochs", 1, "--device", "cpu", "-q"]
    assert run("train", "fashion-logistic", *sets)[0] == 0
    lines = [
        "--grid",
        "train.l2=[0, 0.1]",
        "--grid",
        "train.l1=[0]",
        "--grid",
        "train.batch_size=[64]",
    ]
    grid = [*lines, "--grid", "train.optimizer.learning_rate=[0.1]"]
    assert run("sweep", "fashion-logistic", *sets, *grid)[0] == 0
    found = Path("runs/fashion-logistic")
    text = words(_pages([found], "", None)).replace("\n", " ")
    assert "Classes" in text and "Findings of the sweep fashion-logistic-sweep" in text
    assert "2 combinations, chosen by validation accuracy." in text
    assert "Sandal" not in text  # other images
    monkeypatch.setattr(classes, "FASHION_MEAN", 112)  # that of these
    assert words(_pages([found], "", None)).count("Sandal") == 1
    assert "Sandal" in [t.get_text() for t in confusion(_pages([found], "", None)[0])]
    named = ",".join("abcdefghij")
    assert run("report", found, "--class-names", named, "--title", "By hand")[0] == 0
    [page] = _pages([found], "", None, class_names=tuple("abcdefghij"))
    assert [t.get_text() for t in confusion(page)] == list("abcdefghij")
    code, _, err = run("report", found, "--class-names", "a,b")
    assert code == 2 and err.endswith("error: --class-names: 2 names for 10 classes\n")
    moved = tmp_path / "other"
    shutil.copytree(tmp_path / "csv", moved)
    shutil.rmtree(found)
    assert run("train", "fashion-logistic", "--data", moved, *sets[2:])[0] == 0
    assert "Findings" not in words(_pages([found], "", None))  # that sweep had other data


def confusion(page):
    [axes] = [x for x in page.axes if x.get_xlabel() == "predicted class"]
    return axes.get_xticklabels()


def test_several_runs_in_one_folder(trained, run, folder, tmp_path):
    (tmp_path / "c.toml").write_text(
        '[data]\nname = "idx"\n[model]\nlayers = [["linear", "classes"]]\n[train]\nepochs = 2\n'
        "seeds = [0, 1]\n"
        '[[run]]\nlabel = "slow"\n[[run]]\nlabel = "fast"\ntrain.optimizer.learning_rate = 0.2\n'
    )
    assert run("train", "c.toml", "--data-dir", folder, "--out", "two", "--device", "cpu")[0] == 0
    text = words(_pages([tmp_path / "two"], "", None))
    assert "slow" in text and "fast" in text and "n = 2 seeds" in text and "\u00b1" in text
    assert pages(report([tmp_path / "two"])) == 1


def test_the_best_network_is_drawn_and_many_runs_are_ranked(run, folder, tmp_path):
    (tmp_path / "c.toml").write_text(
        '[data]\nname = "idx"\nvalid = 60\n[model]\nlayers = [["linear", 8], ["relu"],'
        ' ["dropout", 0.9], ["linear", "classes"]]\n[train]\nepochs = 2\nbatch_size = 32\n'
        '[grid]\n"model.layers.2.1" = [0.9, 0.05]\n"train.l2" = [0, 1e-4, 1e-3, 1e-2]\n'
        '"train.optimizer.learning_rate" = [0.1]\n'
    )
    assert run("sweep", "c.toml", "--data-dir", folder, "--device", "cpu")[0] == 0
    [page] = _pages([tmp_path / "runs/c-sweep"], "", None)
    text = words([page])
    assert "Dropout 0.05" in text and "Dropout 0.9" not in text
    with (tmp_path / "runs/c-sweep/sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    for i, row in enumerate(rows[:6], 1):
        assert f"run {i}: dropout {row['dropout']}" in text
        assert f"\n{100 * float(row['valid_accuracy']):.2f}\n" in text
    assert "run 7" not in text and "and 2 more" in text
    legends = [axes.get_legend() for axes in page.axes if axes.get_legend()]
    assert [len(legend.texts) for legend in legends] == [6, 6]


def test_means_are_of_the_networks_that_did_not_diverge():
    def trained(accuracy, diverged):
        return Trained({"test_accuracy": accuracy, "diverged": diverged}, [], None, None)

    group = [trained(0.9, False), trained(0.8, False), trained(0.1, True)]
    assert _mean(group, "test_accuracy", 100) == "85.00\u00b17.07"
    assert _mean(group[2:], "test_accuracy", 100) == "diverged"


def test_networks_are_ranked_by_validation_not_by_the_test_set():
    def trained(label, valid, loss, test, diverged=False):
        figures = {"valid_accuracy": valid, "valid_loss": loss, "test_accuracy": test}
        replica = SimpleNamespace(label=label)
        return Trained(figures | {"diverged": diverged}, [], replica, None)

    networks = [
        trained("lost", None, None, None, True), trained("a", 0.8, 0.5, 0.95),
        trained("b", 0.9, 0.6, 0.7), trained("c", 0.9, 0.5, 0.6), trained("d", 0.9, 0.5, 0.8),
    ]  # fmt: skip
    assert [name for name, _ in ranked(networks)] == ["c", "d", "b", "a", "lost"]
    without = [trained(n, None, None, t, n == "x") for n, t in (("x", 0.1), ("y", 0.5), ("z", 0.9))]
    assert [name for name, _ in ranked(without)] == ["y", "z", "x"]


def test_a_split_of_test_images_needs_no_training_file(run, folder, tmp_path):
    for path in folder.glob("train-*"):
        path.unlink()
    sets = ["--set", "data.source=test", "--set", "data.valid=20", "--epochs", 1]
    arguments = ["--data", folder, *sets, "--out", "s", "--device", "cpu"]
    assert run("train", "mnist-mlp", *arguments)[0] == 0
    text = words(_pages([tmp_path / "s"], "", None))
    assert f"a split of {folder.name}'s test images" in text and "(of the test images): " in text


def test_a_deep_network_stays_on_the_page(run, folder, tmp_path):
    layers = [["linear", 4], ["relu"]] * 40 + [["linear", "classes"]]
    sets = ["--set", f"model.layers={layers}".replace("'", '"'), "--epochs", 1]
    code, _, err = run("train", "mnist-mlp", "--data", folder, *sets, "--out", "d", "-q")
    assert code == 0, err
    [page] = _pages([tmp_path / "d"], "", None)
    assert "25 more" in words([page])  # of the input and 41 layers
    assert all(axes.get_position().y0 > 0 for axes in page.axes)


def test_a_memorisation_of_several_numbers_of_samples(trained, run, folder, tmp_path):
    arguments = ["--data", folder, "--samples", "20,40", "--epochs", 2, "--device", "cpu"]
    assert run("random-labels", *arguments, "--out", "coins")[0] == 0
    for runs in ([trained, tmp_path / "coins"], [tmp_path / "coins", trained]):
        assert "20 / 40, the first of" in words(_pages(runs, "", None, derivation=True))


def test_a_memorisation_without_test_images(run, folder, tmp_path):
    for path in folder.glob("t10k-*"):
        path.unlink()
    arguments = ["--data", folder, "--samples", 40, "--epochs", 2, "--device", "cpu"]
    assert run("random-labels", *arguments, "--out", "coins")[0] == 0
    assert "accuracy not measured" in words(_pages([tmp_path / "coins"], "", None))


def test_dollars_are_dollars(trained, run, folder, tmp_path):
    names = '["$5 {low}", "$9 {hi", "US$ a", "$\\\\bad$"]'
    arguments = ["--data-dir", folder, "--set", f"data.class_names={names}", "--epochs", 1]
    code, _, err = run("train", "mnist-mlp", *arguments, "--set", "data.name=idx", "--out", "d")
    assert code == 0, err
    assert pages(report([tmp_path / "d"], author="US$ 5% and $")) == 1


def test_notes_that_do_not_fit(trained, memorised, tmp_path):
    notes = tmp_path / "notes.md"
    notes.write_text("A line of a paragraph.\n\n" * 20)
    assert pages(report([trained], notes=notes)) == 2
    before = (trained / "report.pdf").read_bytes()
    notes.write_text("A line of a paragraph.\n\n" * 300)
    with pytest.raises(InputError, match=r"notes.md: longer than a page; a report has two"):
        report([trained], notes=notes)
    with pytest.raises(InputError, match=r"lines of text do not fit: the second page has room"):
        report([trained, memorised], notes=notes)
    assert (trained / "report.pdf").read_bytes() == before


def test_what_is_refused(trained, run, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, text in (
        (["empty"], "empty: holds no finished run: metrics.json is missing"),
        ([trained, trained, trained], "one or two runs on two pages, not 3"),
        ([trained, "--notes", "absent.md"], "absent.md: cannot be read"),
        ([trained, "--out", "first/metrics.json/r.pdf"], "cannot be written"),
    ):
        code, out, err = run("report", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and text in err, err
    code, out, err = run("report", trained, "--author", "Ada", "--derivation")
    assert code == 0 and out.strip().endswith("report.pdf") and not err
