"""
Export an Optuna study of ``sb3-qsm train -optimize``, to be kept with the results.

    python benchmarks/export_study.py study.log pusher --out benchmarks/results/studies

writes ``pusher.log``, a journal for Optuna's tools and for ``sb3-qsm train --storage pusher.log --study-name pusher
--trial-id N``, and ``pusher.csv``, a row for each trial: what was sampled, the return of each evaluation, and its end.
Left out are the processes and machines that worked on the study. A study that is still worked on is refused.
"""

import argparse
import os
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from sb3_qsm.zoo.errors import UserError
from sb3_qsm.zoo.storage import WORKER, open_storage


def main(arguments: list[str] | None = None) -> None:
    """
    Run the command.

    :param arguments: Of the command line, by default the process's
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", help="journal file (NAME.log) or URL of a database")
    parser.add_argument("study_name")
    parser.add_argument("--out", type=Path, required=True, help="folder of the two files")
    args = parser.parse_args(arguments)
    if args.storage.endswith(".log") and not Path(args.storage).is_file():
        parser.error(f"argument storage: there is no file {args.storage!r}")
    try:
        storage = open_storage(args.storage)
    except UserError as error:
        parser.error(str(error))
    names = optuna.get_all_study_names(storage)
    if args.study_name not in names:
        parser.error(
            f"argument study_name: no study {args.study_name!r} in {args.storage}; there: {', '.join(names) or 'none'}"
        )
    study = optuna.load_study(study_name=args.study_name, storage=storage)
    running = [trial.number for trial in study.trials if not trial.state.is_finished()]
    if running:
        parser.error(f"argument study_name: {args.study_name!r} has trials that are not finished: {running}")
    export(study, args.out / args.study_name)


def export(study: optuna.Study, path: Path) -> None:
    """
    Write a study to a journal and a CSV. Both replace what was there.

    :param study: Finished study
    :param path: Files without their endings
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    journal, table = path.with_name(f"{path.name}.log"), path.with_name(f"{path.name}.csv")
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    copied = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(temporary))), study_name=study.study_name, direction=study.direction
    )
    for name, value in study.user_attrs.items():
        copied.set_user_attr(name, value)
    for trial in study.trials:
        trial.user_attrs = {name: value for name, value in trial.user_attrs.items() if name != WORKER}
        copied.add_trial(trial)

    frame = copied.trials_dataframe(attrs=("number", "state", "value", "duration", "params"))
    for step in sorted({step for trial in copied.trials for step in trial.intermediate_values}):
        frame[f"evaluation_{step}"] = [trial.intermediate_values.get(step) for trial in copied.trials]
    frame["duration"] = frame["duration"].dt.total_seconds().round()
    frame.to_csv(table, index=False, lineterminator="\n")
    os.replace(temporary, journal)


if __name__ == "__main__":
    main()
