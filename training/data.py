"""Daily market data: a file becomes features, windows, labels, and a split in time.

Covers reading CSV and Parquet, what is wrong with a file (one `TrainingInputError` each), the 20 indicators, labels,
the chronological split with a gap, normalisation by training statistics, and the built-in sample (S&P 500, 1999-2018,
from the package `arch`). Does not know torch: a window is a view on one float32 array.

Nothing of the future leaks: every feature of a day is computed from that day and earlier ones, weekly indicators from
finished weeks only, the statistics from training days only, and `horizon` days lie between the parts.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from training.errors import TrainingInputError
from training.table import OHLCV, Table, read

if TYPE_CHECKING:
    import numpy as np

INDICATORS = (
    *(f"dema_{n}" for n in (9, 10, 20, 25, 90)),
    *(f"sma_{n}" for n in (12, 50, 100, 200)),
    "rsi_daily",
    "rsi_weekly",
    "stochrsi_daily",
    "stochrsi_weekly",
    "macd_line",
    "obv",
    "adosc",
    "atr_14",
    "adx_14",
    "bb_percent_b",
    "vwap_20",
)
WARM_UP_ROWS = 199  # sma_200 is the last indicator to have a value; the weekly ones need 30 weeks
MIN_WINDOWS = 100  # fewer labelled days than this cannot be split into three parts that mean anything
TRAIN_PART, VALIDATION_PART = 0.70, 0.15  # the rest is held out: no trial ever sees it
COLUMNS_AT_ONCE = 4  # normalised together
RISE = 1.01  # label 1: the highest price of the next h days reaches this much of today's close


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """What a file holds, for the plan: rows, columns, features (25 + further numeric columns), first and last day."""

    rows: int
    columns: int
    n_features: int
    first: str
    last: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A run of windows: those that end on the rows first..last - 1."""

    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Features of every usable day, labels of those whose future is known, and the parts.

    features: float32 (rows, n_features), normalised: less its mean, by its std, of the training part's rows.
    labels: float32 (rows,), 0 or 1, meaningless outside the parts.
    """

    features: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    context_length: int
    train: Part
    validation: Part
    held_out: Part
    fingerprint: str = field(default="")

    @property
    def n_features(self) -> int:
        return len(self.names)


def check(path: str | None, horizon: int = 1, context_length: int = 60) -> DataFacts:
    """Validate a data file (None: the built-in sample) without torch and without computing indicators.

    Raises TrainingInputError with one line: what is wrong, the value seen, the fix.
    """
    table = read(path)
    _check_length(table, horizon, context_length, WARM_UP_ROWS)
    return DataFacts(
        rows=len(table),
        columns=table.width,
        n_features=len(OHLCV) + len(INDICATORS) + len(table.further),
        first=str(table.dates[0]),
        last=str(table.dates[-1]),
    )


def load(path: str | None, horizon: int = 1, context_length: int = 60) -> Dataset:
    """Read a file (None: the built-in sample) and make the data set of one horizon (days).

    Raises TrainingInputError.
    """

    table = read(path)
    _check_length(table, horizon, context_length, WARM_UP_ROWS)
    columns = {name: table.columns[name] for name in OHLCV} | indicators(table)
    warm = _first_complete_row(list(columns.values()), table.source)
    _check_length(table, horizon, context_length, warm)
    labels = rise_labels(table.columns["high"], table.columns["close"], horizon)
    train, validation, held_out = split(warm + context_length - 1, len(table) - horizon, horizon)
    columns |= {name: table.columns[name] for name in table.further}
    features, mean, std = _normalised(columns, warm, train.last)
    return Dataset(
        features=features,
        labels=labels,
        names=tuple(columns),
        mean=mean,
        std=std,
        context_length=context_length,
        train=train,
        validation=validation,
        held_out=held_out,
        fingerprint=f"{zlib.crc32(labels.data, zlib.crc32(features.data)):08x}",
    )


def _normalised(
    columns: Mapping[str, np.ndarray], first: int, last: int
) -> tuple[np.ndarray, tuple[float, ...], tuple[float, ...]]:
    """All columns as float32 (rows, columns), by mean and deviation of the rows first..last - 1; 0 before them.

    Returns these too.

    A few columns at a time: what is held beside the file's own numbers (8 bytes each) is the result (4), not three
    copies more. At least two at a time, because NumPy adds up a single column in another order, and so do the digits.
    """
    import numpy as np

    every = list(columns.values())
    features = np.empty((len(every[0]), len(every)), dtype=np.float32)
    means, deviations = np.empty(len(every)), np.empty(len(every))
    for start in range(0, len(every), COLUMNS_AT_ONCE):
        block = slice(max(0, min(start, len(every) - 2)), start + COLUMNS_AT_ONCE)
        raw = np.stack(every[block], axis=1)
        known = raw[first:last]
        mean, std = known.mean(axis=0), known.std(axis=0)
        std[std == 0] = 1.0  # a column that never changes says nothing; it must not become NaN
        raw -= mean
        raw /= std
        raw[:first] = 0.0
        features[:, block] = raw
        means[block], deviations[block] = mean, std
    return features, tuple(means.tolist()), tuple(deviations.tolist())


def split(first: int, last: int, horizon: int) -> tuple[Part, Part, Part]:
    """Cut the windows ending on rows first..last - 1 into training, validation and held-out parts, in this order.

    `horizon` windows are left out between two parts, so that no label of a part looks into the days of the next.
    """
    usable = last - first - 2 * horizon
    n_train, n_validation = int(usable * TRAIN_PART), int(usable * VALIDATION_PART)
    train = Part(first=first, last=first + n_train)
    validation = Part(first=train.last + horizon, last=train.last + horizon + n_validation)
    return train, validation, Part(first=validation.last + horizon, last=last)


def rise_labels(high: np.ndarray, close: np.ndarray, horizon: int) -> np.ndarray:
    """1.0 where the highest price of the next `horizon` days is at least 1 % above the day's close; float32.

    The last `horizon` rows have no complete future: 0 there, and no part reaches them.
    """
    import numpy as np
    from numpy.lib.stride_tricks import sliding_window_view

    labels = np.zeros(len(close), dtype=np.float32)
    future = sliding_window_view(high[1:], horizon).max(axis=1)
    labels[: len(future)] = future >= RISE * close[: len(future)]
    return labels


def indicators(table: Table) -> dict[str, np.ndarray]:
    """Compute the 20 indicators of each day, NaN while they warm up. Each uses that day and earlier ones only."""
    import numpy as np

    ta = indicator_library()
    high, low, close, volume = (table.columns[name] for name in ("high", "low", "close", "volume"))
    upper, _, lower = ta.BBANDS(close, timeperiod=20)
    width = upper - lower
    typical = (high + low + close) / 3.0
    found = {f"dema_{n}": ta.DEMA(close, n) for n in (9, 10, 20, 25, 90)}
    found |= {f"sma_{n}": ta.SMA(close, n) for n in (12, 50, 100, 200)}
    found |= {
        "rsi_daily": ta.RSI(close, 14),
        "rsi_weekly": weekly(table.dates, close, lambda week: ta.RSI(week, 14)),
        "stochrsi_daily": _stochrsi(ta, close),
        "stochrsi_weekly": weekly(table.dates, close, lambda week: _stochrsi(ta, week)),
        "macd_line": ta.MACD(close)[0],
        "obv": ta.OBV(close, volume),
        "adosc": ta.ADOSC(high, low, close, volume),
        "atr_14": ta.ATR(high, low, close, 14),
        "adx_14": ta.ADX(high, low, close, 14),
        # Bands of no width (20 equal closes) leave the price in the middle of them.
        "bb_percent_b": np.divide(close - lower, width, out=np.full(len(close), 0.5), where=width != 0),
        "vwap_20": _vwap(typical, volume, 20),
    }
    found["bb_percent_b"][np.isnan(width)] = np.nan
    return {name: found[name] for name in INDICATORS}


def weekly(dates: np.ndarray, close: np.ndarray, indicator: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Compute an indicator of weekly closes: for each day the value as of the last *finished* week.

    A week is finished when a day of a later one is there: on a Friday nobody knows yet whether a Saturday session
    follows, and before a holiday even Thursday may be the last day. So a day never sees the close of its own week.
    """
    import numpy as np

    week = (dates.astype("datetime64[D]").astype(np.int64) + 3) // 7  # day 0 was a Thursday; weeks start on Monday
    last_day = np.flatnonzero(np.diff(week))  # last row of each finished week
    out = np.full(len(close), np.nan)
    if len(last_day) == 0:
        return out
    values = indicator(np.ascontiguousarray(close[last_day]))
    finished = np.searchsorted(last_day, np.arange(len(close))) - 1  # index of the last week that ended before the row
    out[finished >= 0] = values[finished[finished >= 0]]
    return out


def _stochrsi(ta: Any, close: np.ndarray) -> np.ndarray:
    fast_k: np.ndarray = ta.STOCHRSI(close, timeperiod=14, fastk_period=14, fastd_period=3)[0]
    return fast_k


def _vwap(typical: np.ndarray, volume: np.ndarray, days: int) -> np.ndarray:
    import numpy as np
    from numpy.lib.stride_tricks import sliding_window_view

    out = np.full(len(typical), np.nan)
    if len(typical) < days:
        return out
    traded = sliding_window_view(volume, days).sum(axis=1)
    plain = sliding_window_view(typical, days).mean(axis=1)
    money = sliding_window_view(typical * volume, days).sum(axis=1)
    out[days - 1 :] = np.divide(money, traded, out=plain, where=traded != 0)
    return out


@functools.cache
def indicator_library() -> Any:
    """TA-Lib without pandas.

    `import talib` imports pandas when it is there, only to accept its Series: 73 MiB resident in every trial process,
    a quarter of what a small one takes. Told that there is none it does without, and we pass arrays. This copy is
    ours alone: a later `import talib` of the user's own finds pandas again.
    """
    if "talib" in sys.modules or "pandas" in sys.modules:
        return importlib.import_module("talib")
    sys.modules["pandas"] = None  # type: ignore[assignment]  # the documented way to make an import fail
    try:
        return importlib.import_module("talib")
    finally:
        del sys.modules["pandas"]
        sys.modules.pop("talib", None)


def _first_complete_row(columns: Sequence[np.ndarray], source: str) -> int:
    import numpy as np

    complete = np.ones(len(columns[0]), dtype=bool)
    for column in columns:
        complete &= np.isfinite(column)
    if not complete.any():
        return len(complete)
    first = int(complete.argmax())
    broken = np.flatnonzero(~complete[first:])
    if len(broken):
        raise TrainingInputError(
            f"{source}: an indicator is not finite on {len(broken)} rows, the first is row "
            f"{first + int(broken[0]) + 2}: check prices and volumes there"
        )
    return first


def _check_length(table: Table, horizon: int, context_length: int, warm: int) -> None:
    if horizon < 1:
        raise TrainingInputError(f"horizon must be at least 1 day, not {horizon}")
    needed = warm + context_length - 1 + MIN_WINDOWS + 3 * horizon
    if len(table) < needed:
        raise TrainingInputError(
            f"{table.source}: too short: {len(table)} rows, but {needed} are needed ({warm} until every indicator "
            f"has a value, {context_length - 1} more for the first window, {MIN_WINDOWS} windows, {3 * horizon} for "
            f"the horizon): give a longer history"
        )


def positive_rate(labels: np.ndarray) -> float:
    """Share of label 1, in 0..1; NaN for none."""
    return float(labels.mean()) if len(labels) else math.nan
