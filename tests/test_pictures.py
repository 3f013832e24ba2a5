"""Pictures that show what they say, and lines of progress in words."""

import math

import numpy as np
import pytest

from manualnn import cli, plots
from manualnn.training import Record


def history(label, accuracies, seed=0):
    return [
        {
            "run": label, "seed": seed, "epoch": i, "step": 10 * i, "train_loss": 1 / i,
            "valid_loss": 1 / i, "test_loss": None, "train_accuracy": value,
            "valid_accuracy": value, "test_accuracy": None,
        }
        for i, value in enumerate(accuracies, 1)
    ]  # fmt: skip


def rows(networks, epochs=7):
    return [
        row
        for k in range(networks)
        for row in history(f"net {k}", np.linspace(0.1, 0.3 + 0.6 * k / networks, epochs))
    ]


def test_of_many_networks_the_best_have_colours_and_the_others_are_grey(tmp_path):
    figure = plots.curves(rows(54), "many")
    for axes in figure.axes:
        named = [line for line in axes.lines if not line.get_label().startswith("_")]
        assert [line.get_label() for line in named] == [f"net {k}" for k in range(53, 45, -1)]
        assert len({line.get_color() for line in named}) == 8
        assert axes.get_legend() is not None
        assert "the best 8 of 54, the others grey" in axes.get_title()
    assert all(line.get_color() != "0.8" for line in plots.curves(rows(9), "few").axes[0].lines)


def test_the_seeds_of_a_setting_share_its_colour():
    drawn = [row for run in "ab" for seed in range(3) for row in history(run, [0.1, 0.5], seed)]
    lines = plots.curves(drawn, "t").axes[0].lines
    colours = {
        line.get_label()[0]: line.get_color() for line in lines if line.get_label()[0] in "ab"
    }
    assert colours == {"a": "C0", "b": "C1"}
    assert {line.get_color() for line in lines} == {"C0", "C1"}


def test_a_network_that_stopped_is_not_among_the_best():
    stopped = history("stopped", [0.99])
    titles = [
        line.get_label()
        for line in plots.curves(stopped + rows(20), "t").axes[0].lines
        if not line.get_label().startswith("_")
    ]
    assert "stopped" not in titles and "net 19" in titles


@pytest.mark.parametrize("epochs", [1, 2, 7, 23, 50])
def test_the_last_epoch_has_a_tick(epochs):
    for axes in plots.curves(rows(2, epochs), "ticks").axes:
        assert max(axes.get_xticks()) == epochs


def test_curves_say_what_training_figures_are_and_what_is_cut_off():
    single = plots.curves(history("one", [0.1, 0.9]), "one").axes[0]
    labels = [text.get_text() for text in single.get_legend().get_texts()]
    assert "train, average over the epoch" in labels
    late = [0.1, 0.5, *np.linspace(0.94, 0.95, 20)]
    figure = plots.curves(history("a", late) + history("b", late), "two")
    assert "averages over the epoch" in figure.axes[0].get_title()
    assert "what lies outside is cut off" in figure.axes[0].get_title()
    compared = plots.comparison([("a", [history("a", late)])], "compared", "valid")
    assert "what lies outside is cut off" in compared.axes[2].get_title()
    assert "cut off" not in compared.axes[0].get_title()


def test_a_panel_with_a_linear_axis_is_called_after_that_axis():
    network = {"samples": 8, "corruption": 1.0, "run": "r", "rows": history("r", [0.5] * 40)}
    for row in network["rows"]:
        row["test_loss"] = 1.0
    short = network | {"samples": 16, "rows": network["rows"][:5]}
    figure = plots.memorisation([network, short], "t", None)
    assert [axes.get_title().split(",")[0] for axes in figure.axes] == [
        "loss on a linear axis", "loss on a logarithmic axis",
    ]  # fmt: skip


def test_the_title_of_images_is_near_them(tmp_path):
    figure = plots.image_grid(np.zeros((32, 1, 28, 28)), ["a"] * 32, "near")
    figure.draw_without_rendering()
    [axes] = figure.axes
    title = figure._suptitle.get_window_extent()
    gap = title.y0 - max(text.get_window_extent().y1 for text in axes.texts)
    assert 0 < gap < 2 * title.height


def record(loss, accuracy, valid=None, label="a"):
    return Record(label, 0, 3, 30, 0.5, 0.1, loss, accuracy, 1.0, valid, None, None)


def test_progress_of_several_networks_is_a_range_and_no_mean():
    line = cli._describe([record(0.1, 0.9, 0.8), record(1083.799, 0.1, 0.2)])
    assert "loss 0.1000 to 1083.7990" in line and "541" not in line
    assert "accuracy 90.00 % to 10.00 %" in line and "validation 80.00 % to 20.00 %" in line
    assert "(2 networks, best to worst)" in line
    for some in (
        [record(0.1, 0.9), record(math.nan, 0.1)],
        [record(math.nan, 0.1), record(0.1, 0.9)],
    ):
        assert "loss 0.1000 (1 not finite)  accuracy 90.00 % to 10.00 %" in cli._describe(some)
    single = cli._describe([record(0.1, 0.9)])
    assert single == "epoch   3  loss 0.1000  accuracy 90.00 %  0.50 s"


def test_what_was_never_fitted_is_said_in_words(capsys):
    assert cli._spread([None, None], 1, "", "not fitted") == "not fitted"
    assert cli._spread([3, None], 1, "", "not fitted") == "3 (1 of 2 not fitted)"
    base = {"train_loss": 0.5, "train_accuracy": 0.5, "test_loss": 0.7, "test_accuracy": 0.5}
    more = {"mean_test_loss": 0.7, "guess": "ln 2", "guess_loss": math.log(2), "explanation": "x"}
    cli._print_memorised(base | more | {"epochs_to_fit": None, "epochs": 20})
    assert "not all fitted in 20 epochs" in capsys.readouterr().out
    runs = [base | {"samples": 8, "run": "r", "epochs_to_fit": None, "epochs": 20}]
    cli._print_memorised(base | more | {"runs": runs, "epochs": 20})
    out = capsys.readouterr().out
    assert "8 samples, r: not fitted in 20 epochs, training loss 0.5" in out and " - " not in out
