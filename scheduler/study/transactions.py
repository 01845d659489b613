"""The transactions on the study database that Optuna's public API does not offer.

Covers: connecting (SQLite's settings), claiming or creating a trial, reports, final states, retries and leases, each as
ONE transaction that takes the study's lock, so that a crash leaves either all of it or nothing and two drivers cannot
both claim or finish a trial. Does not sample, prune or know what an attribute means: `study` does. Part of the study
adapter; nothing else imports it. What it uses of Optuna that is not public is in `optuna_private`.

SQLite: WAL with synchronous=NORMAL. A dying process loses nothing; a power cut may lose the last transactions (never
the file): a trial that was told is then RUNNING again, and the next start tells it again from its durable result.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shlex
import sqlite3
import tempfile
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import event, exc
from sqlalchemy.orm import Session

from scheduler.files.pinned import Pinned
from scheduler.masking import masked, scrubbed
from scheduler.model import HeadroomError, UsageError
from scheduler.model.plain import plain
from scheduler.study import optuna_private, statements
from scheduler.study.optuna_private import StudyAttr, TrialRow
from scheduler.study.statements import OVER, Drawn

BUSY_TIMEOUT_S = 5.0  # how long one transaction waits for another process's; the recorder repeats it after that
CONNECT_TIMEOUT_S = 10
QUICK_CHECK_BYTES = 256 * 2**20  # read in some 0.2 s; a larger file would hold up the start


class StudyUnavailable(HeadroomError):
    """The storage cannot be used now (locked, full, read-only, unreachable); the same call may work later."""


class NotOurs(HeadroomError):
    """The trial belongs to another run: it is left as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A RUNNING trial of ours. trial_id: the database's own number of it. attrs: its user attributes."""

    trial_id: int
    number: int
    attrs: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Full:
    """No trial to begin: `counted` are finished, `running` are being run by some driver, together the quota."""

    counted: int
    running: int


def sqlite_path(url: str) -> Path | None:
    """Return the file of an SQLite URL; None for any other database and for one in memory."""
    parsed = sqlalchemy.engine.make_url(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        return None
    return Path(str(parsed.database))


def check(url: str) -> None:
    """Prove that a study could be kept at `url`; creates nothing. Raises UsageError, one line, with what to do."""
    if gone := optuna_private.missing():
        raise UsageError(f"optuna {optuna.__version__} has no {', '.join(gone)}: pip install 'optuna>=5.0,<6'")
    shown = masked(url)
    try:
        path, backend = sqlite_path(url), sqlalchemy.engine.make_url(url).get_backend_name()
    except (exc.ArgumentError, ValueError) as error:
        raise UsageError(
            f"--storage {shown} is not a database URL ({one_line(error)}): use sqlite:///FILE or "
            "postgresql://USER@HOST/NAME"
        ) from None
    if backend != "sqlite":
        _check_server(url)
    elif path is None:
        raise UsageError(f"--storage {shown} keeps the study in memory, lost at exit: use sqlite:///FILE")
    else:
        _check_file(path)


def _check_file(path: Path) -> None:
    if not path.exists():
        folder = path.absolute().parent
        if not folder.exists():  # not made: a typo in it, or a disk that is not mounted, would begin another study
            raise UsageError(
                f"the study's database cannot be created at {path}: there is no folder {path.parent}: correct it, or "
                f"mkdir -p {shlex.quote(str(path.parent))}"
            )
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"the study's database cannot be created at {path}: {folder} is not a writable folder")
        _try_a_file(path, folder)
        return
    # SQLite keeps its journal beside the file, so the folder must be writable too.
    if not path.is_file() or not os.access(path, os.W_OK) or not os.access(path.absolute().parent, os.W_OK):
        raise UsageError(f"the study's database {path} is not a writable file in a writable folder")
    with path.open("rb") as file:
        head = file.read(16)
    if head and head != b"SQLite format 3\0":
        raise UsageError(
            f"{path} is not an SQLite database (it starts with {head!r}): put the right file back, or choose another"
        )
    _check_content(path)


def _try_a_file(path: Path, folder: Path) -> None:
    """Create a file in the folder, and leave none: root may write anywhere, says `access`, and cannot in /proc."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # that is waited for
            why = error.strerror or error
            raise UsageError(f"the study's database cannot be created at {path}: no file in {folder}: {why}") from None


def _check_content(path: Path) -> None:
    """Refuse a file that was cut off or overwritten, or another program's, before anything is under way."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=BUSY_TIMEOUT_S)) as found:
            tables = {name for (name,) in found.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            small = path.stat().st_size <= QUICK_CHECK_BYTES
            said = found.execute("PRAGMA quick_check(1)").fetchone()[0] if small else "ok"
    except sqlite3.OperationalError:  # locked, or a full disk: that is waited for later
        return
    except sqlite3.DatabaseError as error:
        said, tables = str(error), set()
    if said != "ok":
        what = " ".join(str(said).replace("***", "").split())
        raise UsageError(
            f"the study's database {path} is damaged ({what}): put a copy back, save what can be read with "
            f"`sqlite3 {path} .recover`, or move it away to start anew"
        )
    if tables and not {"studies", "trials", "version_info"} <= tables:
        raise UsageError(f"{path} is the database of another program: choose another file")


def _check_server(url: str) -> None:
    shown = masked(url)
    try:
        engine = sqlalchemy.create_engine(url, **engine_kwargs(url))
    except ImportError as error:
        wanted = error.name or "it"
        pip = "'psycopg[binary]'" if wanted == "psycopg" else wanted
        raise UsageError(f"--storage {shown} needs a driver that is not installed: pip install {pip}") from None
    except exc.NoSuchModuleError:
        raise UsageError(
            f"--storage {shown} is of no database that is known: use sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME"
        ) from None
    except (exc.SQLAlchemyError, ValueError, TypeError) as error:
        raise UsageError(f"--storage {shown} cannot be used: {one_line(error)}") from None
    try:
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("SELECT 1"))
    except (exc.SQLAlchemyError, OSError, ValueError, TypeError) as error:  # the last two: a query no driver knows
        raise UsageError(f"--storage {shown} cannot be reached: {one_line(error)}") from None
    finally:
        engine.dispose()


def engine_kwargs(url: str) -> dict[str, Any]:
    parsed = sqlalchemy.engine.make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": BUSY_TIMEOUT_S}}
    # A connection that died while trials trained is found dead and replaced, instead of failing the first statement.
    settings: dict[str, Any] = {"pool_pre_ping": True}
    driver = parsed.get_driver_name()
    if driver in ("psycopg2", "psycopg", "pymysql", "mysqldb"):
        settings["connect_args"] = {"connect_timeout": CONNECT_TIMEOUT_S}
    elif driver == "pg8000":
        settings["connect_args"] = {"timeout": CONNECT_TIMEOUT_S}
    return settings


def one_line(error: BaseException) -> str:
    """Return the driver's own message, without SQLAlchemy's statement and link, and without passwords."""
    cause = getattr(error, "orig", None) or error
    return " ".join(scrubbed(str(cause)).split()) or type(cause).__name__


@contextmanager
def translated() -> Iterator[None]:
    """Raise StudyUnavailable for what may pass; let everything else through as it is."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, exc.SQLAlchemyError, sqlite3.Error) as error:
        cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
        if is_outage(cause):
            raise StudyUnavailable(one_line(cause or error)) from error
        raise


def is_outage(error: BaseException | None) -> bool:
    """Whether the same statement may work later."""
    if isinstance(error, exc.DBAPIError) and error.connection_invalidated:
        return True
    return isinstance(
        error, exc.OperationalError | exc.InterfaceError | exc.TimeoutError | sqlite3.OperationalError | OSError
    )


def is_storage_error(error: BaseException) -> bool:
    """Whether an exception that came through the user's sampler is the database's and not the sampler's."""
    return isinstance(
        error, optuna.exceptions.StorageInternalError | exc.SQLAlchemyError | sqlite3.Error | StudyUnavailable
    )


def clean(value: Any) -> Any:
    """`value` as bounded JSON that every database and every reader can take; what is none becomes its `str`."""
    return plain(value)


class Rdb:
    """A connection to the study database and the transactions on it. Safe to use from several threads."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.file: Pinned | None = None
        self._keeper: sqlite3.Connection | None = None
        with translated():
            path = sqlite_path(url)
            if path is not None:
                self._open_file(path)
            try:
                self.storage = self._create(url)
            except BaseException:
                self._close_file()
                raise
            self._begin_to_keep()
            self.engine = optuna_private.engine(self.storage)
            if path is not None:
                event.listen(self.engine, "do_connect", self._refuse_another_file)
                event.listen(self.engine, "connect", _configure_sqlite)
                event.listen(self.engine, "begin", _begin_immediate)
                self.engine.dispose()  # those opened before the listeners have neither setting

    def _begin_to_keep(self) -> None:
        if self._keeper is not None:
            self._keeper.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()  # or it has no log open yet

    def _open_file(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # a new one is its user's alone; SQLite would make it 0644
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            self.file = Pinned(path)
        except OSError as error:
            raise StudyUnavailable(f"{error.filename or path}: {error.strerror}") from error
        # Stays open: if the file is removed under us, what it held can still be read here, and nowhere else.
        self._keeper = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
        self._keeper.execute("PRAGMA journal_mode=WAL")

    def _close_file(self) -> None:
        """Last of all: closing any descriptor of the file drops the locks of every connection of this process."""
        if self._keeper is not None:
            self._keeper.close()
        if self.file is not None:
            self.file.close()

    def _refuse_another_file(self, *_: Any) -> None:
        """Refuse a connection after the file was removed: it would begin a new, empty database in its place."""
        if self.file is not None and (fate := self.file.lost()) is not None:
            raise sqlite3.OperationalError(f"the study database {self.file.path} {fate}")

    def rescue(self, target: Path) -> None:
        """Write all that the SQLite database holds to a new file, also when its own was removed. Raises OSError."""
        assert self._keeper is not None
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        try:
            with closing(sqlite3.connect(target)) as copy:
                self._keeper.backup(copy)
        except sqlite3.Error as error:
            target.unlink(missing_ok=True)
            raise OSError(f"cannot be copied: {error}") from error

    @staticmethod
    def _create(url: str) -> optuna.storages.RDBStorage:
        """Connect and create the tables. A second driver may be creating them now: then the next try finds them."""
        for tries_left in (4, 3, 2, 1, 0):
            try:
                return optuna.storages.RDBStorage(url, engine_kwargs=engine_kwargs(url))
            except RuntimeError as error:  # tables of another release
                raise UsageError(f"--storage {masked(url)}: {one_line(error)}") from None
            except (exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
                cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
                created_meanwhile = isinstance(cause, exc.IntegrityError) or "exist" in str(cause).lower()
                if tries_left == 0 or not created_meanwhile:
                    raise
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Give the connections back. SQLite's write-ahead log is folded into the file by the last one."""
        self.storage.remove_session()
        self.engine.dispose()
        self._close_file()

    @contextmanager
    def _transaction(self, study_id: int) -> Iterator[Session]:
        """Open a session that holds the study's lock: its row's, or (SQLite has none) the whole file's."""
        with translated(), Session(self.engine) as session, session.begin():
            session.connection().execute(statements.LOCK, {"study": study_id}).one()
            yield session

    # -- trials -----------------------------------------------------------------------------------------------------

    def begin(
        self,
        study_id: int,
        *,
        run: str,
        owner: str,
        quota: int,
        delivered: Container[int],
    ) -> Begun | Full:
        """Claim a waiting trial or create one, within the quota.

        A RUNNING trial of this owner that is not in `delivered` is what an earlier call began before it failed: it is
        returned again.
        """
        mine = {"owner": owner, "run": run}
        with self._transaction(study_id) as session:
            running = 0
            for trial in session.connection().execute(statements.RUNNING, {"study": study_id}):
                if trial.owner == json.dumps(owner) and trial.number not in delivered:
                    attrs = statements.parsed(statements.stored_attributes(session, trial.trial_id))
                    return Begun(trial_id=trial.trial_id, number=trial.number, attrs=attrs)
                # One without an owner was left by another program; nobody will ever finish it, so it is not waited for.
                running += trial.owner is not None
            in_state = statements.in_state(session, study_id)
            counted = statements.counted(session, study_id, in_state)
            if counted + running >= quota:
                return Full(counted=counted, running=running)
            if in_state.get(TrialState.WAITING):
                waiting = self._trials(session, study_id, TrialState.WAITING).first()
                have = statements.stored_attributes(session, waiting.trial_id)
                statements.put_attributes(session, waiting.trial_id, mine, have)
                waiting.state, waiting.datetime_start = TrialState.RUNNING, datetime.now()  # noqa: DTZ005
                attrs = {**statements.parsed(have), **mine}
                return Begun(trial_id=waiting.trial_id, number=waiting.number, attrs=attrs)
            created = optuna_private.new_trial(study_id, sum(in_state.values()))
            session.add(created)
            session.flush()
            begun = Begun(trial_id=optuna_private.trial_id(created), number=optuna_private.number(created), attrs=mine)
            statements.put_attributes(session, begun.trial_id, mine, {})
            return begun

    def enqueue_first(self, study_id: int, trials: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> bool:
        """Queue trials, each with (fixed parameters, user attributes), if the study has none at all; whether it did."""
        with self._transaction(study_id) as session:
            if session.query(TrialRow).filter_by(study_id=study_id).first() is not None:
                return False
            for fixed, attrs in trials:
                system_attrs = {optuna_private.FIXED_PARAMS: dict(fixed)}
                template = create_trial(state=TrialState.WAITING, user_attrs=clean(attrs), system_attrs=system_attrs)
                optuna_private.add_trial(self.storage, session, study_id, template)
            return True

    def annotate(
        self, study_id: int, number: int, run: str, attrs: Mapping[str, Any], drawn: Drawn | None = None
    ) -> None:
        """Write attributes of a RUNNING trial of `run`, and what it was given as it was drawn. Raises NotOurs."""
        with self._transaction(study_id) as session:
            trial_id, have = self._running(session, study_id, number, run)
            if drawn is not None:
                attrs = {**drawn.user_attrs, **attrs}
                statements.put_drawn(session, trial_id, drawn)
            statements.put_attributes(session, trial_id, attrs, have)

    def report(self, study_id: int, number: int, run: str, values: Mapping[int, float]) -> Begun:
        """Write intermediate values (a later one of a step wins). Raises NotOurs, also when the trial is over."""
        with self._transaction(study_id) as session:
            trial_id, have = self._running(session, study_id, number, run)
            statements.put_reports(session, trial_id, values)
            return Begun(trial_id=trial_id, number=number, attrs=statements.parsed(have))

    def finish(
        self,
        study_id: int,
        number: int,
        run: str,
        state: TrialState,
        values: Sequence[float],
        attrs: Mapping[str, Any],
        constraint: float | None,
        lease: tuple[str, Any] | None = None,
    ) -> TrialState:
        """Give the trial its final state; the one that stands is returned (an earlier one wins).

        Raises NotOurs, also when it was queued again: whoever did that has taken it over.
        """
        with self._transaction(study_id) as session:
            trial, have = self._ours(session, study_id, number, run)
            if trial.state.is_finished():
                if "retried" in have:
                    raise NotOurs(f"trial {number} was queued again by another driver")
                return TrialState(trial.state)
            self._require_lease(session, study_id, lease)
            self._finish(session, trial, state, values, attrs, constraint, have)
            return state

    def requeue(
        self,
        study_id: int,
        number: int,
        run: str,
        *,
        attrs: Mapping[str, Any],
        successor_attrs: Mapping[str, Any],
        lease: tuple[str, Any] | None = None,
    ) -> int | None:
        """Queue the trial's parameters as a new trial and tell this one FAIL, both or neither.

        Returns the successor's number; None when the trial had already ended otherwise. Intermediate values go with
        it, so that the pruner and the curve see one training and not its last part.
        """
        with self._transaction(study_id) as session:
            trial, have = self._ours(session, study_id, number, run)
            if trial.state.is_finished():
                return None if "retried" not in have else int(json.loads(have["retried"]))
            self._require_lease(session, study_id, lease)
            frozen = optuna_private.frozen(self.storage, trial)
            fixed = {**frozen.system_attrs.get(optuna_private.FIXED_PARAMS, {}), **frozen.params}
            template = create_trial(
                state=TrialState.WAITING,
                user_attrs=clean({**successor_attrs, "retry_of": number}),
                system_attrs={optuna_private.FIXED_PARAMS: fixed},
                intermediate_values=frozen.intermediate_values,
            )
            successor = optuna_private.add_trial(self.storage, session, study_id, template)
            told = {**attrs, "retried": optuna_private.number(successor)}
            self._finish(session, trial, TrialState.FAIL, (), told, None, have)
            return optuna_private.number(successor)

    def finished(self, study_id: int, numbers: Collection[int]) -> set[int]:
        """Which of these trials have a final state."""
        if not numbers:
            return set()
        with self._transaction(study_id) as session:
            query = session.query(TrialRow.number).filter(TrialRow.study_id == study_id, TrialRow.state.in_(OVER))
            return {int(number) for (number,) in query.filter(TrialRow.number.in_(numbers))}

    def frozen(self, study_id: int, number: int) -> FrozenTrial:
        """One trial as it is now."""
        with self._transaction(study_id) as session:
            return optuna_private.frozen(self.storage, self._trial(session, study_id, number))

    def counted(self, study_id: int) -> int:
        """Trials that count towards the quota."""
        with self._transaction(study_id) as session:
            in_state = statements.in_state(session, study_id)
            return statements.counted(session, study_id, in_state)

    def completed(self, study_id: int) -> int:
        """Trials that ended COMPLETE."""
        with self._transaction(study_id) as session:
            return int(self._trials(session, study_id, TrialState.COMPLETE).count())

    # -- attributes of the study ------------------------------------------------------------------------------------

    def remember(self, study_id: int, key: str, value: Any) -> Any:
        """Store a study attribute unless it exists; what stands is returned."""
        with self._transaction(study_id) as session:
            found = session.query(StudyAttr).filter_by(study_id=study_id, key=key).one_or_none()
            if found is not None:
                return json.loads(str(found.value_json))
            session.add(StudyAttr(study_id=study_id, key=key, value_json=json.dumps(value)))
            return value

    def set_study_attr(self, study_id: int, key: str, value: Any) -> None:
        """Store a study attribute, replacing what was there."""
        with translated():
            self.storage.set_study_user_attr(study_id, key, value)

    def study_attrs(self, study_id: int) -> dict[str, Any]:
        """All user attributes of the study."""
        with translated():
            return self.storage.get_study_user_attrs(study_id)

    # -- inside a transaction ---------------------------------------------------------------------------------------

    @staticmethod
    def _trials(session: Any, study_id: int, state: TrialState) -> Any:
        query = session.query(TrialRow).filter_by(study_id=study_id, state=state)
        return query.order_by(TrialRow.trial_id)

    @staticmethod
    def _trial(session: Any, study_id: int, number: int) -> Any:
        query = session.query(TrialRow).filter_by(study_id=study_id, number=number)
        trial = query.with_for_update().one_or_none()
        if trial is None:
            raise KeyError(f"no trial {number} in study {study_id}")
        return trial

    def _ours(self, session: Session, study_id: int, number: int, run: str) -> tuple[Any, Mapping[str, str]]:
        """Return the trial's row, locked, and its attributes as they are stored."""
        trial = self._trial(session, study_id, number)
        have = statements.stored_attributes(session, trial.trial_id)
        _require_run(number, run, have)
        return trial, have

    @staticmethod
    def _running(session: Session, study_id: int, number: int, run: str) -> tuple[int, Mapping[str, str]]:
        """Return the id of a RUNNING trial instead of its row, for what writes nothing of the row itself."""
        found = session.connection().execute(statements.TRIAL, {"study": study_id, "number": number}).one_or_none()
        if found is None:
            raise KeyError(f"no trial {number} in study {study_id}")
        have = statements.stored_attributes(session, found.trial_id)
        _require_run(number, run, have)
        if found.state is not TrialState.RUNNING:
            raise NotOurs(f"trial {number} is {found.state.name}, not RUNNING")
        return found.trial_id, have

    @staticmethod
    def _require_lease(session: Any, study_id: int, lease: tuple[str, Any] | None) -> None:
        """Raise unless the lease is the very one that was seen to expire: one renewed meanwhile means that its driver
        lives."""
        if lease is None:
            return
        key, expected = lease
        found = session.query(StudyAttr).filter_by(study_id=study_id, key=key).one_or_none()
        if (None if found is None else json.loads(str(found.value_json))) != expected:
            raise NotOurs(f"{key} has been renewed")

    def _finish(
        self,
        session: Any,
        trial: Any,
        state: TrialState,
        values: Sequence[float],
        attrs: Mapping[str, Any],
        constraint: float | None,
        have: Mapping[str, str],
    ) -> None:
        statements.put_attributes(session, trial.trial_id, attrs, have)
        if constraint is not None:
            optuna_private.set_constraint(self.storage, session, trial, "memory", float(constraint))
        if state is TrialState.PRUNED:
            # As `study.tell` does: the last finite intermediate value becomes the trial's.
            reports = statements.reports(session, trial.trial_id)
            last = reports[max(reports)] if reports else math.nan
            values = () if math.isnan(last) else (last,)
        if state is not TrialState.FAIL:
            statements.put_values(session, trial.trial_id, [float(value) for value in values])
        trial.state, trial.datetime_complete = state, datetime.now()  # noqa: DTZ005 - Optuna keeps local times


def _require_run(number: int, run: str, have: Mapping[str, str]) -> None:
    owner = json.loads(have["run"]) if "run" in have else None
    if owner != run:
        raise NotOurs(f"trial {number} belongs to {owner or 'another program'}, this is {run}")


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # BEGIN is ours: see below
    connection.execute("PRAGMA synchronous=NORMAL")


def _begin_immediate(connection: Any) -> None:
    # Python's sqlite3 begins a transaction at the first write, after the state has been read: two processes both read
    # RUNNING and both finish the trial. With the write lock taken first, the second one reads what the first one wrote.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
