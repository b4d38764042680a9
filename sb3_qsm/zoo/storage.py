"""Optuna storages that several processes work on."""

import contextlib
import os
import re
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import TrialState

from sb3_qsm.zoo.errors import UserError

# The user attribute of a trial that names the process working on it
WORKER = "worker"


def open_storage(url: str, heartbeat: int = 0) -> BaseStorage:
    """
    Open what ``--storage`` names.

    :param url: A journal file (``*.log``, as in rl_zoo3) or the URL of a database
    :param heartbeat: Seconds between two signs of life that a running trial leaves in a database; 0 for none
    :return: The storage
    :raises UserError: if it cannot be reached
    """
    if url.endswith(".log"):
        try:
            Path(url).parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(url))
        except OSError as error:
            raise UserError(f"argument --storage: cannot open the journal file {url!r}: {error}") from error
    try:
        shown = sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        raise UserError(
            f"argument --storage: {_without_password(url)!r} is neither a journal file (NAME.log) nor the URL of a database, "
            "such as postgresql+psycopg://USER@HOST/DATABASE"
        ) from error
    for attempt in range(5):
        try:
            with experimental():
                return RDBStorage(url, heartbeat_interval=heartbeat or None)
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError) as error:
            # Workers that start at once on an empty database get in each other's way when they create the tables
            if attempt == 4:
                raise UserError(f"argument --storage: cannot create the tables in {shown}: {_first_line(error)}") from error
            time.sleep(0.5 * (attempt + 1))
        except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
            raise UserError(f"argument --storage: cannot reach {shown}: {_first_line(error)}") from error
    raise AssertionError("unreachable")


@contextlib.contextmanager
def experimental() -> Iterator[None]:
    """Optuna calls some of what is used here experimental, for years; the user need not hear of it in every worker."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def _without_password(url: str) -> str:
    """A text that is no URL, without what may be a password in it."""
    return re.sub(r":[^:/@]+@", ":***@", url)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def this_machine() -> str | None:
    """
    Name of this machine as far as process ids reach: two containers are two machines, even if both are called localhost.

    :return: The name, or None where the system does not tell (then no process id can be trusted)
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    return f"{socket.gethostname()} {boot} {namespace}"


def mark_worker(trial: optuna.Trial) -> None:
    """
    Leave in the trial which process works on it.

    :param trial: Running trial
    """
    trial.set_user_attr(WORKER, {"machine": this_machine(), "host": socket.gethostname(), "pid": os.getpid()})


def fail_dead_trials(study: Study) -> tuple[int, int]:
    """
    Set the trials to FAIL whose process is gone: those of this machine by their process id, those of others, in a database,
    when their sign of life is overdue.

    :param study: Study
    :return: How many there were, and how many running ones are of other machines, of which only time will tell
    """
    before = _running(study)
    with experimental():
        optuna.storages.fail_stale_trials(study)
    unknown = 0
    machine = this_machine()
    for trial in _running(study):
        worker: dict[str, Any] = trial.user_attrs.get(WORKER, {})
        if machine is None or worker.get("machine") != machine:
            unknown += 1
        elif not _alive(worker["pid"]):
            # Another worker may have been faster
            with contextlib.suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
                study.tell(trial.number, state=TrialState.FAIL)
    failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    return len({trial.number for trial in before} & {trial.number for trial in failed}), unknown


def _running(study: Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def studies_with_heartbeat(heartbeat: int) -> Iterator[list[Study]]:
    """
    Let rl_zoo3 create its study in a storage with heartbeat. It passes the URL on to Optuna, whose storage then has none, and
    the trial of a killed worker would be running for ever.

    :param heartbeat: Seconds between two signs of life
    :return: The list to which the study will be appended
    """
    real_create_study = optuna.create_study
    studies: list[Study] = []

    def create_study(*, storage: str | BaseStorage | None = None, **kwargs: Any) -> Study:
        if isinstance(storage, str):
            storage = open_storage(storage, heartbeat)
        studies.append(real_create_study(storage=storage, **kwargs))
        return studies[-1]

    with mock.patch.object(optuna, "create_study", create_study):
        yield studies
