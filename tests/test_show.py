"""The picture of a data set: its rows, its names, permuted pixels, and what is refused."""

import numpy as np
import pytest

from manualnn.data import load
from manualnn.data.prepare import permutation
from manualnn.errors import InputError
from manualnn.show import show

from .conftest import write_folder, write_idx


def drawn(figure):
    """The images of each row, and the rows' names."""
    pictures = [[axes.images[0].get_array() for axes in figure.axes if axes.images]]
    names = [text.get_text() for axes in figure.axes for text in axes.texts]
    columns = len(pictures[0]) // len(names)
    return [pictures[0][i : i + columns] for i in range(0, len(pictures[0]), columns)], names


def test_each_row_shows_different_images_of_one_class(folder):
    data = load("idx", folder)
    figure = show("idx", folder, class_names=("cat", "dog", "cow", "hen"), examples=3)
    rows, names = drawn(figure)
    assert names == ["cat", "dog", "cow", "hen"] and [len(row) for row in rows] == [3] * 4
    for k, row in enumerate(rows):
        of_class = data.train.images[data.train.labels == k, 0].numpy()
        for image in row:
            assert any(np.array_equal(image, other) for other in of_class)
        assert len({image.tobytes() for image in row}) == 3
    again, _ = drawn(show("idx", folder, examples=3))
    assert all(np.array_equal(a, b) for a, b in zip(rows[0], again[0], strict=True))
    other, _ = drawn(show("idx", folder, examples=3, seed=1))
    assert not all(np.array_equal(a, b) for a, b in zip(rows[0], other[0], strict=True))


def test_permuted_images_stand_beside_themselves(folder):
    rows, _ = drawn(show("idx", folder, "test", permute_seed=4))
    order = permutation(4, 36).numpy()
    for row in rows:
        for image, moved in zip(row[::2], row[1::2], strict=True):
            assert np.array_equal(image.flatten()[order], moved.flatten())


def test_an_image_that_is_there_twice_is_shown_once(tmp_path):
    images = np.zeros((6, 4, 4), np.uint8)
    images[5] = 9
    write_idx(tmp_path / "train-images-idx3-ubyte", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(6))
    [row], _ = drawn(show("idx", tmp_path))
    assert len(row) == 2


def test_show_writes_a_picture_or_one_line(run, tmp_path):
    write_folder(tmp_path / "clothes", side=8)
    code, out, err = run("show", "clothes", "--class-names", "$a, b$, $\\bad$, d_")
    assert (code, out) == (0, "clothes.png\n") and err.startswith("read idx (clothes): train 300")
    assert (tmp_path / "clothes.png").read_bytes().startswith(b"\x89PNG")
    run("data", "export-csv", "idx", "--data-dir", "clothes", "--out", "csv")
    assert run("show", "csv", "--out", "csv.png")[0] == 0
    assert run("show", "csv/train.csv", "--out", "one.png")[0] == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "csv.png").read_bytes()
    (tmp_path / "t.csv").write_text("0,3,2\n1,3,4\n")
    for arguments, text in (
        (["t.csv"], "t.csv: examples of 2 values are no images"),
        (["csv/test.csv"], "as features without a label"),
        (["csv", "--class-names", "a,b"], "label 3 is outside the 2 classes"),
        (["clothes", "--split", "valid"], "--split valid: use train or test"),
        (["clothes", "--out", "t.csv/x.png"], "--out t.csv/x.png: cannot be written"),
    ):
        code, out, err = run("show", *arguments)
        assert (code, out) == (2, "") and text in err.splitlines()[-1], err


def test_features_are_not_shown(tmp_path):
    (tmp_path / "train.csv").write_text("0,1.5\n")
    with pytest.raises(InputError, match="no images"):
        show("csv", tmp_path)
