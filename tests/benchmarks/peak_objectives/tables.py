"""Tables and arrays: polars, pandas, matrix factorisation, simulation, images, random walks."""

from __future__ import annotations

import numpy as np
import optuna
import pandas as pd
import polars as pl
from scipy import ndimage, sparse


def frame(rows: int) -> dict[str, np.ndarray]:
    """Daily bars of some shops."""
    rng = np.random.default_rng(0)
    return {
        "shop": np.arange(rows) % 97,
        "day": np.arange(rows) // 97,
        "kind": rng.integers(0, 30, rows),
        "price": rng.gamma(2.0, 10.0, rows),
        "sold": rng.poisson(5.0, rows).astype(float),
    }


def ridge_error(x: np.ndarray, y: np.ndarray, alpha: float) -> float:
    """Validation error of a ridge regression on the first four fifths."""
    cut = len(x) * 4 // 5
    left, right = x[:cut].T @ x[:cut] + alpha * np.eye(x.shape[1]), x[:cut].T @ y[:cut]
    return float(np.mean((x[cut:] @ np.linalg.solve(left, right) - y[cut:]) ** 2))


def polars_features(trial: optuna.Trial) -> float:
    """Lags, rolling windows, a group-by joined back and perhaps one-hot columns, in polars."""
    table = pl.DataFrame(frame(trial.suggest_int("rows", 10_000, 1_500_000, log=True)))
    wide = trial.suggest_categorical("dtype", ["f32", "f64"]) == "f64"
    table = table.with_columns(pl.col("price", "sold").cast(pl.Float64 if wide else pl.Float32))
    lags = trial.suggest_int("lags", 1, 20)
    table = table.with_columns([pl.col("sold").shift(i).over("shop").alias(f"lag{i}") for i in range(1, lags + 1)])
    if trial.suggest_categorical("rolling", [True, False]):
        windows = trial.suggest_int("windows", 1, 6)
        statistic = trial.suggest_categorical("statistic", ["mean", "std"])
        table = table.with_columns(
            [
                getattr(pl.col("price"), f"rolling_{statistic}")(4 * i).over("shop").alias(f"roll{i}")
                for i in range(1, windows + 1)
            ]
        )
    keys = trial.suggest_categorical("group", ["kind", "shop,kind", "none"])
    if keys != "none":
        means = table.group_by(keys.split(",")).agg(pl.col("price").mean().alias("mean_price"))
        table = table.join(means, on=keys.split(","), how="left")
    if trial.suggest_categorical("one_hot", [False, True]):
        table = table.to_dummies("kind")
    table = table.fill_null(0.0).fill_nan(0.0)
    y = table["sold"].to_numpy()
    x = table.drop("sold", "day").to_numpy()
    return ridge_error(x, y, trial.suggest_float("alpha", 1e-3, 1e3, log=True))


def pandas_features(trial: optuna.Trial) -> float:
    """The same trade in pandas, with a merge that can multiply the rows."""
    table = pd.DataFrame(frame(trial.suggest_int("days", 100, 6_000) * 97))
    if trial.suggest_categorical("category", [True, False]):
        table["kind"] = table["kind"].astype("category")
    grouped = table.groupby("shop")["sold"]
    for lag in range(1, trial.suggest_int("lags", 0, 12) + 1):
        table[f"lag{lag}"] = grouped.shift(lag)
    span = trial.suggest_int("ewm_span", 2, 60)
    table["ewm"] = table.groupby("shop")["price"].transform(lambda part: part.ewm(span=span).mean())
    if trial.suggest_categorical("neighbours", [False, True]):
        near = trial.suggest_int("near", 1, 5)
        pairs = pd.DataFrame([(a, (a + b + 1) % 97) for a in range(97) for b in range(near)], columns=["shop", "other"])
        other = table[["shop", "day", "price"]].rename(columns={"shop": "other", "price": "other_price"})
        merged = table[["shop", "day"]].merge(pairs, on="shop").merge(other, on=["other", "day"])
        table = table.merge(merged.groupby(["shop", "day"], as_index=False)["other_price"].mean(), on=["shop", "day"])
    if trial.suggest_categorical("encode", ["dummies", "codes", "drop"]) == "dummies":
        table = pd.get_dummies(table, columns=["kind"], dtype=trial.suggest_categorical("dummy", ["bool", "float"]))
    y = table.pop("sold").to_numpy()
    x = table.drop(columns=["day"]).astype(float).fillna(0.0).to_numpy()
    return ridge_error(x, y, trial.suggest_float("alpha", 1e-3, 1e3, log=True))


def factorisation(trial: optuna.Trial) -> float:
    """Matrix factorisation by alternating least squares or gradient descent, on a dense or a sparse matrix."""
    rng = np.random.default_rng(0)
    users, items = trial.suggest_int("users", 500, 20_000, log=True), trial.suggest_int("items", 100, 2_000, log=True)
    factors = trial.suggest_int("factors", 2, 128, log=True)
    weight = trial.suggest_float("weight", 1e-3, 10, log=True)
    density = trial.suggest_categorical("density", [0.01, 0.05])
    ratings = sparse.random(users, items, density, format="csr", rng=rng)
    left, right = rng.normal(size=(users, factors)) * 0.1, rng.normal(size=(items, factors)) * 0.1
    if trial.suggest_categorical("method", ["als", "descent"]) == "als":
        for _ in range(trial.suggest_int("sweeps", 1, 4)):
            left = (ratings @ right) @ np.linalg.inv(right.T @ right + weight * np.eye(factors))
            right = (ratings.T @ left) @ np.linalg.inv(left.T @ left + weight * np.eye(factors))
    else:
        step = trial.suggest_float("step", 1e-4, 1e-2, log=True)
        for _ in range(3):
            residual = ratings.toarray() - left @ right.T
            left, right = left + step * residual @ right, right + step * residual.T @ left
    return float(np.abs(ratings[:200].toarray() - left[:200] @ right.T).mean())


def monte_carlo(trial: optuna.Trial) -> float:
    """A priced option: paths times steps, all at once or in blocks, with or without their mirror images."""
    rng = np.random.default_rng(trial.number)
    paths = trial.suggest_int("paths", 1_000, 300_000, log=True)
    steps = trial.suggest_int("steps", 4, 120)
    mirrored = trial.suggest_categorical("antithetic", [False, True])
    blocks = trial.suggest_categorical("block", ["none", "10000", "50000"])
    kind = trial.suggest_categorical("payoff", ["european", "asian", "barrier"])
    level = trial.suggest_float("barrier", 0.6, 0.95) if kind == "barrier" else 0.0
    paths = min(paths, 12_000_000 // steps)
    found = []
    for start in range(0, paths, paths if blocks == "none" else int(blocks)):
        count = min(paths - start, paths if blocks == "none" else int(blocks))
        noise = rng.normal(size=(count, steps))
        if mirrored:
            noise = np.concatenate([noise, -noise])
        prices = np.exp(np.cumsum(noise * 0.2 / steps**0.5 - 0.02 / steps, axis=1))
        last = prices.mean(axis=1) if kind == "asian" else prices[:, -1]
        alive = prices.min(axis=1) > level if kind == "barrier" else True
        found.append(np.maximum(last - 1, 0) * alive)
    payoffs = np.concatenate(found)
    return float(payoffs.std() / len(payoffs) ** 0.5 + steps * 1e-6)


def images(trial: optuna.Trial) -> float:
    """Augment a stack of images, pull features out of them, and separate two classes."""
    rng = np.random.default_rng(0)
    count, side = trial.suggest_int("count", 20, 400, log=True), trial.suggest_categorical("side", [48, 96, 160])
    stack = rng.random((count, side, side), dtype=np.float32)
    stack[::2] = ndimage.gaussian_filter(stack[::2], (0, 1, 1))
    if trial.suggest_categorical("zoomed", [False, True]):
        factor = trial.suggest_float("zoom", 0.5, 2.0)
        stack = ndimage.zoom(stack, (1, factor, factor), order=1)
    for _ in range(trial.suggest_int("copies", 0, 3)):
        stack = np.concatenate([stack, stack[:count, :, ::-1]])
    features = trial.suggest_categorical("features", ["gradient", "spectrum", "patches"])
    if features == "gradient":
        order = trial.suggest_int("sigma", 1, 4)
        found = ndimage.gaussian_gradient_magnitude(stack, (0.1, order, order)).reshape(len(stack), -1)
    elif features == "spectrum":
        found = np.abs(np.fft.rfft2(stack)).reshape(len(stack), -1)
    else:
        size = trial.suggest_categorical("patch", [4, 8])
        windows = np.lib.stride_tricks.sliding_window_view(stack, (size, size), axis=(1, 2))[:, ::4, ::4]
        found = windows.reshape(len(stack), -1) - stack.mean(axis=(1, 2))[:, None]
    labels = (np.arange(len(found)) % count) % 2
    means = np.stack([found[labels == label].mean(axis=0) for label in (0, 1)])
    errors = np.stack([((found - each) ** 2).mean(axis=1) for each in means])
    return float((errors.argmin(axis=0) == labels).mean() - 1e-7 * trial.suggest_float("penalty", 0, 1) * count)


def walks(trial: optuna.Trial) -> float:
    """Random walks over a graph, counted in a dictionary or in arrays, then an embedding of the counts."""
    rng = np.random.default_rng(0)
    nodes = trial.suggest_int("nodes", 500, 20_000, log=True)
    degree = trial.suggest_int("degree", 2, 20)
    edges = rng.integers(0, nodes, (nodes, degree))
    length = trial.suggest_int("length", 4, 40)
    repeats = trial.suggest_int("repeats", 1, 10)
    window = trial.suggest_int("window", 1, 5)
    at = np.tile(np.arange(nodes), repeats)
    path = [at]
    for _ in range(length - 1):
        at = edges[at, rng.integers(0, degree, len(at))]
        path.append(at)
    if trial.suggest_categorical("counting", ["dict", "sparse"]) == "dict":
        counts: dict[tuple[int, int], int] = {}
        for gap in range(1, window + 1):
            for i in range(0, length - gap, 4):
                for pair in zip(path[i].tolist(), path[i + gap].tolist(), strict=True):
                    counts[pair] = counts.get(pair, 0) + 1
        keys = np.array(list(counts))
        matrix = sparse.csr_matrix((np.array(list(counts.values()), float), keys.T), (nodes, nodes))
    else:
        rows = np.concatenate([path[i] for gap in range(1, window + 1) for i in range(length - gap)])
        columns = np.concatenate([path[i + gap] for gap in range(1, window + 1) for i in range(length - gap)])
        matrix = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), (nodes, nodes))
    width = trial.suggest_int("dimensions", 2, 64, log=True)
    if trial.suggest_categorical("positive", [False, True]):
        matrix = matrix.maximum(sparse.csr_matrix(matrix.shape)).log1p()
    basis = matrix @ rng.normal(size=(nodes, width))
    for _ in range(2):
        basis, _ = np.linalg.qr(matrix @ (matrix.T @ basis))
    return float(np.linalg.norm(matrix.T @ basis) / np.sqrt(matrix.multiply(matrix).sum()))
