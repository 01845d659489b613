"""Reading a file of daily bars and saying precisely what is wrong with it.

Covers CSV (also gzipped) and Parquet, column names, dates, and every check of the raw values. Knows nothing of
features.

Numbers go straight into one array, 8 bytes a cell, since what is held while a file is read is part of a trial's peak.
Of 50,000 rows x 100 columns (38 MiB as numbers), read in a trial process, the peak rose by: cells as Python strings 469
MiB; pandas 262, 66 of them for importing it; pyarrow 169 with its blocks read one by one; numpy.loadtxt 42 to 48, and
numpy is there already. So CSV is NumPy's; Parquet is pyarrow's, without the pandas that its `to_numpy` imports.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import gzip
import io
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
SAMPLE_FILE = Path(__file__).parent / "sample" / "sp500.csv.gz"
LOOKED_AT_FIRST = 50  # rows that tell which columns hold numbers
BLOCK_CHARS = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Checked daily bars: dates (datetime64[D], increasing), float64 columns, and the names beyond OHLCV.

    width: how many columns the file has, those that are no feature included.
    """

    source: str
    dates: np.ndarray
    columns: dict[str, np.ndarray]
    width: int
    further: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.dates)


@dataclass(slots=True, kw_only=True)
class Cells:
    """A column that is looked at cell by cell: the dates, text, and numbers that are not all written plainly.

    wanted: keep the cells themselves. numbers: how many there were. wrong: the first that is none, with its row.
    """

    wanted: bool = False
    kept: list[object] = field(default_factory=list)
    rows: int = 0
    numbers: int = 0
    wrong: tuple[int, object] | None = None

    def take(self, cell: object) -> float:
        """Return the cell as a number, NaN for one that is empty or none."""
        cell = cell.strip() if isinstance(cell, str) else cell
        if self.wanted:
            self.kept.append(cell)
            return math.nan
        value = _number(cell)
        if value is None and self.wrong is None:
            self.wrong = (self.rows, cell)
        self.rows += 1
        self.numbers += value is not None and not math.isnan(value)
        return math.nan if value is None else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """A file as it was read. names: in lower case. values: float64 (rows, columns). cells: of those columns that were
    looked at cell by cell, among them the one of the dates."""

    names: Sequence[str]
    date_column: int
    values: np.ndarray
    cells: dict[int, Cells]


def read(path: str | None) -> Table:
    """Read and check a file; None is the built-in sample. Raises TrainingInputError."""
    if path is None:
        return _checked(SAMPLE, _read_csv(SAMPLE_FILE, SAMPLE))
    file = Path(path)
    if file.is_dir():
        raise TrainingInputError(f"data file {path}: is a directory: name a CSV or Parquet file")
    try:
        return _checked(str(path), (_read_parquet if is_parquet(path) else _read_csv)(file, str(path)))
    except OSError as error:
        reason = error.strerror or str(error)
        raise TrainingInputError(f"data file {path}: cannot be read: {reason}: check the path") from error
    except (UnicodeDecodeError, csv.Error, EOFError) as error:
        raise TrainingInputError(f"data file {path}: not a CSV file ({error}): save it as UTF-8 CSV") from error


def is_parquet(path: str) -> bool:
    """Whether a file of this name is read as Parquet."""
    return Path(path).suffix.lower() in {".parquet", ".pq"}


def _header(source: str, names: Sequence[str]) -> tuple[list[str], int]:
    """Return the names in lower case and the column of the dates."""
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
    date_name = next((name for name in DATE_NAMES if name in lowered), None)
    if date_name is None:
        raise TrainingInputError(f"data file {source}: no date column: seen {', '.join(names)}; name it Date")
    return lowered, lowered.index(date_name)


# -- CSV ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _text(file: Path) -> Iterator[io.TextIOWrapper]:
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(file.open("rb"))
        is_packed = opened.peek(2)[:2] == b"\x1f\x8b"
        raw = stack.enter_context(gzip.open(opened)) if is_packed else opened
        yield stack.enter_context(io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""))


def _read_csv(file: Path, source: str) -> Raw:
    with _text(file) as text:
        header_line = text.readline()
        if not header_line.strip():
            raise TrainingInputError(f"data file {source}: is empty: it needs a header line with {', '.join(OHLCV)}")
        delimiter = max(",;\t", key=header_line.count)
        written = next(csv.reader([header_line], delimiter=delimiter))
        names, date_column = _header(source, written)
        first = list(itertools.islice(filter(None, csv.reader(text, delimiter=delimiter)), LOOKED_AT_FIRST))
    if not first:
        raise TrainingInputError(f"data file {source}: has a header but no rows: give daily bars")
    # Columns without a number in the first rows are text, or start late: they are looked at cell by cell.
    plain = {i for i in range(len(names)) if any(i < len(row) and _is_plain(row[i]) for row in first)}
    cells = {i: Cells(wanted=i == date_column) for i in range(len(names)) if i not in plain or i == date_column}
    try:
        values = _parse(file, delimiter, cells)
    except UnicodeDecodeError:
        raise
    except ValueError:  # a line with too many or too few fields, or a cell that is no number, maybe an empty one
        _check_fields(file, source, delimiter, len(names))
        cells = {i: Cells(wanted=i == date_column) for i in range(len(names))}
        try:
            values = _parse(file, delimiter, cells)
        except ValueError as error:
            raise csv.Error(str(error)) from error
    if values.shape[1] != len(names):
        _check_fields(file, source, delimiter, len(names))
    return Raw(names=names, date_column=date_column, values=values, cells=cells)


def _is_plain(cell: str) -> bool:
    """Whether NumPy reads this as a number."""
    try:
        return math.isfinite(float(cell)) and "_" not in cell
    except ValueError:
        return False


def _parse(file: Path, delimiter: str, cells: dict[int, Cells]) -> np.ndarray:
    import numpy as np

    converters: dict[int | str, Callable[[str], Any]] = {column: each.take for column, each in cells.items()}
    with _text(file) as text:
        lines = 1 + sum(map(_line_ends, iter(lambda: text.read(BLOCK_CHARS), "")))
    with _text(file) as text, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that an empty line is no row
        text.readline()
        # With the number of rows an array of that size is filled; without it grows, to half as much again.
        return np.loadtxt(
            text,
            dtype=np.float64,
            delimiter=delimiter,
            comments=None,
            quotechar='"',
            converters=converters,
            ndmin=2,
            max_rows=lines,
        )


def _line_ends(block: str) -> int:
    """At least so many: a line of a Windows file that is cut between its two characters counts twice."""
    return block.count("\n") + block.count("\r") - block.count("\r\n")


def _check_fields(file: Path, source: str, delimiter: str, wanted: int) -> None:
    with _text(file) as text:
        text.readline()
        for number, row in enumerate(csv.reader(text, delimiter=delimiter), start=2):
            if row and len(row) != wanted:
                raise TrainingInputError(
                    f"data file {source}: line {number} has {len(row)} fields, the header {wanted}: fix the line"
                )


# -- Parquet --------------------------------------------------------------------------------------------------------


def _read_parquet(file: Path, source: str) -> Raw:
    import numpy as np

    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise TrainingInputError(f"data file {source}: Parquet needs pyarrow: install it, or save as CSV") from None
    usual_pool = pyarrow.default_memory_pool()
    try:
        # What it gives back is the trial's to use again: pyarrow's own pool keeps it, up to 16 MiB here.
        pyarrow.set_memory_pool(pyarrow.system_memory_pool())
        with parquet.ParquetFile(file) as opened:
            names, date_column = _header(source, opened.schema_arrow.names)
            values = np.empty((opened.metadata.num_rows, len(names)))
            cells: dict[int, Cells] = {date_column: Cells(wanted=True)}
            row = 0
            for group in range(opened.num_row_groups):
                # One column after another: all of a group at once took 190 MiB more for 50,000 rows x 100 columns.
                for i, name in enumerate(opened.schema_arrow.names):
                    read = opened.read_row_group(group, columns=[name], use_threads=False)
                    end = row
                    for chunk in read.column(0).chunks:
                        start, end = end, end + len(chunk)
                        if i in cells or not _is_array(chunk):
                            seen = cells.setdefault(i, Cells(rows=start, numbers=start))
                            values[start:end, i] = [seen.take(cell) for cell in _as_python(chunk)]
                        else:
                            values[start:end, i] = np.from_dlpack(chunk)
                row = end
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise TrainingInputError(f"data file {source}: not a Parquet file ({reason})") from error
    finally:
        pyarrow.set_memory_pool(usual_pool)
    if not len(values):
        raise TrainingInputError(f"data file {source}: has a header but no rows: give daily bars")
    return Raw(names=names, date_column=date_column, values=values, cells=cells)


def _is_array(column: Any) -> bool:
    """Whether its buffer is an array of numbers as it is. pyarrow's own `to_numpy` would import pandas."""
    import pyarrow.types as types

    return bool(column.null_count == 0 and (types.is_integer(column.type) or types.is_floating(column.type)))


def _as_python(column: Any) -> Iterable[object]:
    """Return the cells; times without the nanoseconds for which pyarrow would import pandas."""
    import pyarrow

    if pyarrow.types.is_timestamp(column.type):
        column = column.cast(pyarrow.timestamp("us", column.type.tz), safe=False)
    cells: list[object] = column.to_pylist()
    return cells


# -- what is in it --------------------------------------------------------------------------------------------------


def _checked(source: str, raw: Raw) -> Table:
    import numpy as np

    days = _dates(source, raw.cells[raw.date_column].kept)
    found = {name: np.ascontiguousarray(_column(source, raw, raw.names.index(name))) for name in OHLCV}
    for i, name in enumerate(raw.names):
        if name not in found and name not in LEAKING and i != raw.date_column and _has_numbers(raw, i):
            found[name] = _column(source, raw, i)
    table = Table(
        source=source if source == SAMPLE else f"data file {source}",
        dates=np.array(days, dtype="datetime64[D]"),
        columns=found,
        width=len(raw.names),
        further=tuple(name for name in found if name not in OHLCV),
    )
    _check_values(table)
    return table


def _has_numbers(raw: Raw, i: int) -> bool:
    """Whether any cell is a number: a further column of text (a ticker) is no feature and is left out."""
    import numpy as np

    return raw.cells[i].numbers > 0 if i in raw.cells else not np.isnan(raw.values[:, i]).all()


def _column(source: str, raw: Raw, i: int) -> np.ndarray:
    """Return a column of numbers. Raises TrainingInputError for the first cell that is none."""
    if (seen := raw.cells.get(i)) is not None and seen.wrong is not None:
        row, cell = seen.wrong
        raise TrainingInputError(
            f"data file {source}: column {raw.names[i]}, row {row + 2}: {cell!r} is not a number: fix the cell"
        )
    return raw.values[:, i]


def _iso_date(text: str) -> date:
    return datetime.fromisoformat(text).date()


def _date(form: str, text: str) -> date:
    return datetime.strptime(text, form).date()  # noqa: DTZ007 - a day of an exchange, wherever that is


def _dates(source: str, cells: Sequence[object]) -> list[date]:
    """Parse the date column with the one format that all its rows have."""
    dates = [cell.date() if isinstance(cell, datetime) else cell for cell in cells if isinstance(cell, date)]
    if len(dates) == len(cells):
        return dates
    texts = [str(cell) for cell in cells]
    attempts: list[Callable[[str], date]] = [_iso_date, *(functools.partial(_date, form) for form in DATE_FORMATS)]
    furthest = 0
    for parse in attempts:
        days: list[date] = []
        try:
            for text in texts:
                days.append(parse(text))  # noqa: PERF401 - how many were read is told
            return days
        except ValueError:
            furthest = max(furthest, len(days))
    raise TrainingInputError(
        f"data file {source}: row {furthest + 2} has no readable date: {texts[furthest]!r}; write YYYY-MM-DD"
    )


def _number(cell: object) -> float | None:
    """Return the cell as a float, NaN when it is empty, None when it is no number."""
    if cell is None or (isinstance(cell, str) and cell.lower() in MISSING):
        return math.nan
    if isinstance(cell, (date, bytes)):
        return None
    try:
        return float(cell)  # type: ignore[arg-type]  # what it refuses is the answer
    except (TypeError, ValueError):
        return None


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
    complain(np.any(prices <= 0, axis=0), "prices of 0 or less", "remove or fill those rows")
    complain(values["high"] < values["low"], "a high below the low", "check the columns' order")
    complain(values["volume"] < 0, "a negative volume", "remove or fill those rows")
