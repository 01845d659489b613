"""Data: nothing of the future leaks, labels and features are what they say, and bad files are explained."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from training import data, hpo, runtime, table
from training.errors import TrainingInputError

ROOT = Path(__file__).resolve().parents[2]
HEADER = "Date,Open,High,Low,Close,Volume"
OHLCV_WRITTEN = HEADER.split(",")[1:]


def make_rows(n: int = 420, seed: int = 0) -> list[list[str]]:
    """Rows of a made-up random walk over business days, as text."""
    random = np.random.default_rng(seed)
    days = np.busday_offset(np.datetime64("2010-01-04"), np.arange(n))
    close = 100 * np.exp(np.cumsum(random.normal(0, 0.01, n)))
    spread = 1 + random.uniform(0.001, 0.01, (2, n))
    return [
        [str(day), f"{c:.4f}", f"{c * up:.4f}", f"{c / down:.4f}", f"{c:.4f}", str(1000 + i % 7)]
        for i, (day, c, up, down) in enumerate(zip(days, close, *spread, strict=True))
    ]


def write(path: Path, rows: list[list[str]], header: str = HEADER) -> str:
    """Write a CSV file; returns its path as text."""
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    return str(path)


# -- nothing leaks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [300, 333, 401])
def test_features_and_labels_know_no_future(tmp_path: Path, cut: int) -> None:
    """Whatever happens after a day changes no indicator up to that day, and no label whose horizon ended by then."""
    rows, other = make_rows(), make_rows(seed=1)
    changed = rows[:cut] + [[day, *values] for (day, *_), (_, *values) in zip(rows[cut:], other[cut:], strict=True)]
    tables = [table.read(write(tmp_path / f"{i}.csv", lines)) for i, lines in enumerate((rows, changed))]
    ours, theirs = (data.indicators(t) for t in tables)
    for name in data.INDICATORS:
        np.testing.assert_array_equal(ours[name][:cut], theirs[name][:cut], err_msg=name)
        assert not np.array_equal(ours[name][cut:], theirs[name][cut:]), f"{name} does not depend on the data at all"
    for horizon in (1, 3, 5):
        mine, other_labels = (data.rise_labels(t.columns["high"], t.columns["close"], horizon) for t in tables)
        np.testing.assert_array_equal(mine[: cut - horizon], other_labels[: cut - horizon])


def test_normalisation_knows_training_days_only(tmp_path: Path) -> None:
    """Other days behind the training part change neither its features nor its labels."""
    rows = make_rows(800)
    known = data.load(write(tmp_path / "a.csv", rows), 3)
    cut = known.train.last + 3  # the last training label looks three days ahead
    other = make_rows(800, seed=2)
    changed = rows[:cut] + [[day, *values] for (day, *_), (_, *values) in zip(rows[cut:], other[cut:], strict=True)]
    again = data.load(write(tmp_path / "b.csv", changed), 3)
    assert again.train == known.train
    np.testing.assert_array_equal(again.features[: known.train.last], known.features[: known.train.last])
    np.testing.assert_array_equal(again.labels[: known.train.last], known.labels[: known.train.last])


@pytest.mark.parametrize("horizon", [1, 3, 5])
def test_parts_are_apart(horizon: int) -> None:
    """Parts follow each other in time, and no label of one looks into a window end of the next."""
    dataset = data.load(None, horizon)
    for earlier, later in ((dataset.train, dataset.validation), (dataset.validation, dataset.held_out)):
        last_day_seen_by_a_label = earlier.last - 1 + horizon
        assert last_day_seen_by_a_label < later.first
    assert dataset.held_out.last == len(dataset.labels) - horizon
    sizes = [len(part) for part in (dataset.train, dataset.validation, dataset.held_out)]
    assert sizes[0] > 3 * sizes[1] > 1000 and sizes[2] > 500


def test_weekly_values_come_from_finished_weeks() -> None:
    """A day has the value of the last week that ended before it: its own week is not used, nor known to be over."""
    days = np.array(["2024-01-04", "2024-01-05", "2024-01-08", "2024-01-12", "2024-01-15"], dtype="datetime64[D]")
    found = data.weekly(days, np.arange(5.0), lambda week: week)
    np.testing.assert_array_equal(found, [np.nan, np.nan, 1.0, 1.0, 3.0])


# -- what the numbers are -------------------------------------------------------------------------------------------


def test_labels_by_hand() -> None:
    """1 where the highest of the next h highs is at least 1 % above the close."""
    close = np.array([100.0, 100.0, 100.0, 100.0, 100.0])
    high = np.array([105.0, 100.5, 101.0, 100.0, 102.0])
    np.testing.assert_array_equal(data.rise_labels(high, close, 1), [0, 1, 0, 1, 0])
    np.testing.assert_array_equal(data.rise_labels(high, close, 3), [1, 1, 0, 0, 0])


def test_sample_is_the_sp500() -> None:
    """The built-in sample is real: 5,031 days of 25 features, 1999 to 2018, adjusted closes left out."""
    facts = data.check(None)
    assert (facts.rows, facts.columns, facts.n_features) == (5031, 7, 25)
    assert (facts.first, facts.last) == ("1999-01-04", "2018-12-31")
    assert data.load(None).names == (*table.OHLCV, *data.INDICATORS)


def test_training_features_are_normalised() -> None:
    """Training days have mean 0 and deviation 1, everything is finite float32."""
    dataset = data.load(None)
    assert dataset.features.dtype == np.float32 and np.isfinite(dataset.features).all()
    known = dataset.features[data.WARM_UP_ROWS : dataset.train.last].astype(float)
    np.testing.assert_allclose(known.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(known.std(axis=0), 1, atol=1e-4)


def test_windows_end_on_their_label_day() -> None:
    """Window i of a part is the 60 days that end on the day of label i; no copy is made."""
    dataset = data.load(None)
    x, y = hpo.samples(dataset, dataset.validation, "cpu")
    assert x.shape == (len(dataset.validation), 60, 25) and y.shape == (len(dataset.validation),)
    row = dataset.validation.first + 7
    np.testing.assert_array_equal(x[7].numpy(), dataset.features[row - 59 : row + 1])
    assert y[7] == dataset.labels[row]
    assert x.untyped_storage().nbytes() < 2 * dataset.features.nbytes


def test_vwap_and_percent_b_survive_quiet_days(tmp_path: Path) -> None:
    """Without volume the plain mean stands in; with bands of no width the price is in their middle."""
    rows = make_rows()
    for row in rows[250:280]:
        row[1:] = ["100", "100", "100", "100", "0"]
    found = data.indicators(table.read(write(tmp_path / "a.csv", rows)))
    assert found["vwap_20"][275] == 100.0 and found["bb_percent_b"][275] == 0.5
    data.load(str(tmp_path / "a.csv"))


def test_check_imports_neither_torch_nor_pandas() -> None:
    """The driver checks data: that must not cost it 300 MiB."""
    code = (
        "import sys; from training import data, hpo; data.check(None); "
        "print({'torch', 'pandas', 'talib'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# -- files that are fine --------------------------------------------------------------------------------------------


def test_other_spellings_are_read(tmp_path: Path) -> None:
    """Semicolons, a BOM, gzip, lower-case names, day-first dates, other orders: the same table."""
    rows = make_rows()
    plain = table.read(write(tmp_path / "plain.csv", rows))
    lines = [";".join([v, c, low, h, o, "/".join(reversed(d.split("-")))]) for d, o, h, low, c, v in rows]
    text = "\ufeff" + "\n".join(["volume;close;low;high;open;DATE", *lines])
    (tmp_path / "other.csv.gz").write_bytes(gzip.compress(text.encode()))
    other = table.read(str(tmp_path / "other.csv.gz"))
    np.testing.assert_array_equal(plain.dates, other.dates)
    for name in table.OHLCV:
        np.testing.assert_array_equal(plain.columns[name], other.columns[name])


@pytest.mark.parametrize("ends", ["\r\n", "\r", "\n\r\n", "\n\n"])
def test_other_line_ends_lose_no_row(tmp_path: Path, ends: str) -> None:
    """Windows, old Macs, mixtures, empty lines between: every row is read."""
    rows = make_rows()
    plain = table.read(write(tmp_path / "plain.csv", rows))
    text = ends.join([HEADER, *(",".join(row) for row in rows)])
    (tmp_path / "other.csv").write_bytes(text.encode())
    other = table.read(str(tmp_path / "other.csv"))
    np.testing.assert_array_equal(plain.dates, other.dates)
    np.testing.assert_array_equal(plain.columns["volume"], other.columns["volume"])


def test_further_columns(tmp_path: Path) -> None:
    """Numeric columns become features, text is left out, an adjusted close is left out because it knows the future."""
    rows = [[*row, str(i), "SPX", row[4]] for i, row in enumerate(make_rows())]
    path = write(tmp_path / "a.csv", rows, HEADER + ",Breadth,Ticker,Adj Close")
    assert data.check(path).n_features == 26
    dataset = data.load(path)
    assert dataset.names[-1] == "breadth" and dataset.features.shape[1] == 26


def test_parquet(tmp_path: Path) -> None:
    """A Parquet file gives the same table as the CSV."""
    import pyarrow.csv
    import pyarrow.parquet

    path = write(tmp_path / "a.csv", make_rows())
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(path), tmp_path / "a.parquet")
    ours, theirs = table.read(path), table.read(str(tmp_path / "a.parquet"))
    np.testing.assert_array_equal(ours.dates, theirs.dates)
    np.testing.assert_array_equal(ours.columns["close"], theirs.columns["close"])


def test_parquet_as_others_write_it(tmp_path: Path) -> None:
    """Nanoseconds, whole numbers, numbers as text, several row groups, text and empty columns: without pandas."""
    import pyarrow as pa
    import pyarrow.parquet

    rows = make_rows()
    columns = dict(zip(HEADER.split(","), map(list, zip(*rows, strict=True)), strict=True))
    columns = {
        name: columns[name] if name == "Open" else [float(v) for v in columns[name]] for name in OHLCV_WRITTEN
    } | {
        "Date": pa.array(np.array([row[0] for row in rows], dtype="datetime64[ns]")),
        "Count": pa.array(range(len(rows)), pa.int64()),
        "Ticker": ["SPX"] * len(rows),
        "Nothing": pa.nulls(len(rows)),
    }
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=100)
    code = (
        "import sys; from training import table; t = table.read(sys.argv[1]); "
        "print(t.further, t.width, len(t), t.columns['open'][419], t.dates[-1], 'pandas' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.parquet")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"('count',) 9 420 {float(rows[-1][1])} {rows[-1][0]} False"


def test_parquet_with_a_gap_is_explained(tmp_path: Path) -> None:
    """A null among numbers is a missing value, on its day."""
    import pyarrow.csv
    import pyarrow.parquet

    rows = make_rows()
    rows[110][4] = ""
    path = write(tmp_path / "a.csv", rows)
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(path), tmp_path / "a.parquet", row_group_size=100)
    with pytest.raises(TrainingInputError, match=r"NaN or infinite values in 1 of 420 rows: 2010-06-07 \(row 112\)"):
        table.read(str(tmp_path / "a.parquet"))


def test_odd_cells_are_read_cell_by_cell(tmp_path: Path) -> None:
    """Quotes, blanks around numbers, Python's underscores, a column of blanks: a number is a number."""
    rows = [[*row, ""] for row in make_rows()]
    plain = table.read(write(tmp_path / "plain.csv", rows, HEADER + ",Empty"))
    rows[100][1] = f'" {rows[100][1]} "'
    rows[200][5] = rows[200][5][:1] + "_" + rows[200][5][1:]
    odd = table.read(write(tmp_path / "odd.csv", rows, HEADER + ",Empty"))
    assert plain.further == odd.further == ()
    for name in table.OHLCV:
        np.testing.assert_array_equal(plain.columns[name], odd.columns[name])


def test_a_text_column_may_not_turn_into_numbers(tmp_path: Path) -> None:
    """A column that has numbers only far down is one of numbers, and its first text is what is wrong."""
    rows = [[*row, "SPX"] for row in make_rows()]
    rows[300][6] = "7"
    with pytest.raises(TrainingInputError, match="column ticker, row 2: 'SPX' is not a number"):
        data.check(write(tmp_path / "a.csv", rows, HEADER + ",Ticker"))


def test_features_are_those_of_all_columns_at_once(tmp_path: Path) -> None:
    """Normalising a few columns at a time gives the same bits as all of them in one array."""
    further = (np.random.default_rng(0).normal(size=(900, 4)) * [1.0, 1e-6, 1e9, 1.0]).tolist()
    rows = [[*row, *map(repr, more)] for row, more in zip(make_rows(900), further, strict=True)]
    for path in (None, write(tmp_path / "a.csv", rows, HEADER + ",a,b,c,d")):
        dataset, read = data.load(path, 3), table.read(path)
        columns = {name: read.columns[name] for name in table.OHLCV} | data.indicators(read)
        raw = np.stack([*columns.values(), *(read.columns[name] for name in read.further)], axis=1)
        first, last = data.WARM_UP_ROWS, dataset.train.last
        mean, std = raw[first:last].mean(axis=0), raw[first:last].std(axis=0)
        raw = (raw - mean) / std
        raw[:first] = 0.0
        np.testing.assert_array_equal(dataset.features, raw.astype(np.float32))


@pytest.mark.skipif(runtime.allocator({}) != runtime.STACK, reason="reads /proc, under the heap that trials get")
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_large_file_is_held_as_numbers_only(tmp_path: Path, kind: str) -> None:
    """What loading adds to the peak is three times the numbers at most; as Python strings they took twelve times."""
    import pyarrow.csv
    import pyarrow.parquet

    rows = make_rows(12_000)
    path = write(
        tmp_path / "a.csv", [[*row, *[row[1]] * 60] for row in rows], HEADER + "".join(f",x{i}" for i in range(60))
    )
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.csv.read_csv(path), path := str(tmp_path / "a.parquet"))
    code = (
        "import sys, pyarrow.parquet; from training import data, memory; data.load(None)\n"
        "before = memory.peak_bytes(); data.load(sys.argv[1]); print(memory.peak_bytes() - before)"
    )
    variables = {name: value for name, value in runtime.environment({}).items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    numbers = 12_000 * 66 * 8
    assert 0.5 * numbers < int(done.stdout) < 3 * numbers + (20 * 2**20 if kind == "parquet" else 0)


# -- files that are not ---------------------------------------------------------------------------------------------


def damaged(kind: str) -> tuple[list[list[str]], str]:
    """Rows and header of a file with one thing wrong."""
    rows, header = make_rows(), HEADER
    match kind:
        case "short":
            rows = rows[:300]
        case "column":
            header = HEADER.replace("High", "Top")
        case "nan":
            rows[10][4] = rows[20][2] = rows[30][5] = rows[40][1] = ""
        case "text":
            rows[10][4] = "ten"
        case "unsorted":
            rows[10], rows[11] = rows[11], rows[10]
        case "duplicate":
            rows[11][0] = rows[10][0]
        case "date":
            rows[11][0] = "yesterday"
        case "fields":
            rows[11].append("7")
        case "negative":
            rows[11][3] = "-1"
        case "swapped":
            rows[11][2], rows[11][3] = rows[11][3], rows[11][2]
        case "no_date":
            header = HEADER.replace("Date", "When")
        case "twice":
            header = HEADER.replace("Open", "Close")
        case "rows":
            rows = []
    return rows, header


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", "too short: 300 rows, but 361 are needed"),
        ("column", "no column high: seen Date, Open, Top, Low, Close, Volume"),
        (
            "nan",
            "NaN or infinite values in 4 of 420 rows: 2010-01-18 (row 12), 2010-02-01 (row 22), 2010-02-15 (row 32)",
        ),
        ("text", "column close, row 12: 'ten' is not a number"),
        ("unsorted", "dates that go back in 1 of 420 rows: 2010-01-18 (row 13): sort the file"),
        ("duplicate", "the same date as the row before in 1 of 420 rows: 2010-01-18 (row 13)"),
        ("date", "row 13 has no readable date: 'yesterday'; write YYYY-MM-DD"),
        ("fields", "line 13 has 7 fields, the header 6"),
        ("negative", "prices of 0 or less in 1 of 420 rows: 2010-01-19 (row 13)"),
        ("swapped", "a high below the low in 1 of 420 rows"),
        ("no_date", "no date column: seen When"),
        ("twice", "column 'close' appears twice"),
        ("rows", "has a header but no rows"),
    ],
)
def test_bad_files(tmp_path: Path, kind: str, message: str) -> None:
    """Each bad file is one line: the file, what is wrong, the value seen, where."""
    path = write(tmp_path / "bars.csv", *damaged(kind))
    with pytest.raises(TrainingInputError) as caught:
        data.check(path)
    assert message in str(caught.value) and path in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.csv", None, "cannot be read: No such file or directory"),
        ("empty.csv", b"", "is empty"),
        ("binary.csv", bytes(range(128, 256)) * 9, "not a CSV file"),
        ("torn.csv.gz", gzip.compress(b"Date,Open\n" * 1000)[:30], "not a CSV file"),
        ("bad.parquet", b"PAR1 not really", "not a Parquet file"),
        ("folder", "mkdir", "is a directory"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes | str | None, message: str) -> None:
    """What cannot be read at all is said in one line, too."""
    path = tmp_path / name
    if content == "mkdir":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(TrainingInputError) as caught:
        data.check(str(path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_shortest_file_works(tmp_path: Path) -> None:
    """As many rows as the message asks for are enough, one less is not."""
    rows = make_rows(361)
    dataset = data.load(write(tmp_path / "a.csv", rows))
    assert min(len(dataset.train), len(dataset.validation), len(dataset.held_out)) >= 10
    with pytest.raises(TrainingInputError, match="too short: 360 rows, but 361"):
        data.load(write(tmp_path / "b.csv", rows[:-1]))


def test_longer_horizon_needs_more() -> None:
    """A horizon below a day is refused with its value."""
    with pytest.raises(TrainingInputError, match="horizon must be at least 1 day, not 0"):
        data.check(None, 0)
