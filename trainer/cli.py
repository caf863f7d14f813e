"""The one command line: `python -m trainer <command>`, the console script `fmri-flow`, and what every launcher calls.

Thin on purpose: it reads arguments, opens a run and hands over. Bad input ends with one line and status 2, a signal
with 128 + its number; everything else is our mistake and keeps its traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config import load_config
from trainer.errors import InputError, exit_on_input_error

Commands = argparse._SubParsersAction  # the type of what add_subparsers gives has no public name


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes one group of positionals only; overrides may stand anywhere
    if rest and ("overrides" not in arguments or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides = [*getattr(arguments, "overrides", []), *rest]
    status: int = arguments.run_command(arguments)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_train,
        _add_status,
        _add_watch,
        _add_evaluate,
        _add_report,
        _add_predict,
        _add_export,
        _add_ensemble,
    ):
        add(commands)
    return parser


def _add_sets(parser: argparse.ArgumentParser) -> None:
    text = "sets (default: all not trained on)"
    parser.add_argument("--set", nargs="+", action="extend", dest="sets", metavar="NAME", help=text)


def _add_train(commands: Commands) -> None:
    train = commands.add_parser("train", help="train both stages, score them and draw figures")
    train.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML configuration")
    train.add_argument("--run", type=Path, metavar="DIR", help="run directory (default: output/<name of the config>)")
    train.add_argument("--stage", choices=["1", "2", "all"], default="all", help="which stage to train")
    train.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint")
    train.add_argument("--overwrite", action="store_true", help="delete the stages to be trained and start anew")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, e.g. stage1.lr=1e-3")
    train.set_defaults(run_command=_train)


def _add_evaluate(commands: Commands) -> None:
    evaluate = commands.add_parser("evaluate", help="score checkpoints now, once")
    evaluate.add_argument("run", type=Path, metavar="DIR", help="run directory")
    evaluate.add_argument("--stage", choices=["1", "2"], help="which stage (default: both that are there)")
    evaluate.add_argument("--step", default="best", metavar="N|best|last|all", help="which checkpoints")
    _add_sets(evaluate)
    evaluate.set_defaults(run_command=_evaluate)


def _add_status(commands: Commands) -> None:
    status = commands.add_parser("status", help="say how far a run is, who trains it, and how its jobs are")
    status.add_argument("run", type=Path, metavar="DIR", help="run directory")
    status.set_defaults(run_command=_status)


def _add_predict(commands: Commands) -> None:
    predict = commands.add_parser("predict", help="write what a trained model predicts for a set, with BOLD or without")
    predict.add_argument("run", type=Path, metavar="DIR", help="run directory")
    predict.add_argument("--set", required=True, dest="set_name", metavar="NAME", help="a set of the configuration")
    predict.add_argument("--out", type=Path, required=True, metavar="FILE", help="new file")
    predict.add_argument("--estimate", choices=["mean", "sample"], default="mean", help="what to predict")
    predict.add_argument("--samples", type=int, metavar="K", help="samples a run (default: 1)")
    predict.add_argument("--stage", type=int, choices=[1, 2], help="which stage (default: 2 where it is finished)")
    predict.add_argument("--format", choices=["h5", "algonauts"], default="h5", help="HDF5, or the challenge's zip")
    predict.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. datasets.s7.filter.seasons=[7]")
    predict.set_defaults(run_command=_predict)


def _add_export(commands: Commands) -> None:
    export = commands.add_parser("export", help="write a trained model as a folder that trainer.load reads")
    export.add_argument("run", type=Path, metavar="DIR", help="run directory")
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder")
    export.add_argument("--stage", type=int, choices=[1, 2], help="which stage (default: 2 where it is finished)")
    export.set_defaults(run_command=_export)


def _add_ensemble(commands: Commands) -> None:
    ensemble = commands.add_parser("ensemble", help="score the average of the best checkpoints of several runs")
    ensemble.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="run directories")
    ensemble.add_argument("--set", required=True, dest="set_name", metavar="NAME", help="set to score")
    ensemble.add_argument("--choose-on", required=True, metavar="NAME", help="set that chooses; scored before")
    ensemble.add_argument("--best", type=int, default=3, metavar="N", help="checkpoints a parcel (default: 3)")
    ensemble.set_defaults(run_command=_ensemble)


def _add_watch(commands: Commands) -> None:
    watch = commands.add_parser(
        "watch",
        help="score checkpoints as they appear, beside a training or after it, together with other workers",
        epilog="Exit status: 0 the training has finished and everything is scored; 3 the training is gone and what it "
        "left is scored; 128 + n on signal n; 2 bad input. torchrun and accelerate launch make 1 of all but 0.",
    )
    watch.add_argument("run", type=Path, metavar="DIR", help="run directory; may be about to be made")
    watch.add_argument("--stage", type=int, choices=[1, 2], help="look at this stage alone, and end with it")
    _add_sets(watch)
    watch.add_argument(
        "--until-finished", action="store_true", help="end with the training (default: watch until a signal)"
    )
    watch.set_defaults(run_command=_watch)


def _add_report(commands: Commands) -> None:
    report = commands.add_parser("report", help="write a page with all figures about one or several runs")
    report.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="run directories")
    report.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the page (default: the first run)")
    report.set_defaults(run_command=_report)


def _train(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    stages = [1, 2] if arguments.stage == "all" else [int(arguments.stage)]
    path = arguments.run or Path("output") / arguments.config.stem
    # torch takes seconds to import: mistakes in the configuration were found above, without it.
    from trainer.evaluation.figures import draw_figures
    from trainer.run.processes import Interrupted
    from trainer.training.stages import train

    try:
        run = train(config, path, stages, resume=arguments.resume, overwrite=arguments.overwrite)
    except Interrupted as interrupted:
        print(f"{interrupted}. Continue with --resume.", file=sys.stderr)
        return 128 + interrupted.signum
    if run is not None:
        for figure in draw_figures(run):
            print(f"figure: {figure}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from trainer.evaluation.evaluate import evaluate
    from trainer.run.directory import RunDirectory

    run = RunDirectory(arguments.run)
    stages = [int(arguments.stage)] if arguments.stage else [n for n in (1, 2) if run.stage(n).has_started()]
    if not stages:
        raise InputError(arguments.run, "holds no training", expected="a run directory with stage1/")
    evaluate(run, stages, arguments.step, arguments.sets)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from trainer.run.directory import RunDirectory
    from trainer.run.status import show

    for line in show(RunDirectory(arguments.run)):
        print(line, flush=True)
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from trainer.predict import Request, predict
    from trainer.run.directory import RunDirectory

    request = Request.of(arguments.set_name, arguments.estimate, arguments.samples)
    options = {"stage": arguments.stage, "form": arguments.format, "overrides": arguments.overrides}
    predict(RunDirectory(arguments.run), request, arguments.out, **options)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from trainer.export import export
    from trainer.run.directory import RunDirectory

    export(RunDirectory(arguments.run), arguments.out, arguments.stage)
    return 0


def _ensemble(arguments: argparse.Namespace) -> int:
    from trainer.evaluation.ensemble import ensemble
    from trainer.run.directory import RunDirectory

    runs = [RunDirectory(path) for path in arguments.runs]
    ensemble(runs, arguments.set_name, arguments.choose_on, arguments.best)
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    from trainer.evaluation.worker import watch
    from trainer.run.directory import RunDirectory

    stages = [arguments.stage] if arguments.stage else [1, 2]
    return watch(RunDirectory(arguments.run), arguments.sets, until_finished=arguments.until_finished, stages=stages)


def _report(arguments: argparse.Namespace) -> int:
    from trainer.evaluation.report import write_report

    print(f"report: {write_report(arguments.runs, arguments.out)}")
    return 0
