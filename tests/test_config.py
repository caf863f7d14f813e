"""The configuration: what is read, what is refused, and how the refusal reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config import Config, differing_keys, documentation, load_config
from trainer.errors import InputError
from trainer.strict import parse_yaml, validated

ROOT = Path(__file__).resolve().parents[1]
MINIMAL = """
data: {shards: somewhere}
include_features: [a/b]
val_set_name: val
datasets: {train: {filter: {seasons: [1]}}, val: {filter: {seasons: [2]}}}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(path: Path, text: str = "", overrides: tuple[str, ...] = ()) -> str:
    path.write_text(MINIMAL + text)
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_the_published_ones(config_file: Path) -> None:
    config = load_config(config_file)
    assert (config.seed, config.batch_size, config.sample_length, config.num_samples) == (3315, 16, 64, 2000)
    assert (config.stage1.lr, config.stage1.weight_decay, config.stage1.epochs) == (3e-4, 0.1, 10)
    assert (config.stage1.model.embed_dim, config.stage1.model.encoder_kernel_size) == (192, 45)
    assert (config.stage2.latent_dim, config.stage2.n_timesteps, config.stage2.cfm.sigma_min) == (128, 25, 1e-4)
    assert config.stage2.decoder.channels == [256, 256]
    assert config.stage2.decoder.mid_block_type == "conformer"


@pytest.mark.parametrize("name", ["debug", "demo", "full", "song8"])
def test_the_configurations_we_ship_are_valid(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert "train" in config.datasets


def test_full_holds_the_published_sets_and_features() -> None:
    config = load_config(ROOT / "configs" / "full.yaml")
    assert list(config.datasets) == ["train", "val_s6", "val_figures", "val_life"]
    assert config.include_features == [
        "llama_3.2_3b/layers.11",
        "whisper/layers.12",
        "qwen-2-5-omni-3b/layers.20",
        "internvl3_14b/layers.30",
        "vjepa2/norm",
    ]


def test_overrides_reach_any_depth_and_are_yaml(config_file: Path) -> None:
    overrides = ["stage2.decoder.channels=[64, 64]", "stage1.lr=1e-3", "datasets.val.filter.seasons=[6]"]
    config = load_config(config_file, overrides)
    assert config.stage2.decoder.channels == [64, 64]
    assert config.stage1.lr == 1e-3
    assert config.datasets["val"].filter.seasons == [6]


def test_precision_no_needs_no_quotes(config_file: Path) -> None:
    assert load_config(config_file, ["precision=no"]).precision == "no"


def test_written_back_it_reads_the_same(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ["stage1.lr=1e-5", "stage1.model.hidden_model=conv1dnext"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.to_yaml())
    assert load_config(copy) == config


def test_an_unknown_key_suggests_the_nearest(config_file: Path) -> None:
    message = refusal(config_file, "stage2: {laten_dim: 3}\n")
    assert message == f"{config_file}: stage2.laten_dim: unknown key. Did you mean stage2.latent_dim?"
    assert "Did you mean stage1.model.embed_dim?" in refusal(config_file, overrides=("stage1.model.embed_dm=3",))
    assert "Did you mean stage1?" in refusal(config_file, overrides=("stag1.lr=3",))
    message = refusal(config_file, overrides=("datasets.train.filter.seasns=[1]",))
    assert "datasets.train.filter.seasns: unknown key. Did you mean datasets.train.filter.seasons?" in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("batch_size: 0\n", ["batch_size", "found 0", "greater than 0"]),
        ("batch_size: '16'\n", ["batch_size", "found '16'", "integer"]),
        ("num_samples: 3\n", ["num_samples", "found 3", "at least batch_size 16"]),
        ("stage1: {model: {encoder_kernel_size: 4}}\n", ["encoder_kernel_size", "found 4", "odd"]),
        ("stage1: {model: {decoder_kernel_size: 4}}\n", ["decoder_kernel_size", "found 4", "odd"]),
        ("stage1: {model: {with_shared_decoder: false, with_subject_decoders: false}}\n", ["with_shared_decoder"]),
        ("stage1: {model: {hidden_model: transformer, embed_dim: 64}}\n", ["embed_dim", "found 64", "multiple"]),
        ("stage2: {decoder: {channels: [20]}}\n", ["stage2.decoder.channels", "found [20]", "multiple of 8"]),
        ("stage2: {cross_fit: 1}\n", ["stage2.cross_fit", "found 1"]),
        ("precision: fp8\n", ["precision", "found 'fp8'", "bf16"]),
    ],
)
def test_a_wrong_value_names_key_found_and_expected(config_file: Path, text: str, parts: list[str]) -> None:
    message = refusal(config_file, text)
    assert all(part in message for part in [str(config_file), *parts]), message


def test_sets_that_are_named_must_exist(config_file: Path) -> None:
    assert "found no set 'vall'" in refusal(config_file, overrides=("val_set_name=vall",))
    assert "not trained on" in refusal(config_file, overrides=("val_set_name=train",))


def test_a_stream_named_twice_is_refused(config_file: Path) -> None:
    assert "a/b is named twice" in refusal(config_file, overrides=("include_features=[a/b, c/d, a/b]",))


def test_a_filter_range_has_two_ends(config_file: Path) -> None:
    assert "found [3]" in refusal(config_file, overrides=("datasets.train.filter.trs=[3]",))


def test_keys_given_twice_and_broken_yaml_are_refused_with_their_line(config_file: Path) -> None:
    assert "seed: given twice (line 7)" in refusal(config_file, "seed: 1\nseed: 2\n")
    assert "not valid YAML (line" in refusal(config_file, "seed: [1\n")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml: cannot be read"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data: missing"):
        validated(Config, {"include_features": ["a/b"], "datasets": {}, "val_set_name": "v"}, "c.yaml")


def test_differing_keys_are_dotted(config_file: Path) -> None:
    one, other = load_config(config_file), load_config(config_file, ["stage1.lr=1", "seed=7"])
    assert differing_keys(one, other) == ["seed", "stage1.lr"]
    assert differing_keys(one, one) == []


def test_every_key_stands_in_the_readme_with_its_default() -> None:
    readme = (ROOT / "README.md").read_text()
    for section, rows in documentation().items():
        for key, default, meaning in rows:
            row = f"| `{section}.{key}` | `{default}` | {meaning} |".replace("`.", "`")
            assert row in readme, row
            assert meaning, key


@pytest.mark.parametrize(
    ("text", "value"),
    [("12:00:00", "12:00:00"), ("1-12:00:00", "1-12:00:00"), ("3e-4", 3e-4), ("1.5", 1.5), ("-3", -3), ("0x1f", 31)],
)
def test_numbers_are_what_people_read_and_a_time_is_text(text: str, value: object) -> None:
    assert parse_yaml(text) == value


def test_the_window_of_stage2_holds_a_training_window(config_file: Path) -> None:
    assert load_config(config_file, ["stage2.window_trs=32"]).window_trs == 64
    assert load_config(config_file, ["stage2.window_trs=null", "sample_length=300"]).window_trs is None
    assert load_config(config_file, ["sample_length=300"]).window_trs == 300
