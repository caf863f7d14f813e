"""A layout describes any data set by patterns, and says what is wrong with itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.conftest import LAYOUT
from tests.permissions import bound_by_modes
from trainer.data.layout import RunGroups, find_files, load_layout, pattern_regex
from trainer.errors import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "configs/datasets"
PUBLISHED = {
    "internvl3_8b/layers.20": ("internvl3_8b_8bit", "language_model.model.layers.20.post_attention_layernorm"),
    "internvl3_14b/layers.30": ("InternVL3_14B", "language_model.model.layers.30.post_attention_layernorm"),
    "qwen-2-5-omni-3b/layers.20": ("qwen2-5_3B", "model.layers.20.post_attention_layernorm"),
    "qwen-2-5-omni-7b/layers.20": ("qwen-2-5-omni-7b", "model.layers.20.post_attention_layernorm"),
    "whisper/layers.12": ("whisper", "layers.12.fc2"),
    "llama_3.2_1b/layers.7": ("Llama-3.2-1B", "model.layers.7"),
    "llama_3.2_3b/layers.11": ("Llama-3.2-3B", "model.layers.11"),
    "vjepa2/norm": ("vjepa2_avg_feat", "encoder.layernorm_avg"),
}


def test_optional_part_of_a_pattern_is_matched_and_may_be_absent() -> None:
    regex = pattern_regex("ses-{session}_task-{run}[_run-{repeat}]")
    once = regex.fullmatch("ses-012_task-s01e02a")
    twice = regex.fullmatch("ses-7_task-life01_run-2")
    assert once is not None and once.groupdict() == {"session": "012", "run": "s01e02a", "repeat": None}
    assert twice is not None and twice.groupdict() == {"session": "7", "run": "life01", "repeat": "2"}
    assert regex.fullmatch("ses-012_rest-1") is None


def test_text_of_a_pattern_is_literal() -> None:
    assert pattern_regex("a.b{run}").fullmatch("aXbc") is None


@pytest.mark.parametrize(
    "name", ["friends/s1/friends_s01e01a.h5", "movie10/movie10_figures01.h5", "movie10/figures/figures01.h5",
             "ood/chaplin/task-chaplin1_video.h5"],
)  # fmt: skip
def test_all_seen_stems_of_feature_files_give_their_run(tmp_path: Path, name: str) -> None:
    path = tmp_path / "features/whisper" / name
    path.parent.mkdir(parents=True)
    path.touch()
    layout = load_layout(CONFIGS / "algonauts2025.yaml")
    known = {"model": "whisper", "series": name.split("/")[0]}
    runs = {f["run"] for pattern in layout.feature_files for _, f in find_files(tmp_path, pattern, known)}
    assert {"s01e01a", "figures01", "chaplin1"} & runs


@pytest.mark.parametrize("mode", [0, 0o444, 0o311])
@pytest.mark.parametrize("closed", ["s1", "s1/deep"])
def test_a_folder_that_cannot_be_read_is_named_and_not_passed_over(tmp_path: Path, closed: str, mode: int) -> None:
    for subject in ("s1", "s2"):
        (tmp_path / subject / "deep").mkdir(parents=True)
        (tmp_path / subject / "deep" / "x.h5").touch()
    assert len(list(find_files(tmp_path, "{subject}/*/{run}.h5", {}))) == 2
    (tmp_path / closed).chmod(mode)
    with bound_by_modes(), pytest.raises(PermissionError, match=f"{tmp_path / closed}'$"):
        list(find_files(tmp_path, "{subject}/*/{run}.h5", {}))
    (tmp_path / closed).chmod(0o755)


def test_a_folder_that_is_only_passed_through_need_not_be_listed(tmp_path: Path) -> None:
    (tmp_path / "s1" / "deep").mkdir(parents=True)
    (tmp_path / "s1" / "deep" / "x.h5").touch()
    (tmp_path / "s1").chmod(0o311)
    with bound_by_modes():
        assert [f["run"] for _, f in find_files(tmp_path, "s1/deep/{run}.h5", {})] == ["x"]


def test_files_are_found_through_a_linked_folder(tmp_path: Path) -> None:
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "real/deep/x1.h5").touch()
    (tmp_path / "features").mkdir()
    (tmp_path / "features/m").symlink_to(tmp_path / "real")
    assert [f["run"] for _, f in find_files(tmp_path, "features/{model}/**/{run}.h5", {"model": "m"})] == ["x1"]


def test_run_names_are_grouped() -> None:
    layout = load_layout(CONFIGS / "algonauts2025.yaml")
    assert layout.series["friends"].groups("s03e10b") == RunGroups(3, 10, "b", None)
    assert layout.series["movie10"].groups("bourne07") == RunGroups(None, None, "07", "bourne")
    assert layout.series["friends"].groups("bourne07") is None


def test_published_features_are_in_the_table() -> None:
    layout = load_layout(CONFIGS / "algonauts2025.yaml")
    for stream, (folder, dataset) in PUBLISHED.items():
        model, found = layout.feature(stream)
        assert (model.folder, found) == (folder, dataset)
    assert layout.include_features == [
        "llama_3.2_3b/layers.11", "whisper/layers.12", "qwen-2-5-omni-3b/layers.20", "internvl3_14b/layers.30",
        "vjepa2/norm",
    ]  # fmt: skip


def test_layer_that_is_not_listed_is_the_name_of_the_data_set() -> None:
    assert load_layout(CONFIGS / "algonauts2025.yaml").feature("whisper/layers.3.fc1")[1] == "layers.3.fc1"


def test_unknown_feature_model_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"llama_3\.2_3B.*Did you mean llama_3\.2_3b/layers\.11"):
        load_layout(CONFIGS / "algonauts2025.yaml").feature("llama_3.2_3B/layers.11")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("folder: Text", "foldr: Text", ["features.text.v2.foldr", "Did you mean", "folder"]),
        ("subjects:", "subjets:", ["subjets: unknown key", "Did you mean subjects?"]),
        ("tr: 2.0", "tr: fast", ["tr", "found 'fast'", "number"]),
        ("(?P<film>", "(?P<flim>", ["series.cinema.runs", "'flim'", "film"]),
        ("(?P<film>", "((?P<film>", ["series.cinema.runs", "regular expression"]),
        ("[_rep{repeat}]", "[_rep{repeat}", ["series.cinema.bold.dataset", "balanced brackets"]),
        ("**/{run}.hdf5", "**/all.hdf5", ["feature_files", "{run}"]),
        ("day{session}/{run}", "day{session}/x", ["series.cinema.bold", "{run}"]),
    ],
)
def test_mistake_in_a_layout_names_file_and_key(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    path = tmp_path / "mine.yaml"
    assert old in LAYOUT
    path.write_text(LAYOUT.replace(old, new))
    with pytest.raises(InputError) as error:
        load_layout(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_parts_that_may_be_absent_are_absent_independently(tmp_path: Path) -> None:
    for name in ("s.h5", "s_a.h5", "s_b.h5", "s_a_b.h5", "s_c.h5"):
        (tmp_path / name).touch()
    found = [path.name for path, _ in find_files(tmp_path, "s[_a][_b].h5", {})]
    assert found == ["s.h5", "s_a.h5", "s_a_b.h5", "s_b.h5"]


VALUES = [
    "sub-01 [old]",
    "a*",
    "?",
    "**",
    "{run}",
    "{",
    "}",
    "[",
    "]",
    "[!a]",
    "a|b",
    "(x)",
    "a.b",
    "\\d",
    "$",
    "^",
    "映",
]


@pytest.mark.parametrize("value", VALUES)
def test_values_are_literal_in_patterns(tmp_path: Path, value: str) -> None:
    for folder in (value, "other", "sub-01 old", "sub-01 o", "aXb", "ab", "a", "5"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{folder}_r1.h5").touch()
        (tmp_path / folder / "other_r2.h5").touch()
    found = list(find_files(tmp_path, "{subject}/[x/]{subject}_{run}.h5", {"subject": value}))
    assert found == [(tmp_path / value / f"{value}_r1.h5", {"subject": value, "run": "r1"})]
    match = pattern_regex("{subject}/ses-{session}_[task-]{run}", {"subject": value}).fullmatch(f"{value}/ses-1_r1")
    assert match is not None and match.groupdict() == {"session": "1", "run": "r1"}


@pytest.mark.parametrize("root", ["[a]", "a*", "{run}", "?"])
def test_the_root_is_no_pattern(tmp_path: Path, root: str) -> None:
    (tmp_path / "a/x").mkdir(parents=True)
    (tmp_path / root / "x").mkdir(parents=True, exist_ok=True)
    (tmp_path / root / "x/r[1].h5").touch()
    found = list(find_files(tmp_path / root, "**/{run}.h5", {}))
    assert [(path.name, fields) for path, fields in found] == [("r[1].h5", {"run": "r[1]"})]


def test_parts_that_may_be_absent_may_lie_in_each_other(tmp_path: Path) -> None:
    for name in ("s.h5", "s_a.h5", "s_a_b.h5", "s_b.h5"):
        (tmp_path / name).touch()
    assert [path.name for path, _ in find_files(tmp_path, "s[_a[_b]].h5", {})] == ["s.h5", "s_a.h5", "s_a_b.h5"]


@pytest.mark.parametrize("label", ["a/b", "..", ".", '""', '"a\\nb"'])
def test_a_label_that_cannot_be_part_of_a_file_name_is_refused(tmp_path: Path, label: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(LAYOUT.replace("{a: person_A", f"{{{label}: person_A"))
    with pytest.raises(InputError, match=r"subjects: found the label .*without /"):
        load_layout(path)
