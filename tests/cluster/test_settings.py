"""What the jobs ask for: defaults, overrides by section and by command line, and mistakes in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.cluster.settings import JobSettings, Settings, ShardsSettings, load_settings, minutes
from trainer.errors import InputError

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "slurm"
JOBS = ("shards", "stage1", "stage2", "evaluate1", "evaluate2", "report")


def settings(tmp_path: Path, text: str, *overrides: str) -> Settings:
    path = tmp_path / "site.yaml"
    path.write_text(text or "{}")
    return load_settings(path, overrides)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_we_ship_are_valid_for_every_job(path: Path) -> None:
    shipped = load_settings(path)
    for job in JOBS:
        assert shipped.of(job).time > 0


def test_the_default_file_names_every_key() -> None:
    text = (FOLDER / "default.yaml").read_text()
    for model in (Settings, ShardsSettings):
        for key in model.model_fields:
            assert f"{key}: " in text or f"{key}:\n" in text, f"{key} does not stand in default.yaml"


def test_the_default_file_changes_no_default_but_the_times() -> None:
    shipped = load_settings(FOLDER / "default.yaml")
    assert shipped.of("stage1") == JobSettings(time=24 * 60)
    assert shipped.of("report") == JobSettings(time=30)


def test_sections_override_the_top_and_the_command_line_both(tmp_path: Path) -> None:
    text = (
        "{partition: gpu, nodes: 2, time: 12:00:00, sbatch: {exclusive: true}, stage2: {nodes: 1, sbatch: {nice: 5}}}"
    )
    found = settings(tmp_path, text, "stage1.nodes=4", "stage2.partition=big", "account=me")
    assert (found.of("stage1").partition, found.of("stage1").nodes, found.of("stage1").time) == ("gpu", 4, 720)
    assert (found.of("stage2").partition, found.of("stage2").nodes, found.of("stage2").account) == ("big", 1, "me")
    assert found.of("stage2").sbatch == {"exclusive": True, "nice": 5}


def test_what_is_no_training_does_not_ask_for_its_nodes(tmp_path: Path) -> None:
    text = "{nodes: 8, tasks_per_node: 4, gpus_per_node: 4, gres: 'gpu:4', account: me, evaluate: {gpus_per_node: 1}}"
    found = settings(tmp_path, text)
    assert found.of("stage1").tasks == 32
    assert [found.of(job).tasks for job in JOBS if not job.startswith("stage")] == [1, 1, 1, 1]
    assert (found.of("report").gpus, found.of("shards").gpus, found.of("evaluate2").gpus_per_node) == (0, 0, 1)
    assert all(found.of(job).account == "me" for job in JOBS)


def test_only_trainings_share_what_adam_needs(tmp_path: Path) -> None:
    found = settings(tmp_path, "{zero_stage: 2, stage1: {zero_stage: 0}}")
    assert {job: found.of(job).zero_stage for job in JOBS if found.of(job).zero_stage is not None} == {
        "stage1": 0,
        "stage2": 2,
    }
    assert settings(tmp_path, "", "stage2.zero_stage=1").of("stage2").zero_stage == 1


def test_a_section_takes_back_what_the_top_says_with_null(tmp_path: Path) -> None:
    found = settings(tmp_path, "{constraint: a100, stage2: {constraint: null}}")
    assert (found.of("stage1").constraint, found.of("stage2").constraint) == ("a100", None)


def test_a_section_of_comments_is_one_of_defaults(tmp_path: Path) -> None:
    assert settings(tmp_path, "stage1:\n  # nodes: 2\n").of("stage1").nodes == 1


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{partion: gpu}", ["partion: unknown key", "Did you mean partition?"]),
        ("{stage1: {node: 2}}", ["stage1.node: unknown key", "Did you mean stage1.nodes?"]),
        ("{stage3: {nodes: 2}}", ["stage3: unknown key"]),
        ("{nodes: two}", ["nodes", "found 'two'"]),
        ("{nodes: 0}", ["nodes", "greater than 0"]),
        ("{time: '4:00'}", ["time", "found '4:00'", "HH:MM:SS"]),
        ("{sbatch: {partition: gpu}}", ["sbatch", "found partition", "use partition"]),
        ("{sbatch: {mem: 4G}}", ["sbatch", "found mem", "use mem_gb"]),
        ("{stage1: {sbatch: {dependency: 'afterok:1'}}}", ["found dependency", "the pipeline sets it"]),
        ('{partition: "a\\nhostname"}', ["partition", "without line breaks"]),
        ('{stage1: {sbatch: {comment: "a\\nb"}}}', ["stage1.sbatch", "without line breaks"]),
        ("{setup: module load cuda}", ["setup", "list"]),
        ("{zero_stage: 3}", ["zero_stage", "found 3", "at least 0 and at most 2"]),
        ("{stage1: {zero_stage: two}}", ["stage1.zero_stage", "found 'two'", "at least 0 and at most 2"]),
        ("{zero_stage: true}", ["zero_stage", "found true"]),
        ("{sbatch: {--exclusive: true}}", ["sbatch", "found '--exclusive'", "without its dashes"]),
        ("{evaluate: {zero_stage: 2}}", ["evaluate", "zero_stage is for trainings", "stage1 and stage2"]),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(InputError) as error:
        settings(tmp_path, text)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert str(tmp_path / "site.yaml") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_override_suggests_the_section(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stagee1\.nodes: unknown key\. Did you mean stage1\?"):
        settings(tmp_path, "", "stagee1.nodes=2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("12:00:00", 720), ("00:30:01", 31), ("2-00:00:00", 2880), ("1-12", 2160), ("1-02:30", 1590)],
)
def test_times_are_minutes_rounded_up(text: str, expected: int) -> None:
    assert minutes(text) == expected


def test_a_time_in_yaml_is_no_number_to_base_60(tmp_path: Path) -> None:
    assert settings(tmp_path, "time: 1:30:00").time == 90
    assert settings(tmp_path, "", "time=1:30:00").time == 90


@pytest.mark.parametrize(
    ("text", "gpus"),
    [("{gpus_per_node: 4}", 4), ("{gres: 'gpu:h100:2'}", 2), ("{gres: 'tmp:5,gpu:8'}", 8), ("{gres: 'tmp:5'}", 0)],
)
def test_gpus_are_counted_whichever_way_they_are_asked_for(tmp_path: Path, text: str, gpus: int) -> None:
    assert settings(tmp_path, text).of("stage1").gpus == gpus


def test_without_requeue_a_stage_is_several_jobs(tmp_path: Path) -> None:
    assert settings(tmp_path, "{max_requeues: 5}").links == 1
    assert settings(tmp_path, "{max_requeues: 5, requeue: false}").links == 5
    assert settings(tmp_path, "{max_requeues: 0, requeue: false}").links == 1
