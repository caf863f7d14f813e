"""Can stage 2 memorise one batch? The first question to ask of a generative model that does not learn.

    python tools/overfit.py --config configs/full.yaml --subject-idx 0 --steps 500

Trains the flow of a configuration on one fixed batch of one subject, with new noise at every step, around the anchor of
a run (--run), or an untrained one: it has to tell the windows apart, and no more. Prints the losses and the r of a
25-step sample with its target, and exits with status 1 unless the mean of the last 20 losses is below --threshold of
the first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from trainer.config import Config, load_config
from trainer.data.batches import Batch, make_batch
from trainer.data.plan import Span
from trainer.data.statistics import feature_statistics
from trainer.data.study import Study
from trainer.errors import InputError, exit_on_input_error
from trainer.models.anchor import Anchor
from trainer.models.build import build_anchor, build_flow
from trainer.models.flow import FlowMatching
from trainer.run.directory import RunDirectory
from trainer.scoring.known import known_data, warn
from trainer.scoring.metrics import PearsonR
from trainer.scoring.predictor import Items, load_anchor, shapes_of
from trainer.scoring.shares import OneProcess
from trainer.training import latent
from trainer.training.adam import adamw
from trainer.training.phases import FlowObjective

LAST = 20
EVERY = 25
UNTRAINED_STD = 0.3
"""Standard deviation that an untrained anchor's prediction is brought to: about a trained one's."""


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    """Train on one batch; 0 if the loss fell below the threshold, 1 if not."""
    arguments = _arguments(argv)
    if arguments.steps < 1:
        raise InputError("--steps", "too few", found=arguments.steps, expected="1 or more")
    config = load_config(arguments.config, arguments.overrides)
    study = Study(config, known_data(RunDirectory(arguments.run).stage(2)) if arguments.run else ())
    warn(study.warnings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = one_batch(study, arguments.subject_idx, arguments.run, device).to(device)
    torch.manual_seed(config.seed)
    flow = build_flow(config, shapes_of(study)).to(device)
    latent.fit_latent(flow, study, study.spans["train"], None, OneProcess(device))
    losses = memorise(flow, batch, config, arguments.steps)
    r = sample_r(flow, batch, config)

    first, last = losses[0], float(np.mean(losses[-LAST:]))
    print(f"first loss {first:.4f}, mean of the last {LAST} losses {last:.4f}, ratio {last / first:.3f}")
    print(f"r of a {config.stage2.n_timesteps}-step sample with its target: {r:.4f}")
    if last < arguments.threshold * first:
        print("Stage 2 memorises one batch.")
        return 0
    print(
        f"Stage 2 does not memorise one batch: the loss fell to {last / first:.0%} of the first, expected below "
        f"{arguments.threshold:.0%}. Try more --steps, more channels, or a higher stage2.lr."
    )
    return 1


def one_batch(study: Study, subject: int, run: Path | None, device: torch.device) -> Batch:
    """The first training batch, with one subject's BOLD and the anchor's prediction.

    Raises:
        InputError: no such subject, or the subject has no BOLD in the batch.
    """
    subjects = study.manifest.subjects
    if not 0 <= subject < len(subjects):
        raise InputError("--subject-idx", "no such subject", found=subject, expected=f"0 to {len(subjects) - 1}")
    mine: list[Span] = []
    for span in study.spans["train"]:
        if span.subjects[subject]:
            mine.append(replace(span, subjects=tuple(s == subject for s in range(len(subjects)))))
    if not mine:
        raise InputError("--subject-idx", f"subject {subjects[subject]} has no BOLD in the training set")
    plan = study.plan(mine, study.config.seed)
    batch = make_batch(
        study.shards, plan.batch(0, 0), study.streams, study.scaling, sample_length=study.config.sample_length
    )
    anchor = untrained_anchor(study) if run is None else load_anchor(RunDirectory(run).stage(2).anchor, study, device)
    moved = batch.to(device)
    with torch.no_grad():
        prediction = anchor.to(device).eval()(moved.features, moved.mask)
    if run is None:
        prediction *= UNTRAINED_STD / prediction.std()
    return replace(moved, anchor=prediction)


def untrained_anchor(study: Study) -> Anchor:
    """An anchor as it is initialised, on standardised features."""
    torch.manual_seed(study.config.seed)
    anchor = build_anchor(study.config.stage1.model, shapes_of(study))
    if study.config.stage1.standardise_features:
        keep = study.config.stage1.keep_columns
        anchor.set_standardising(*feature_statistics(study.shards, study.spans["train"], study.streams, keep))
    return anchor


def memorise(flow: FlowMatching, batch: Batch, config: Config, steps: int) -> list[float]:
    """Losses of `steps` steps on the batch, with new noise and times at each."""
    objective = FlowObjective(flow, config.seed)
    optimizer = adamw(flow, config.stage2.model_copy(update={"weight_decay": 0.0}))
    terms = int((batch.mask.sum(1) * batch.subject_mask.sum(1)).sum())
    losses = []
    flow.train()
    for step in range(steps):
        loss = objective(batch, step, terms)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if len(losses) % EVERY == 0 or len(losses) == steps:
            # one step's loss depends on the few times t that it drew
            print(f"step {len(losses)} mean loss {np.mean(losses[-EVERY:]):.4f}", flush=True)
    return losses


@torch.no_grad()
def sample_r(flow: FlowMatching, batch: Batch, config: Config) -> float:
    """r over all TRs of the batch between one sample and the BOLD, mean over parcels."""
    assert batch.anchor is not None
    flow.eval()
    items = Items(batch, config.seed, epoch=0)
    sample = flow.sample(items.take(batch.anchor), items.mask, items.subject, items.keys)
    accumulator = PearsonR(*batch.bold.shape[1::2])
    valid = batch.mask[:, None, :] & batch.subject_mask[:, :, None]
    accumulator.update(items.put(sample, batch.bold), batch.bold, valid)
    return accumulator.compute().overall


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--subject-idx", type=int, default=0, help="index into the subjects of the shards")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threshold", type=float, default=0.15, help="largest share of the first loss that passes")
    parser.add_argument("--run", type=Path, help="run directory whose stage 2 holds an anchor")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
