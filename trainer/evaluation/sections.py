"""What a report says and in which order: sections of sentences, tables and figures.

What a run lacks is said in a sentence, in the place where it would stand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trainer.config import differing_keys
from trainer.data.manifest import Manifest
from trainer.evaluation import figures, tables
from trainer.evaluation.brain import brain_drawings
from trainer.evaluation.drawing import Drawing
from trainer.evaluation.results import RunResults, Scored
from trainer.evaluation.same_data import notes_between
from trainer.evaluation.tables import Table
from trainer.progress import watched


@dataclass(frozen=True)
class Part:
    """Some sentences, tables and figures; `title` where it can be folded away. `code` is shown as it stands."""

    title: str = ""
    text: Sequence[str] = ()
    missing: Sequence[str] = ()
    tables: Sequence[Table] = ()
    drawings: Sequence[Drawing] = ()
    code: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, what stands open under it, and what is folded away; `link` is what leads there, empty for nothing."""

    anchor: str
    title: str
    parts: Sequence[Part]
    folded: Sequence[Part] = ()
    link: str = ""

    @property
    def drawings(self) -> list[Drawing]:
        """All figures of the section."""
        return [drawing for part in (*self.parts, *self.folded) for drawing in part.drawings]


def sections(runs: Mapping[str, RunResults], networks: Sequence[str] | str) -> list[Section]:
    """The report of some runs by label.

    Args:
        networks: the network of every parcel, or the sentence that says why it is not known.
    """
    found = [_linked(each) for each in (_scores(runs), _training(runs), _networks(runs, networks))]
    for i, (label, run) in enumerate(runs.items()):
        suffix, prefix = (f": {label}", f"run{i + 1}-") if len(runs) > 1 else ("", "")
        makers = (_parcels, _brain, _series, _distribution)
        own = [make(run, prefix, suffix) for make in watched(makers, f"drawing {label}", len(makers))]
        found += [replace(own[0], link=label), *own[1:]] if len(runs) > 1 else [_linked(each) for each in own]
    found += [_linked(each) for each in (_data(runs), _configuration(runs), _environment(runs))]
    return found


def _linked(section: Section) -> Section:
    return replace(section, link=section.title)


def lead(runs: Mapping[str, RunResults]) -> list[str]:
    """The report in a sentence for each run: what its last stage reaches on its first set."""
    sentences = []
    for label, run in runs.items():
        scored = run.final.find(run.sets[0]) if run.final else None
        if scored is None:
            continue
        score = scored.score
        text = f"{figures.model_name(scored)}, on {scored.set_name}: r = {tables.number(score.get('pearson_r'))}"
        limits, ratio = tables.interval(score.get("ci")), tables.percent(score.get("r_over_ceiling"))
        text += f" ({limits})" if limits != tables.NOTHING else ""
        text += f", {ratio} of the noise ceiling" if ratio != tables.NOTHING else ""
        sentences.append(f"{label}: {text}." if len(runs) > 1 else f"{text}.")
    return sentences


def _evaluate(run: RunResults) -> str:
    return f"`python -m trainer evaluate {run.path} --step best`"


def _scores(runs: Mapping[str, RunResults]) -> Section:
    """The headline: how far each run is, what it reaches, what differs."""
    text, missing = [], []
    for label, run in runs.items():
        name = f"{label}: " if len(runs) > 1 else ""
        unfinished = [part for stage in run.stages.values() for part in stage.status if part.state != "finished"]
        for part in unfinished:
            why = f" ({part.why})" if part.why else ""
            step = f" at step {part.step}" if part.step is not None else ""
            missing.append(f"{name}{part.title} has not finished: it is {part.state}{step}{why}.")
        if unfinished and run.final is not None:
            missing.append(f"{name}What follows is of the best checkpoint so far.")
        if run.final is None:
            missing.append(f"{name}No checkpoint was scored yet. {_evaluate(run)} scores the best one.")
        elif not any(score.score.get("full") for stage in run.stages.values() for score in stage.scored):
            missing.append(f"{name}No intervals or ceilings yet. {_evaluate(run)} finds them.")
        missing += [f"{name}{note}" for note in run.notes]
    missing += _not_comparable(runs)
    shown = [tables.score_table(runs)] if any(run.sets for run in runs.values()) else []
    differences = tables.difference_table(runs)
    if differences.groups:
        shown.append(differences)
    if shown:
        text.append(
            "r is Pearson's correlation of predicted and real BOLD over all TRs of a set. One sample of stage 2 "
            "carries the noise of a real scan, so its r is far below the mean's by construction."
        )
    return Section("scores", "Scores", [Part(text=text, missing=missing, tables=shown)])


def _not_comparable(runs: Mapping[str, RunResults]) -> list[str]:
    """The sets of which scores speak of different BOLD: those of the stages of one run, or of several runs."""
    names = dict.fromkeys(name for run in runs.values() for name in run.sets)
    several = len(runs) > 1
    notes: list[str] = []
    for name in names:
        stages = {
            (label, stage.number): stage.find(name) for label, run in runs.items() for stage in run.stages.values()
        }
        scores = {
            (f"{label}, stage {number}" if several else f"stage {number}"): scored.score
            for (label, number), scored in stages.items()
            if scored is not None
        }
        notes += notes_between(name, scores)
    return notes


def _training(runs: Mapping[str, RunResults]) -> Section:
    drawings = figures.curve_drawings(runs, "runs-" if len(runs) > 1 else "")
    missing = [] if drawings else ["No step was logged yet."]
    if len(runs) == 1:
        run = next(iter(runs.values()))
        begun = {number for number, stage in run.stages.items() if stage.curves.loss or stage.curves.r}
        missing = [f"Stage {number} has logged no step yet." for number in (1, 2) if number not in begun]
    return Section("training", "Training", [Part(missing=missing, drawings=drawings)])


def _parcels(run: RunResults, prefix: str, suffix: str) -> Section:
    """Maps of the last stage that has scores, the first set open; the other sets and stage 1 folded away."""
    parts, missing = [], []
    for stage in sorted(run.stages.values(), key=lambda stage: -stage.number):
        for name in run.sets:
            scored = stage.find(name)
            drawings = figures.map_drawings(scored, run.ceilings.get(name), prefix) if scored else []
            if drawings and scored:
                parts.append(Part(title=f"{name}, {figures.model_name(scored).lower()}", drawings=drawings))
    if not parts:
        missing.append("No scores of parcels yet.")
    elif run.sets[0] not in run.ceilings:
        full = any(scored.score.get("full") for stage in run.stages.values() for scored in stage.scored)
        why = (
            "it needs films that were shown twice"
            if full
            else f"{_evaluate(run)} finds it where films were shown twice"
        )
        missing.append(f"No noise ceiling of {run.sets[0]}: {why}.")
    return Section(
        f"{prefix}parcels",
        f"Parcels{suffix}",
        [*(_opened(part) for part in parts[:1]), Part(missing=missing)],
        parts[1:],
    )


def _opened(part: Part) -> Part:
    return replace(part, title="")


def _networks(runs: Mapping[str, RunResults], networks: Sequence[str] | str) -> Section:
    if isinstance(networks, str):
        return Section("networks", "Networks", [Part(missing=[networks])])
    drawings: list[Drawing] = []
    for name in next(iter(runs.values())).sets:
        models: dict[str, Scored] = {}
        for label, run in runs.items():
            finals = [run.final] if len(runs) > 1 else list(run.stages.values())
            for scored in (stage.find(name) for stage in finals if stage is not None):
                if scored is not None:
                    models[label if len(runs) > 1 else figures.model_name(scored)] = scored
        if models and (drawing := figures.network_drawing(models, networks, "runs-" if len(runs) > 1 else "")):
            drawings.append(drawing)
    missing = [] if drawings else ["No scores of parcels yet."]
    similarity = tables.similarity_table(runs)
    parts = [Part(missing=missing, drawings=drawings), Part(tables=[similarity] if similarity.groups else [])]
    return Section("networks", "Networks", parts)


def _brain(run: RunResults, prefix: str, suffix: str) -> Section:
    """The last stage's first set on every subject's brain, the first subject open."""
    found = (run.final.find(name) for name in run.sets) if run.final else iter(())
    scored = next((scored for scored in found if scored is not None and scored.r is not None), None)
    drawings: dict[str, list[Drawing]] = {}
    missing = ["No scores of parcels yet."]
    if scored is not None:
        drawings, missing = brain_drawings(
            scored, run.config.evaluate.atlas if run.config else None, prefix, run.dropped_parcels
        )
    parts = [Part(title=f"subject {label}", drawings=found) for label, found in drawings.items()]
    opened = [Part(missing=missing), *(_opened(part) for part in parts[:1])]
    return Section(f"{prefix}brain", f"Brain maps{suffix}", opened, parts[1:])


def _series(run: RunResults, prefix: str, suffix: str) -> Section:
    stages = sorted(run.stages.values(), key=lambda stage: -stage.number)
    for stage in stages:
        drawn = {name: figures.series_drawing(stage, name, prefix) for name in run.sets}
        parts = [Part(title=name, drawings=[drawing]) for name, drawing in drawn.items() if drawing is not None]
        if parts:
            return Section(f"{prefix}series", f"Time series{suffix}", [_opened(parts[0])], parts[1:])
    missing = [f"No predicted series are kept yet. {_evaluate(run)} keeps those of the longest run of each set."]
    return Section(f"{prefix}series", f"Time series{suffix}", [Part(missing=missing)])


def _distribution(run: RunResults, prefix: str, suffix: str) -> Section:
    anchor, title = f"{prefix}distribution", f"Distribution{suffix}"
    found = run.stages[2].distributions if 2 in run.stages else {}
    if not found:
        what = "not judged yet" if 2 in run.stages else "not there: stage 2 has not begun"
        evaluate = f" {_evaluate(run)} judges it." if 2 in run.stages else ""
        return Section(anchor, title, [Part(missing=[f"The distribution of samples is {what}.{evaluate}"])])
    text = [
        "Samples of stage 2 beside two baselines, which add autoregressive Gaussian noise to stage 1: independent in "
        "each parcel, or with the full covariance over parcels. Lower is better for scores and errors; coverage should "
        "be nominal; FC is functional connectivity, compared with that of real BOLD."
    ]
    parts = [
        Part(
            title=name,
            tables=[tables.distribution_table(found[name])],
            drawings=figures.distribution_drawings(found[name], name, prefix),
        )
        for name in run.sets
        if name in found
    ]
    first = _opened(parts[0])
    return Section(anchor, title, [Part(text=text), first], parts[1:])


def _data(runs: Mapping[str, RunResults]) -> Section:
    parts = []
    for label, run in runs.items():
        if run.config is None or run.manifest is None:
            where = run.config.data.shards if run.config else "which the configuration names"
            parts.append(Part(missing=[f"{label}: the shards ({where}) cannot be looked at from here."]))
            continue
        parts.append(_data_part(run.manifest, tables.data_table(run.config, run.manifest, run.record)))
    return Section("data", "Data", parts)


def _data_part(manifest: Manifest, table: Table) -> Part:
    text = (
        f"{manifest.name}: {len(manifest.samples)} runs, subjects {', '.join(manifest.subjects)}, "
        f"{manifest.parcels} parcels, a TR of {manifest.tr:g} s."
    )
    if manifest.dropped_parcels:
        columns = ", ".join(map(str, manifest.dropped_parcels))
        text += (
            f" Columns {columns} of the BOLD files (counted from 0) were left out; the other parcels are numbered on."
        )
    return Part(text=[text], tables=[table])


def _configuration(runs: Mapping[str, RunResults]) -> Section:
    text, folded = [], []
    for label, run in runs.items():
        for stage in run.stages.values():
            title = f"{label}/stage{stage.number}/config.yaml"
            folded.append(Part(title=title, code=stage.config or "not written yet"))
    configs = {label: run.config for label, run in runs.items() if run.config is not None}
    if len(configs) > 1:
        (first, base), *others = configs.items()
        for label, config in others:
            keys = differing_keys(base, config)
            text.append(f"{label} differs from {first} in {', '.join(f'`{key}`' for key in keys) or 'nothing'}.")
    return Section("configuration", "Configuration", [Part(text=text)], folded)


def _environment(runs: Mapping[str, RunResults]) -> Section:
    parts, folded = [], []
    for label, run in runs.items():
        starts = [start for stage in run.stages.values() for start in stage.starts]
        text = [label] if len(runs) > 1 else []
        if not starts:
            parts.append(Part(text=text, missing=["No start has written down its environment."]))
            continue
        parts.append(Part(text=text, tables=[tables.start_table(run.stages)]))
        details = {key: starts[-1].get(key) for key in ("command", "slurm", "versions", "git_commit")}
        folded.append(
            Part(title=f"{label}: command and versions of the newest start", code=json.dumps(details, indent=1))
        )
        diff = next((str(start["git_diff"]) for start in reversed(starts) if start.get("git_diff")), "")
        if diff:
            folded.append(Part(title=f"{label}: changes that were not committed", code=_shortened(diff)))
    return Section("environment", "Environment", parts, folded)


def _shortened(text: str, lines: int = 500) -> str:
    kept = text.splitlines()
    left = len(kept) - lines
    return text if left <= 0 else "\n".join([*kept[:lines], f"... {left} more lines in starts/"])
