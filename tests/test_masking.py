"""Passwords: no form of a database URL, and no error that repeats one, shows any part of it."""

from __future__ import annotations

import string
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from scheduler import masking
from scheduler.cli import schedule
from scheduler.model import UsageError
from scheduler.study import transactions
from scheduler.ui import log
from tests.waiting import free_port

SECRET = "s3cr3t"


@pytest.fixture(autouse=True)
def nothing_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test teaches is not known to the next."""
    monkeypatch.setattr(masking, "_known", set())


@pytest.mark.parametrize(
    ("url", "shown", "kept"),
    [
        ("postgresql://u:ab/cd+ef@h/db", "postgresql://u:***@h/db", "postgresql://u@h/db"),
        ("postgresql://u:p%40ss@h:5432/db", "postgresql://u:***@h:5432/db", "postgresql://u@h:5432/db"),
        ("postgresql://u@h/db?password=x", "postgresql://u@h/db?password=***", "postgresql://u@h/db"),
        ("postgresql://u@h/db?sslmode=require&sslpassword=a@b", "postgresql://u@h/db?sslmode=require&sslpassword=***",
         "postgresql://u@h/db?sslmode=require"),
        ("mysql+pymysql://u:s@[::1]/db?charset=utf8mb4&passwd=x", "mysql+pymysql://u:***@[::1]/db?charset=utf8mb4&passwd=***",
         "mysql+pymysql://u@[::1]/db?charset=utf8mb4"),
        ("mssql+pyodbc:///?odbc_connect=PWD%3Dx", "mssql+pyodbc:///?odbc_connect=***", "mssql+pyodbc:///"),
        ("postgresql://h/db?token", "postgresql://h/db?=***", "postgresql://h/db"),
        ("sqlite:////home/me@work/study.db", "sqlite:////home/me@work/study.db", "sqlite:////home/me@work/study.db"),
        ("postgresql://u@h/db", "postgresql://u@h/db", "postgresql://u@h/db"),
    ],
)  # fmt: skip
def test_a_url_is_shown_and_kept_without_its_secrets(url: str, shown: str, kept: str) -> None:
    """Shown with *** where they were; kept without them, so that PGPASSWORD or ~/.pgpass can have them."""
    assert (masking.masked(url), masking.bare(url)) == (shown, kept)
    assert masking.is_clear(url)
    assert masking.has_secret(url) == (shown != url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:p@s3cr3t@h:5432/db", "postgresql://***@h:5432/db"),
        ("postgresql://u:s3cr3t", "postgresql://***"),
        ("postgresql://h:s3cr3t/db", "postgresql://***"),
        ("postgresql://u:s3cr3t@[::1/db", "postgresql://***"),
        ("postgresql://h:5432?password=a@s3cr3t", "postgresql://***"),
        ("postgresql:/u:s3cr3t@h/db", "***"),
    ],
)
def test_a_url_that_is_not_understood_is_hardly_shown(url: str, shown: str) -> None:
    """Nothing between the scheme and what must be the host; and it is refused before a driver can take it apart."""
    assert masking.masked(url) == shown
    assert not masking.is_clear(url)


PASSWORDS = st.text(string.ascii_letters + string.digits + string.punctuation + " äß", min_size=1, max_size=12)


@given(PASSWORDS, st.booleans())
@example("a@b", False)
@example("a?password=b@c", False)
@example("//x@y", False)
def test_no_password_is_shown_however_it_is_written(word: str, is_quoted: bool) -> None:
    """Whatever is in it, quoted as it should be or not, by itself and in a sentence."""
    word = f"Q{word}Q"  # so that what is looked for is no part of anything else
    written = quote(word, safe="") if is_quoted else word
    for url in (f"postgresql://user:{written}@host/db", f"postgresql://user@host/db?password={written}"):
        assume("#" not in url)
        for shown in (masking.masked(url), masking.bare(url), masking.scrubbed(repr(masking.masked(url)))):
            assert "Q" not in shown, shown
        if not is_quoted or " " in word:
            continue
        assert "Q" not in masking.scrubbed(f"cannot connect to {url}: refused")


def test_what_is_learned_is_scrubbed_where_it_stands_alone() -> None:
    """Drivers repeat a password without its URL, decoded; addresses and paths of ours stay as they are."""
    masking.learn("postgresql://u:a%2Fs3cr3t@h/db?sslpassword=hush-hush")
    said = masking.scrubbed('invalid dsn near "a/s3cr3t", a%2Fs3cr3t and hush-hush')
    assert said == 'invalid dsn near "***", *** and ***'
    for text in (
        "http://127.0.0.1:8787/headroom, tls://[::1]:8786; sqlite:////runs/a@b/study.db",
        "at 12:30:01 me@host said module:function (https://sqlalche.me/e/20/e3q8).",
    ):
        assert masking.scrubbed(text) == text


# -- every way out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--storage", f"postgresql+psycopg://u:{SECRET}/cd+ef@127.0.0.1:PORT/db"],
        ["--storage", f"postgresql+psycopg://u@127.0.0.1:PORT/db?password={SECRET}"],
        ["--storage", f"postgresql+psycopg://u@127.0.0.1:PORT/db?passwrd={SECRET}"],
        ["--storage", f"postgresql+psycopg://u:p@{SECRET}@127.0.0.1:PORT/db"],
        ["--storage", f"postgresql+psycopg://127.0.0.1:{SECRET}/db"],
        ["--storage", f"nonsense://u:{SECRET}@h/db"],
        ["--storage", f"postgresql:/u:{SECRET}@h/db"],
        ["--storage", f"postgresql:/u:{'x' * 70}{SECRET}@h/db"],
        ["--storage", f"postgresql:/u:my {SECRET}@h/db"],
        ["--storage", f"mysql+nodriver://u:{SECRET}@h/db"],
        [f"postgresql://u:{SECRET}@h/db"],
    ],
)
def test_no_error_line_shows_a_password(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong, unreachable, misspelt, of an unknown kind or in the wrong place: exit 2, and the password is nowhere."""
    monkeypatch.chdir(tmp_path)
    arguments = [word.replace("PORT", str(free_port())) for word in arguments]
    assert schedule.execute(["--budgets", "2M", "--horizons", "1", "--device", "cpu", *arguments]) == 2
    out, err = capfd.readouterr()
    assert SECRET not in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["HEADROOM_STORAG", "HEADROOM_STORAGE"])
def test_no_error_line_shows_a_variable_password(
    name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for the environment."""
    monkeypatch.setenv(name, f"postgresql://u:x@{SECRET}@h/db")
    assert schedule.execute(["--budgets", "2M", "--dry-run"]) == 2
    assert SECRET not in "".join(capfd.readouterr())


def test_no_error_line_shows_a_files_password(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Unknown keys, and values that two files disagree on."""
    for name, key in (("a", "storage"), ("b", "storage"), ("c", "storag")):
        text = f"budgets: [2M]\nhorizons: [1]\n{key}: postgresql://u:{SECRET}{name}@h/db\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    a, b, c = (str(tmp_path / f"{name}.yaml") for name in "abc")
    assert schedule.execute(["--experiment", a, b, "--dry-run"]) == 2
    assert schedule.execute(["--config", c, "--dry-run"]) == 2
    said = "".join(capfd.readouterr())
    assert SECRET not in said and "differs from" in said and "did you mean storage?" in said


def test_a_masked_url_is_not_taken_for_one(capfd: pytest.CaptureFixture[str]) -> None:
    """*** is no password: who copies a line that was shown is told so, instead of a failed login."""
    assert schedule.execute(["--storage", "postgresql://u:***@h/db", "--dry-run"]) == 2
    assert "left out" in capfd.readouterr().err


def test_the_line_to_go_on_with_has_no_password() -> None:
    """It repeats the arguments, with *** for the password, and says so."""
    url = f"postgresql://u:{SECRET}@h/my db"
    for arguments in (["--storage", url], [f"--storage={url}"]):
        line = schedule._again([*arguments, "--name", "x"])
        assert SECRET not in line and "u:***@h" in line and "--name x" in line
        assert "with its password, which is not shown" in line
    assert schedule._again(["--name", "x"]) == "bin/schedule --name x"


def test_a_password_among_the_arguments_is_warned_of(capfd: pytest.CaptureFixture[str]) -> None:
    """Every user of the machine sees it in ps; in the environment or a file they do not."""
    url = f"postgresql://u:{SECRET}@h/db"
    assert schedule.execute(["--budgets", "2M", "--device", "cpu", "--storage", url, "--dry-run"]) == 0
    assert "HEADROOM_STORAGE" in capfd.readouterr().err


def test_log_lines_have_no_password() -> None:
    """What Dask, Optuna, SQLAlchemy or we ourselves log."""
    lines: list[str] = []
    log.configure("info", lines.append)
    log.get().info("x", error=f"cannot connect to postgresql://u:{SECRET}@h/db")
    import logging

    logging.getLogger("sqlalchemy").error("lost postgresql://u:%s@h/db", SECRET)
    assert len(lines) == 2 and SECRET not in "".join(lines)


def test_a_drivers_error_has_no_password() -> None:
    """What is raised when a storage is away goes into the journal and the study's reason."""
    masking.learn(f"postgresql://u:{SECRET}@h/db")
    assert SECRET not in transactions.one_line(ValueError(f"connection of u with {SECRET} to h failed"))
    with pytest.raises(UsageError) as caught:
        transactions.check(f"postgresql+psycopg://u:{SECRET}@127.0.0.1:{free_port()}/db")
    assert SECRET not in str(caught.value)
