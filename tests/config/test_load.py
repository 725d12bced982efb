"""Strict loading: what is accepted, what each mistake says, and the way back to YAML."""

from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cosmos_mcore.config.load import load_config, to_yaml
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.config.validate import validate
from cosmos_mcore.config.values import FolderName, Fraction, accepts, leaf_kinds

CONFIGS = sorted((Path(__file__).parents[2] / "conf").glob("*.yaml"))


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def mistake(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load(path: Path) -> None:
    config = load_config(path)
    assert config.job.name != RunConfig().job.name


def test_shipped_configs_are_there_under_their_fixed_names() -> None:
    names = {path.stem: load_config(path).job for path in CONFIGS}
    assert names["teal_tp1"].name == "base_4b_example_tealrobotsmall_tp1"
    assert names["teal_tp4"].name == "base_4b_example_tealrobot_tp4"
    assert {names[stem].project for stem in ("teal_tp1", "teal_tp4")} == {"posttraining"}
    assert {"cosmos_12b_tp8", "multinode_4b"} <= set(names)


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == RunConfig()
    assert load_config(write(tmp_path, "model:\n  # all commented out\n")) == RunConfig()


def test_file_base_and_overrides_win_in_this_order(tmp_path: Path) -> None:
    (tmp_path / "common").mkdir()
    write(tmp_path, "training: {seed: 1, train_iters: 1}\ndata: {path: a}\n", "common/root.yaml")
    write(tmp_path, "extends: root.yaml\ntraining: {train_iters: 2, global_batch_size: 2}\n", "common/base.yaml")
    path = write(tmp_path, "extends: common/base.yaml\ntraining:\n  global_batch_size: 3\ndata.path: [b, c]\n")
    config = load_config(path, ["training.global_batch_size=4", "optimizer.lr=2e-4"])
    training = config.training
    assert (training.seed, training.train_iters, training.global_batch_size) == (1, 2, 4)
    assert config.data.path == ["b", "c"]
    assert config.optimizer.lr == 2e-4


def test_values_of_every_kind(tmp_path: Path) -> None:
    overrides = ["data.path=[x.mp4,y]", "checkpoint.keep=2", "checkpoint.load=null", "parallel.sequence_parallel=false"]
    config = load_config(write(tmp_path, "checkpoint: {load: a.pt}\noptimizer: {lr: 1}\n"), overrides)
    assert config.data.path == ["x.mp4", "y"]
    assert (config.checkpoint.keep, config.checkpoint.load, config.optimizer.lr) == (2, None, 1)
    # The text of an override stays text where the key wants text.
    assert load_config(write(tmp_path, ""), ["job.name=007"]).job.name == "007"
    assert load_config(write(tmp_path, ""), ["data.path=a=b"]).data.path == "a=b"
    assert load_config(write(tmp_path, ""), ["data.path=/take #2"]).data.path == "/take #2"
    assert load_config(write(tmp_path, ""), ["data.path='/take' #2"]).data.path == "/take"


def test_interpolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPS", "/clips")
    path = write(tmp_path, "data: {path: '${oc.env:CLIPS}', height: 64, width: '${data.height}'}\n")
    config = load_config(path)
    assert (config.data.path, config.data.width) == ("/clips", 64)
    assert mistake(path, "data.width=${data.depth}").startswith(
        "override data.width=${data.depth}: data.width cannot be resolved"
    )
    monkeypatch.delenv("CLIPS")
    assert "CLIPS" in mistake(path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lr=1", "unknown key lr; did you mean optimizer.lr?"),
        ("data.hieght=64", "unknown key data.hieght; did you mean data.height?"),
        ("optimzer.lr=1", "unknown key optimzer.lr; did you mean optimizer.lr?"),
        ("optim={lr: 1}", "unknown key optim.lr; did you mean optimizer.lr?"),
        ("data.height.x=1", "unknown key data.height.x; did you mean data.height?"),
        ("model=tiny", "model is a section and cannot be 'tiny'; set one of model.preset, model.num_layers"),
        ("optimizer", "must have the form section.key=value"),
        ("=3", "must have the form section.key=value"),
        ("data.path=[a", "not valid YAML"),
        ("training.train_iters=ten", "training.train_iters='ten' must be a whole number of at least 1"),
        ("training.train_iters=1.5", "training.train_iters=1.5 must be a whole number of at least 1"),
        ("training.seed=true", "training.seed=true must be a whole number from 0 to 4294967295"),
        ("training.seed=4294967296", "training.seed=4294967296 must be a whole number from 0 to 4294967295"),
        ("optimizer.lr='1'", "optimizer.lr='1' must be a number above 0"),
        ("optimizer.lr=.inf", "optimizer.lr=inf must be a number above 0"),
        ("optimizer.weight_decay=.nan", "optimizer.weight_decay=nan must be a number of at least 0"),
        ("optimizer.adam_beta2=1", "optimizer.adam_beta2=1 must be a number from 0 to below 1"),
        ("checkpoint.keep=all", "checkpoint.keep='all' must be a whole number of at least 1 or null"),
        ("parallel.sequence_parallel=1", "parallel.sequence_parallel=1 must be true or false"),
        ("precision.dtype=fp16", "precision.dtype='fp16' must be one of bf16, fp32"),
        ("data.path=[]", "data.path=[] must be a non-empty string or a non-empty list of strings"),
        ("data.path=[1]", "data.path=[1] must be a non-empty string or a non-empty list of strings"),
        ("data.path=", "data.path=null must be a non-empty string or a non-empty list of strings"),
        ("job.name=0x_", "not valid YAML: invalid literal for int()"),
        ("training.seed=!!int x", "not valid YAML: invalid literal for int()"),
        ("checkpoint.export_original=!!bool x", "not valid YAML: 'x'"),
        ("data.path=\udcff", "not valid YAML: 'utf-8' codec can't encode"),
        ("job.name=a #2", "job.name='a #2' must be a folder's name of letters, digits"),
        ("job.name=a/b", "job.name='a/b' must be a folder's name of letters, digits"),
        (f"job.name={'x' * 256}", f"job.name='{'x' * 256}' must be a folder's name of letters, digits"),
        ("job.name=..", "job.name='..' must be a folder's name of letters, digits"),
    ],
)
def test_mistakes_in_an_override(tmp_path: Path, override: str, expected: str) -> None:
    assert mistake(write(tmp_path, ""), override).startswith(f"override {override}: {expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer:\n  learning: 1\n", "unknown key optimizer.learning; did you mean optimizer."),
        ("optimizer: 1\n", "optimizer is a section and cannot be 1"),
        ("data: {height: tall}\n", "data.height='tall' must be a whole number of at least 1"),
        ("job: {name: 7}\n", "job.name=7 must be a folder's name of letters"),
        ("- a\n", "a config must consist of sections with keys, not of a list"),
        ("a: b: c\n", "not valid YAML"),
        ("data.height: 32\ndata: {height: 64}\n", "data.height is there twice, with a dot and in its section"),
        ("job: {name: 0b_}\n", "cannot be read as a config: invalid literal for int()"),
        ("data: {height: 1, height: 2}\n", "not valid YAML: while constructing a mapping"),
        ("extends: [a.yaml, b.yaml]\n", "extends=['a.yaml', 'b.yaml'] must be the name of one YAML file"),
        ("extends: run.yaml\n", "extends goes round in a circle: run.yaml -> run.yaml"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    assert mistake(path).startswith(f"{path}: {expected}")


def test_a_mistake_names_the_base_file_that_has_it(tmp_path: Path) -> None:
    base = write(tmp_path, "training: {seed: -1}\n", "base.yaml")
    path = write(tmp_path, "extends: base.yaml\n")
    assert mistake(path).startswith(f"{base}: training.seed=-1")
    assert load_config(path, ["training.seed=1"]).training.seed == 1


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    write(tmp_path, "", "teal_tp1.yaml")
    assert mistake(tmp_path / "teal_tp.yaml").endswith(
        f"no such config file; did you mean {tmp_path / 'teal_tp1.yaml'}?"
    )
    path = write(tmp_path, "extends: nowhere.yaml\n")
    assert mistake(path).startswith(f"{path}: extends={tmp_path / 'nowhere.yaml'}: there is no such config file")
    assert mistake(tmp_path).startswith(f"{tmp_path}: cannot be read as a config")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml: " in mistake(tmp_path / "binary.yaml")


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an annotated type. Nearly all that are drawn keep its rules: hypothesis refuses to filter out many."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is FolderName:
        return st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,9}", fullmatch=True)
    if kind is Fraction:
        return st.floats(0, 1, exclude_max=True) | st.just(0)
    if origin is Annotated:
        return values_of(args[0]).filter(lambda value: accepts(kind, value))
    if origin is Literal:
        return st.sampled_from(args)
    if origin is list:
        return st.lists(values_of(args[0]), min_size=1, max_size=3)
    if len(args) > 1:
        return st.one_of(*map(values_of, args))
    plain = {
        int: st.integers(1, 10**6),
        float: st.floats(0, 1, exclude_min=True) | st.integers(1, 10**20),
        bool: st.booleans(),
        str: st.sampled_from(["null", "1e3", "yes", "${data.path}", "\\${a}", "a: b", "# c", "~", "0x1F", "x\ny"])
        | st.text(st.characters(codec="utf-8"), max_size=8),
        type(None): st.none(),
    }
    return plain[kind]


# Keys whose values must suit each other stay at their defaults here.
TIED = ("checkpoint.keep_every", "logging.profile_step_start", "logging.profile_step_end")
FREE = {
    key: kind
    for key, kind in leaf_kinds(RunConfig).items()
    if (key.partition(".")[0] in ("job", "optimizer", "checkpoint", "logging") and key not in TIED)
    or key in ("data.path", "precision.dtype")
}


@given(st.fixed_dictionaries({key: values_of(kind) for key, kind in FREE.items()}))
@example({"data.path": "${"})
@example({"data.path": ["\\\\${a}", "${b}\\"]})
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    config = RunConfig()
    config.schedule.min_lr = 0.0
    for key, value in values.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    validate(config)
    path = tmp_path_factory.mktemp("round_trip") / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    assert to_yaml(load_config(path)) == to_yaml(config)


def test_every_key_has_a_description_for_its_error_message(tmp_path: Path) -> None:
    assert len(leaf_kinds(RunConfig)) > 40
    for key in leaf_kinds(RunConfig):
        assert f"{key}={{'wrong': 1}} must be " in mistake(write(tmp_path, f"{key}: {{wrong: 1}}\n"))


def test_unions_are_accepted_in_both_spellings() -> None:
    assert accepts(Union[int, None], None) and accepts(int | None, 3) and not accepts(int | None, "3")  # noqa: UP007
