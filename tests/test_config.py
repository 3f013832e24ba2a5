"""Strict TOML: what is wrong is named with its file, line, key and the nearest valid name."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manualnn.config import load_config, parse_config
from manualnn.errors import InputError
from manualnn.files import shipped

SHIPPED = sorted(path.stem for path in shipped("configs").glob("*.toml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", SHIPPED)
def test_a_resolved_config_reproduces_itself(name, tmp_path):
    config = load_config(name)
    again = load_config(write(tmp_path, config.to_toml()))
    assert again.to_dict() == config.to_dict()


def test_precedence_and_types(tmp_path):
    path = write(tmp_path, "[train]\nepochs = 3\nbatch_size = 10\nl2 = 1\n")
    sets = ["train.batch_size=20", "data.name=kmnist", "train.optimizer.learning_rate=[0.1, 1]"]
    config = load_config(path, sets, {"train.epochs": 7, "train.seed": None})
    assert (config.train.epochs, config.train.batch_size, config.train.seed) == (7, 20, 0)
    assert config.data.name == "kmnist"  # not TOML, so a string
    assert config.train.optimizer.learning_rate == (0.1, 1.0)
    assert config.train.l2 == 1.0 and isinstance(config.train.l2, float)
    assert config.name == "c"


def test_defaults_are_neutral():
    config = parse_config({})
    train = config.train
    assert (train.l1, train.l2, train.label_smoothing, train.optimizer.momentum) == (0, 0, 0, 0)
    assert train.schedule.name == "constant" and train.early_stopping.patience == 0


BAD = {
    "[train]\nepoch = 3": ":2: train.epoch: unknown key; did you mean 'epochs'?",
    "[trane]\nepochs = 3": ":1: trane: unknown key; did you mean 'train'?",
    "[train]\n\nbatch_size = 0": ":3: train.batch_size = 0: must be at least 1",
    "[train.optimizer]\nlearning_rate = 'fast'": "'fast': must be a number or a list, each",
    "[train.optimizer]\nlearning_rate = -0.1": "learning_rate = -0.1: must be at least 0",
    "[train.optimizer]\nlearning_rate = nan": "must be a number",
    "[train.optimizer]\nlearning_rate = [0.1, true]": "learning_rate = True: must be a number",
    "[train.optimizer]\nname = 'sdg'": "name = 'sdg': unknown; did you mean 'sgd'?",
    "[train]\nepochs = 2.5": "train.epochs = 2.5: must be a whole number",
    "[train]\nepochs = true": "train.epochs = True: must be a whole number",
    "[train]\nshuffle = 1": "train.shuffle = 1: must be true or false",
    "[train]\nlabel_smoothing = 1": "train.label_smoothing = 1.0: must be below 1",
    "[train]\nseeds = []": "train.seeds = []: must be a list, each a whole number",
    "[train]\noptimizer = 'sgd'": "train.optimizer must be a table",
    "[model]\nlayers = [3]": 'model.layers: each layer is a list that starts with a name: ["relu"]',
    "[model]\nlayers = 'relu'": "model.layers = 'relu': must be a list of layers",
    "[data]\nname = 'mnits'": "data.name = 'mnits': unknown; did you mean 'mnist'?",
    "[train\nepochs": "not valid TOML",
    "[train]\nl1 = [1, 2]\nl2 = [1, 2, 3]": "lists of different lengths",
    "[train]\nl1 = [1, 2]\nseeds = [1, 2, 3]": "lists of different lengths",
    "[train.early_stopping]\npatience = 3": "needs a validation split: set data.valid",
    f"[train]\nseed = {'9' * 5000}": "not valid TOML: Exceeds the limit",
    f"[train]\nseed = 0x{'f' * 5000}": "train.seed: a whole number of more than 64 bits",
    f"[train]\nl2 = {10**400}": "train.l2: a whole number of more than 64 bits",
    f"[model]\nlayers = [['linear', {2**63}]]": "model.layers.0.1: a whole number of more than",
    f"[model]\nlayers = {'[' * 2000}": "not valid TOML: nested too deep",
    f"[model]\nlayers = {'[' * 90}{']' * 90}": "nested too deep",
    f"[data]\nname = '{'c' * 9000}'": "data.name = 'ccc",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_wrong_is_named(text, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(InputError) as error:
        load_config(path)
    message = str(error.value)
    assert BAD[text] in message
    assert "\n" not in message and len(message) <= 1000
    assert "c" in message


def test_errors_name_the_flag_they_come_from():
    with pytest.raises(InputError, match=r"^--set: train.epochz: unknown key; did you mean"):
        load_config("mnist-mlp", ["train.epochz=3"])
    with pytest.raises(InputError, match=r"^--epochs: train.epochs = 0: must be at least 1"):
        load_config("mnist-mlp", flags={"train.epochs": 0})
    with pytest.raises(InputError, match="write key=value"):
        load_config("mnist-mlp", ["train.epochs"])
    with pytest.raises(InputError, match="epochs is not a table"):
        load_config("mnist-mlp", ["train.epochs.more=3"])
    with pytest.raises(InputError, match=r"^--set train\.seeds: nested too deep"):
        load_config("mnist-mlp", [f"train.seeds={'[' * 3000}"])
    with pytest.raises(InputError, match=r"no config 'mnist-mpl'.*did you mean 'mnist-mlp'"):
        load_config("mnist-mpl")


def test_replicas():
    config = parse_config({"train": {"seeds": [4, 5], "optimizer": {"momentum": [0.1, 0.2]}}}, "x")
    assert [(r.seed, r.momentum, r.label) for r in config.replicas()] == [
        (4, 0.1, "momentum 0.1"),
        (5, 0.2, "momentum 0.2"),
    ]
    with pytest.raises(InputError, match="two networks of the population have the same settings"):
        parse_config({"train": {"seeds": [1, 1]}})
    [one] = parse_config({"train": {"seed": 3}}, "x").replicas()
    assert (one.seed, one.label) == (3, "x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["data", "train", "model", "layers", "seeds", "epochs", "optimizer", "x"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["data", "train", "model", "grid"]), JSON, max_size=3))
def test_any_tree_is_a_config_or_one_line(tree):
    try:
        config = parse_config(tree)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert parse_config(tomllib.loads(config.to_toml())).to_dict() == config.to_dict()


RUNS = """
[data]
name = "mnist"

[train]
epochs = 4
l2 = 1e-3

[train.optimizer]
learning_rate = [0.01, 0.1]

[[run]]
label = "sgd"

[[run]]
train.optimizer.name = "adam"
train.optimizer.learning_rate = 0.001

[[run]]
label = "sgd, no penalty"
train.l2 = 0
[run.train.optimizer]
momentum = 0.5
"""


def test_runs_change_the_rest_of_the_config(tmp_path):
    config = load_config(write(tmp_path, RUNS))
    first, second, third = config.members()
    assert [run.label for run in config.members()] == ["sgd", "run 2", "sgd, no penalty"]
    assert first.train.optimizer.learning_rate == (0.01, 0.1) and first.train.l2 == 1e-3
    assert (second.train.optimizer.name, second.train.optimizer.learning_rate) == ("adam", 0.001)
    assert (third.train.l2, third.train.optimizer.momentum) == (0.0, 0.5)
    # The runs that differ in columns alone are one population; labels say what is what.
    sgd, adam = config.populations()
    assert [replica.label for replica in sgd.replicas] == [
        "sgd, learning_rate 0.01", "sgd, learning_rate 0.1",
        "sgd, no penalty, learning_rate 0.01", "sgd, no penalty, learning_rate 0.1",
    ]  # fmt: skip
    assert [replica.l2 for replica in sgd.replicas] == [1e-3, 1e-3, 0, 0]
    assert [replica.label for replica in adam.replicas] == ["run 2"]
    again = load_config(write(tmp_path, config.to_toml()))
    assert again.members() == config.members()


def test_set_and_flags_win_over_runs(tmp_path):
    text = RUNS + "\n[[run]]\nlabel = 'long'\ntrain.epochs = 9\n"
    config = load_config(write(tmp_path, text), ["train.l2=0.5"], {"train.epochs": 2})
    assert {run.train.epochs for run in config.members()} == {2}
    assert {run.train.l2 for run in config.members()} == {0.5}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train.epoch = 3", r"c.toml:25: train.epoch: unknown key; did you mean 'epochs'"),
        ("train.epochs = 0", "c.toml:25: train.epochs = 0: must be at least 1"),
        ('label = "sgd"', r"c.toml:25: run.label = 'sgd': another run has it"),
        ("label = 3", "c.toml:25: run.label = 3: must be a string"),
        ("train.l2 = [0, 1, 2]", "c, run 'run 4': lists of different lengths"),
        ("train.optimizer.momentum = -1", "c.toml:25: train.optimizer.momentum = -1.0"),
    ],
)
def test_what_is_wrong_in_a_run_is_named_with_its_line(tmp_path, line, message):
    with pytest.raises(InputError, match=message):
        load_config(write(tmp_path, RUNS + f"[[run]]\n{line}\n"))


def test_a_single_run_table_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"run must be tables, each headed \[\[run\]\]"):
        load_config(write(tmp_path, "[run]\nlabel = 'a'\n"))


def test_another_data_set_renames_the_config(tmp_path):
    (tmp_path / "kmnist-cnn.toml").write_text("")
    path = tmp_path / "kmnist-cnn.toml"
    assert load_config(path, None, {"data.name": "fashion-mnist"}).name == "fashion-mnist-cnn"
    assert load_config(path).name == "kmnist-cnn"
    assert load_config(write(tmp_path, ""), None, {"data.name": "kmnist"}).name == "c"
    # mnist-mlp is another config, whose runs these are not.
    assert load_config("kmnist-mlp", None, {"data.name": "mnist"}).name == "kmnist-mlp-mnist"
    assert load_config("kmnist-mlp", None, {"data.name": "kmnist"}).name == "kmnist-mlp"


def test_the_place_of_another_kind_of_data_set_is_left_behind(tmp_path):
    path = write(tmp_path, '[data]\nname = "csv"\ndir = "tables"\n')
    assert load_config(path, None, {"data.name": "mnist"}).data.dir is None
    path = write(tmp_path, '[data]\nname = "mnist"\ndir = "sets"\n')
    assert load_config(path, None, {"data.name": "kmnist"}).data.dir == "sets"


def test_grids_with_close_values_and_varied_tables(tmp_path):
    text = "[grid]\n'train.l2' = [0.1234561, 0.1234562]\n"
    labels = [run.label for run in load_config(write(tmp_path, text)).expand().members()]
    assert labels == ["l2 0.1234561", "l2 0.1234562"]
    text = "[grid]\n'train.optimizer' = [{learning_rate = 0.1}, {learning_rate = 0.2}]\n"
    with pytest.raises(
        InputError, match=r"\[grid\] varies train.optimizer, which train.optimizer."
    ):
        load_config(write(tmp_path, text), ["train.optimizer.learning_rate=0.5"])
    quoted = load_config(write(tmp_path, ""), grid=['"train.l2"=[0, 1]'])
    assert dict(quoted.grid) == {"train.l2": (0, 1)}


def test_dropout_lists_belong_to_the_replicas(tmp_path):
    text = '[model]\nlayers = [["dropout", [0.1, 0.5]], ["dropout", 0.2], ["linear", "classes"]]\n'
    config = load_config(write(tmp_path, text))
    [population] = config.populations()
    assert [replica.drop_rates for replica in population.replicas] == [(0.1, 0.2), (0.5, 0.2)]
    assert population.layers()[:2] == [["dropout", [0.1, 0.5]], ["dropout", 0.2]]
    assert population.layers(population.replicas[1])[0] == ["dropout", 0.5]
    with pytest.raises(InputError, match="an empty list of dropout probabilities"):
        load_config(write(tmp_path, text.replace("[0.1, 0.5]", "[]")))


def test_class_weights_are_balanced_or_a_list():
    train = parse_config({"train": {"class_weights": [1, 2.5]}}).train
    assert train.class_weights == (1.0, 2.5)
    with pytest.raises(InputError, match=r"must be at least 0"):
        parse_config({"train": {"class_weights": [1, -2]}})
    with pytest.raises(InputError, match="'even': unknown; "):
        parse_config({"train": {"class_weights": "even"}})
    with pytest.raises(InputError, match=r'must be "balanced" or a list, each a number'):
        parse_config({"train": {"class_weights": 3}})
