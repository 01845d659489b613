"""Reading a file of daily bars and saying precisely what is wrong with it.

Covers CSV (also gzipped) and Parquet, column names, dates, and every check of the raw values. Knows nothing of
features. CSV is read with the standard library: importing pandas would cost every trial process 73 MiB.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import TrainingInputError

if TYPE_CHECKING:
    import numpy as np

OHLCV = ("open", "high", "low", "close", "volume")
DATE_NAMES = ("date", "datetime", "timestamp", "time", "day", "", "index", "__index_level_0__")
# An adjusted close is today's price rewritten with dividends and splits that came later: it holds the future.
LEAKING = frozenset({"adj close", "adj_close", "adjclose", "adjusted close", "adjusted_close"})
MISSING = frozenset({"", "nan", "na", "n/a", "#n/a", "null", "none", "-"})
DATE_FORMATS = ("%m/%d/%Y", "%d/%m/%Y", "%d.%m.%Y", "%Y/%m/%d", "%Y%m%d")
SAMPLE = "built-in sample"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Checked daily bars: dates (datetime64[D], increasing), float64 columns, and the names beyond OHLCV."""

    source: str
    dates: np.ndarray
    columns: dict[str, np.ndarray]
    further: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.dates)


def read(path: str | None) -> Table:
    """Read and check a file; None is the built-in sample. Raises TrainingInputError."""
    if path is None:
        return _checked(SAMPLE, *_read_csv(_sample_path(), SAMPLE))
    file = Path(path)
    if file.is_dir():
        raise TrainingInputError(f"data file {path}: is a directory: name a CSV or Parquet file")
    try:
        reader = _read_parquet if file.suffix.lower() in {".parquet", ".pq"} else _read_csv
        names, columns = reader(file, str(path))
    except OSError as error:
        reason = error.strerror or str(error)
        raise TrainingInputError(f"data file {path}: cannot be read: {reason}: check the path") from error
    except (UnicodeDecodeError, csv.Error, EOFError) as error:
        raise TrainingInputError(f"data file {path}: not a CSV file ({error}): save it as UTF-8 CSV") from error
    return _checked(str(path), names, columns)


def _sample_path() -> Path:
    # find_spec of the top package alone imports nothing; importing arch would cost 72 MiB (statsmodels, scipy).
    spec = importlib.util.find_spec("arch")
    if spec is None or spec.origin is None:
        raise TrainingInputError("the built-in sample needs the package arch: install it, or pass --data FILE")
    return Path(spec.origin).parent / "data" / "sp500" / "sp500.csv.gz"


def _read_csv(file: Path, source: str) -> tuple[list[str], list[Sequence[object]]]:
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(file.open("rb"))
        if raw.peek(2)[:2] == b"\x1f\x8b":  # type: ignore[attr-defined]
            raw = stack.enter_context(gzip.open(raw))  # type: ignore[assignment]
        text = stack.enter_context(io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""))
        header_line = text.readline()
        if not header_line.strip():
            raise TrainingInputError(f"data file {source}: is empty: it needs a header line with {', '.join(OHLCV)}")
        delimiter = max(",;\t", key=header_line.count)
        names = next(csv.reader([header_line], delimiter=delimiter))
        columns: list[list[str]] = [[] for _ in names]
        for number, row in enumerate(csv.reader(text, delimiter=delimiter), start=2):
            if not row:
                continue
            if len(row) != len(names):
                raise TrainingInputError(
                    f"data file {source}: line {number} has {len(row)} fields, the header {len(names)}: fix the line"
                )
            for column, cell in zip(columns, row, strict=True):
                column.append(cell.strip())
    return names, list(columns)


def _read_parquet(file: Path, source: str) -> tuple[list[str], list[Sequence[object]]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise TrainingInputError(f"data file {source}: Parquet needs pyarrow: install it, or save as CSV") from None
    try:
        table = parquet.read_table(file)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise TrainingInputError(f"data file {source}: not a Parquet file ({reason})") from error
    return list(table.column_names), [column.to_pylist() for column in table.columns]


def _checked(source: str, names: list[str], columns: list[Sequence[object]]) -> Table:
    import numpy as np

    lowered = [name.strip().lower() for name in names]
    twice = sorted({name for name in lowered if lowered.count(name) > 1})
    if twice:
        raise TrainingInputError(f"data file {source}: column {twice[0]!r} appears twice: rename one")
    absent = [name for name in OHLCV if name not in lowered]
    if absent:
        raise TrainingInputError(
            f"data file {source}: no column {', '.join(absent)}: seen {', '.join(names)}; "
            f"needed are a date and {', '.join(OHLCV)} (any case)"
        )
    by_name = dict(zip(lowered, columns, strict=True))
    date_name = next((name for name in DATE_NAMES if name in by_name), None)
    if date_name is None:
        raise TrainingInputError(f"data file {source}: no date column: seen {', '.join(names)}; name it Date")
    days = _dates(source, by_name.pop(date_name))
    if len(days) == 0:
        raise TrainingInputError(f"data file {source}: has a header but no rows: give daily bars")

    numbers = {name: _numbers(source, name, by_name[name]) for name in OHLCV}
    for name, cells in by_name.items():
        if name not in numbers and name not in LEAKING and _looks_numeric(cells):
            numbers[name] = _numbers(source, name, cells)
    found = {name: column for name, column in numbers.items() if column is not None}
    table = Table(
        source=source if source == SAMPLE else f"data file {source}",
        dates=np.array(days, dtype="datetime64[D]"),
        columns=found,
        further=tuple(name for name in found if name not in OHLCV),
    )
    _check_values(table)
    return table


def _dates(source: str, cells: Sequence[object]) -> list[date]:
    """Parse the date column with the one format that all its rows have."""
    if all(isinstance(cell, date) for cell in cells):
        return [cell.date() if isinstance(cell, datetime) else cell for cell in cells]  # type: ignore[misc]
    texts = [str(cell) for cell in cells]
    attempts: list[Callable[[str], date]] = [lambda text: datetime.fromisoformat(text).date()]
    attempts += [lambda text, form=form: datetime.strptime(text, form).date() for form in DATE_FORMATS]  # type: ignore[misc]
    furthest = 0
    for parse in attempts:
        days: list[date] = []
        try:
            for text in texts:
                days.append(parse(text))
            return days
        except ValueError:
            furthest = max(furthest, len(days))
    raise TrainingInputError(
        f"data file {source}: row {furthest + 2} has no readable date: {texts[furthest]!r}; write YYYY-MM-DD"
    )


def _looks_numeric(cells: Sequence[object]) -> bool:
    """Whether any cell is a number: a further column of text (a ticker) is no feature and is left out."""
    return any(_number(cell) is not None and not math.isnan(_number(cell) or 0.0) for cell in cells)


def _number(cell: object) -> float | None:
    """The cell as a float, NaN when it is empty, None when it is no number."""
    if cell is None or (isinstance(cell, str) and cell.lower() in MISSING):
        return math.nan
    if isinstance(cell, (date, bytes)):
        return None
    try:
        return float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _numbers(source: str, name: str, cells: Sequence[object]) -> np.ndarray:
    import numpy as np

    values = np.empty(len(cells))
    for row, cell in enumerate(cells):
        value = _number(cell)
        if value is None:
            raise TrainingInputError(
                f"data file {source}: column {name}, row {row + 2}: {cell!r} is not a number: fix the cell"
            )
        values[row] = value
    return values


def _check_values(table: Table) -> None:
    import numpy as np

    def complain(bad: np.ndarray, what: str, fix: str) -> None:
        if bad.any():
            rows = np.flatnonzero(bad)
            where = ", ".join(f"{table.dates[row]} (row {row + 2})" for row in rows[:3])
            more = ", ..." if len(rows) > 3 else ""
            raise TrainingInputError(
                f"{table.source}: {what} in {len(rows)} of {len(table)} rows: {where}{more}: {fix}"
            )

    values = table.columns
    missing = np.zeros(len(table), dtype=bool)
    for column in values.values():
        missing |= ~np.isfinite(column)
    complain(missing, "NaN or infinite values", "remove or fill those rows")
    steps = np.diff(table.dates).astype(np.int64)
    complain(np.append(False, steps == 0), "the same date as the row before", "remove the duplicates")
    complain(np.append(False, steps < 0), "dates that go back", "sort the file by date, oldest first")
    prices = np.stack([values[name] for name in OHLCV[:4]])
    complain((prices <= 0).any(axis=0), "prices of 0 or less", "remove or fill those rows")
    complain(values["high"] < values["low"], "a high below the low", "check the columns' order")
    complain(values["volume"] < 0, "a negative volume", "remove or fill those rows")
