"""A value becomes what its key declares: text as written, or a number inside its range."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.test_config import MINIMAL
from trainer.cluster.settings import Settings, load_settings
from trainer.cluster.sweep import elements
from trainer.config import HIGHEST_SEED, Config, DatasetConfig, load_config
from trainer.data.layout import Layout, load_layout
from trainer.errors import InputError
from trainer.strict import StrictModel, _bounds, _is_model, _kinds, declared, read_yaml, validated
from trainer.written import parse_written, yaml_text

LABELS = ["001", "010", "008", "1", "NO", "ON", "y", "12e4", "1.0", "1_000", "0x10", "0o10", ".5", "+1", "-01", "true",
          "False", "2024-01-01", "12:30", ".inf", ".nan", "sub-01", "="]  # fmt: skip
"""What stands in a file without quotes."""
LAYOUT = """name: 2024-01-01
tr: 1.5
subjects: {SUBJECTS}
series: {007: {bold: {file: "{subject}.h5", dataset: "{run}"}, runs: 010}}
feature_files: ["{model}/{run}.h5"]
features: {1.0: {folder: 010, layers: {012: 0x1}}}
include_features: [1.0/012]
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    return path


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# Labels


@pytest.mark.parametrize("key", ["subjects", "runs", "films", "series"])
def test_labels_of_a_filter_are_text_as_written(key: str, config_file: Path) -> None:
    text = f"[{', '.join(LABELS)}]"
    by_override = load_config(config_file, [f"datasets.val.filter.{key}={text}"])
    in_file = MINIMAL.replace("filter: {seasons: [2]}", f"filter: {{{key}: {text}}}")
    by_file = load_config(written(config_file, in_file))
    for config in (by_override, by_file):
        assert getattr(config.datasets["val"].filter, key) == LABELS
        assert load_config(written(config_file, config.to_yaml())) == config


def test_names_of_sets_are_text_as_written(config_file: Path) -> None:
    text = MINIMAL.replace("val: {", "010: {").replace("val_set_name: val", "val_set_name: 010")
    config = load_config(written(config_file, text))
    assert (list(config.datasets), config.val_set_name) == (["train", "010"], "010")


def test_labels_and_names_of_a_layout_are_text_as_written(tmp_path: Path) -> None:
    subjects = "{" + ", ".join(f"{label}: {label}" for label in LABELS) + "}"
    layout = load_layout(written(tmp_path / "l.yaml", LAYOUT.replace("{SUBJECTS}", subjects)))
    assert layout.subjects == {label: label for label in LABELS}
    assert layout.name == "2024-01-01"
    assert list(layout.series) == ["007"] and layout.series["007"].runs == ["010"]
    assert layout.feature("1.0/012")[1] == "0x1" and layout.features["1.0"].folder == "010"


def test_labels_of_a_sweep_are_text_as_written_and_numbers_are_numbers(tmp_path: Path, config_file: Path) -> None:
    text = "datasets.val.filter.subjects: [[001, NO], [12e4]]\nstage1.lr: [1e-3]\nseed: [010]\nprecision: [no]\n"
    found = elements(written(tmp_path / "sweep.yaml", text))
    assert [element.name for element in found] == [
        "datasets.val.filter.subjects=001-NO,stage1.lr=0.001,seed=10,precision=no",
        "datasets.val.filter.subjects=12e4,stage1.lr=0.001,seed=10,precision=no",
    ]
    configs = [load_config(config_file, element.overrides) for element in found]
    assert [config.datasets["val"].filter.subjects for config in configs] == [["001", "NO"], ["12e4"]]
    assert [(config.stage1.lr, config.seed, config.precision) for config in configs] == [(1e-3, 10, "no")] * 2


def test_labels_inside_sections_of_a_sweep_are_text_as_written(tmp_path: Path, config_file: Path) -> None:
    text = "datasets: [{train: {}, val: {filter: {subjects: [001]}}}, {train: {}, val: {filter: {subjects: [01]}}}]"
    found = elements(written(tmp_path / "sweep.yaml", text))
    configs = [load_config(config_file, element.overrides) for element in found]
    assert [config.datasets["val"].filter.subjects for config in configs] == [["001"], ["01"]]
    listed = elements(written(tmp_path / "list.yaml", "- {datasets: {val: {filter: {films: [010, é😀]}}}}\n"))
    assert load_config(config_file, listed[0].overrides).datasets["val"].filter.films == ["010", "é😀"]


def test_texts_of_slurm_settings_are_as_written_and_options_keep_their_meaning(tmp_path: Path) -> None:
    text = (
        "{partition: 010, account: 1e3, exclude: NO, sbatch: {comment: 001, nice: 5, exclusive: true, x: 1e3, y: 0.5}}"
    )
    found = load_settings(written(tmp_path / "s.yaml", text))
    assert (found.partition, found.account, found.exclude) == ("010", "1e3", "NO")
    assert found.sbatch == {"comment": "001", "nice": 5, "exclusive": True, "x": "1e3", "y": 0.5}
    assert load_settings(tmp_path / "s.yaml", ["time=010"]).time == 10


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("datasets.val.filter.subjects=[null]", r"filter.subjects.0: found null, expected text, in quotes"),
        ("datasets.val.filter.subjects=[a, ]", None),
        ("datasets.val.filter.subjects=001", r"filter.subjects: found '001', expected a valid list"),
        ("val_set_name=~", r"val_set_name: found null, expected text"),
        ("train.refit=yes", r"train.refit: found 'yes', expected true or false"),
        ("train.refit=1", r"train.refit: found 1, expected true or false"),
        ("data.shards=/a #1", r"command line \(data.shards\): YAML takes a part for a comment: found #1"),
    ],
)
def test_value_that_could_mean_two_things_is_refused(config_file: Path, override: str, message: str | None) -> None:
    if message is None:
        assert load_config(config_file, [override]).datasets["val"].filter.subjects == ["a"]
        return
    with pytest.raises(InputError, match=message):
        load_config(config_file, [override])


def test_precision_no_is_text_in_every_place(config_file: Path, tmp_path: Path) -> None:
    for precision in ("no", "'no'", '"no"'):
        config = load_config(written(config_file, MINIMAL + f"precision: {precision}\n"))
        assert config.precision == "no"
        assert load_config(written(tmp_path / "copy.yaml", config.to_yaml())).precision == "no"


def test_merged_sections_are_overridden_apart(config_file: Path) -> None:
    text = """
data: {shards: somewhere}
include_features: [a/b]
val_set_name: val
stage1: &stage {epochs: 3, lr: 1e-2}
stage2: {<<: *stage, lr: 1e-3}
datasets: {train: &train {filter: {runs: [a]}}, val: *train}
"""
    config = load_config(written(config_file, text), ["datasets.val.filter.runs=[b]"])
    assert (config.stage1.epochs, config.stage2.epochs, config.stage2.lr) == (3, 3, 1e-3)
    assert [config.datasets[name].filter.runs for name in ("train", "val")] == [["a"], ["b"]]
    with pytest.raises(InputError, match=r"lr: given twice \(line 6\)"):
        load_config(written(config_file, text.replace("lr: 1e-3}", "lr: 1e-3, lr: 1}")))


@pytest.mark.parametrize("hidden", ["\u200b", "\ufeff", "\u00ad"])
def test_invisible_character_in_a_key_is_shown(config_file: Path, hidden: str) -> None:
    config_file.write_text(f"{config_file.read_text()}\n{hidden}seed: 1\n", encoding="utf-16")
    with pytest.raises(InputError, match=r"'\\(u|x)[0-9a-f]+seed': unknown key. Did you mean seed\?"):
        load_config(config_file)


def test_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the file: found nothing, expected a mapping"):
        read_yaml(written(tmp_path / "e.yaml", "# nothing\n"))


# Numbers


def numeric_keys(model: type[StrictModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The dotted keys of a model that take a number, or a list of numbers."""
    for name in model.model_fields:
        key = (*prefix, name)
        for kind in _kinds(declared(model, [name])):
            inner = _kinds(declared(kind, ["x"]))
            if _is_model(kind):
                yield from numeric_keys(kind, key)
            elif _is_model(inner[0]):
                yield from numeric_keys(inner[0], (*key, "val"))
            elif kind in (int, float):
                yield key
            elif {int, float} & set(inner) and str not in inner:
                yield (*key, "0")


KEYS = [(model, key) for model in (Config, Settings, Layout) for key in numeric_keys(model)]


def test_all_numeric_keys_are_found() -> None:
    names = {".".join(key) for _, key in KEYS}
    assert {
        "seed",
        "stage2.decoder.channels.0",
        "datasets.val.filter.trs.0",
        "data.cache_gb",
        "tr",
        "stage1.time",
    } <= names
    assert len(names) > 60 and not [name for name in names if "sbatch" in name]


@pytest.mark.parametrize(
    ("model", "key"), KEYS, ids=lambda part: part.__name__ if isinstance(part, type) else ".".join(part)
)
def test_every_number_is_finite_and_has_a_range_that_the_error_names(
    model: type[StrictModel], key: tuple[str, ...]
) -> None:
    bounds = _bounds(declared(model, key))
    assert re.fullmatch(r"(greater than|at least) \S+ and (less than|at most) \S+", bounds), f"{key}: {bounds}"
    for value in (float("inf"), float("-inf"), float("nan"), 10**30, -(10**30), 10**400, True):
        with pytest.raises(InputError) as caught:
            validated(model, document(model, key, value), "file")
        message = str(caught.value)
        assert message.startswith(f"file: {'.'.join(key)}: found "), message
        assert bounds in message and "\n" not in message and len(message) < 600


def document(model: type[StrictModel], key: tuple[str, ...], value: Any) -> Any:
    """A document without a mistake but for a value at a dotted key; 0 stands for the first of a list."""
    whole = parse_written({"Config": MINIMAL, "Layout": LAYOUT.replace("SUBJECTS", "1: a")}.get(model.__name__, "{}"))
    *sections, last = key[:-1] if key[-1] == "0" else key
    place = whole
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = [value] if key[-1] == "0" else value
    return whole


@pytest.mark.parametrize("override", ["stage1.lr=.inf", "stage1.lr=1e999", "stage1.lr=-.inf", "stage2.temperature=.nan",
    f"seed={2**64}", f"seed={2**64 - 1}", f"seed={HIGHEST_SEED + 1}", "seed=-1", "batch_size=1000000000000000000",
    "stage1.epochs=1e3", "batch_size=1_0", "timeout_s=.inf"])  # fmt: skip
def test_number_out_of_range_is_refused_in_one_line(config_file: Path, override: str) -> None:
    with pytest.raises(InputError, match=rf"{override.partition('=')[0]}: found .*expected ") as caught:
        load_config(config_file, [override])
    assert "\n" not in str(caught.value)


def test_leading_zeros_are_decimal(config_file: Path) -> None:
    config = load_config(config_file, ["batch_size=010", "datasets.val.filter.seasons=[08, 010]", "stage1.lr=01e-3"])
    assert (config.batch_size, config.datasets["val"].filter.seasons, config.stage1.lr) == (10, [8, 10], 1e-3)


def test_highest_seed_leaves_room_for_the_folds(config_file: Path) -> None:
    most = re.search(r"at most (\d+)", _bounds(declared(Config, ["stage2", "cross_fit"])))
    assert most is not None
    config = load_config(config_file, [f"seed={HIGHEST_SEED}"])
    torch.Generator().manual_seed(config.seed + int(most[1]))
    assert load_config(written(config_file, config.to_yaml())).seed == HIGHEST_SEED


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.sampled_from(LABELS), min_size=1))
def test_any_label_is_written_back_and_read_as_it_was(labels: list[str]) -> None:
    dataset = validated(DatasetConfig, {"filter": {"subjects": labels}}, "file")
    text = yaml_text(dataset.model_dump(mode="json"))
    assert validated(DatasetConfig, parse_written(text), "file") == dataset
