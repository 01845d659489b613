"""Gradient boosting by four libraries."""

from __future__ import annotations

import catboost
import lightgbm
import numpy as np
import optuna
import xgboost
from sklearn.datasets import make_classification, make_regression
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.metrics import accuracy_score, mean_squared_error
from sklearn.model_selection import train_test_split


def regression(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training and validation parts of generated data."""
    x, y = make_regression(rows, columns, n_informative=columns // 2, noise=10.0, random_state=0)
    y = y / 100 + np.sin(x[:, 0] * 3) * np.abs(x[:, 1])
    x, x_valid, y, y_valid = train_test_split(x.astype(np.float32), y, test_size=0.25, random_state=0)
    return x, x_valid, y, y_valid


def hist_boosting(trial: optuna.Trial) -> float:
    """scikit-learn's histogram boosting on a share of the rows."""
    rows = trial.suggest_categorical("rows", [5_000, 20_000, 60_000, 120_000])
    x, x_valid, y, y_valid = regression(rows, 20)
    early = trial.suggest_categorical("early_stopping", [True, False])
    model = HistGradientBoostingRegressor(
        max_iter=trial.suggest_int("max_iter", 5, 60, log=True),
        learning_rate=trial.suggest_float("learning_rate", 1e-2, 0.5, log=True),
        max_leaf_nodes=trial.suggest_int("max_leaf_nodes", 4, 512, log=True),
        max_bins=trial.suggest_int("max_bins", 16, 255),
        l2_regularization=trial.suggest_float("l2", 1e-6, 10, log=True),
        early_stopping=early,
        validation_fraction=trial.suggest_float("validation_fraction", 0.05, 0.4) if early else None,
        random_state=0,
    )
    return float(mean_squared_error(y_valid, model.fit(x, y).predict(x_valid)))


def lightgbm_rows(trial: optuna.Trial) -> float:
    """Optuna's lightgbm_simple with the rows, the columns and cross-validation among the parameters."""
    x, x_valid, y, y_valid = regression(
        trial.suggest_int("rows", 2_000, 150_000, log=True), trial.suggest_int("columns", 8, 60)
    )
    parameters = {
        "objective": "regression",
        "verbosity": -1,
        "num_threads": 1,
        "lambda_l1": trial.suggest_float("lambda_l1", 1e-8, 10.0, log=True),
        "num_leaves": trial.suggest_int("num_leaves", 2, 1024, log=True),
        "max_bin": trial.suggest_int("max_bin", 15, 1023, log=True),
        "feature_fraction": trial.suggest_float("feature_fraction", 0.4, 1.0),
        "bagging_fraction": trial.suggest_float("bagging_fraction", 0.4, 1.0),
        "bagging_freq": trial.suggest_int("bagging_freq", 0, 7),
        "force_col_wise": trial.suggest_categorical("col_wise", [True, False]),
    }
    parameters["force_row_wise"] = not parameters["force_col_wise"]
    model = lightgbm.train(parameters, lightgbm.Dataset(x, y), trial.suggest_int("rounds", 3, 30, log=True))
    return float(mean_squared_error(y_valid, model.predict(x_valid)))


def xgboost_objective(trial: optuna.Trial) -> float:
    """Optuna's xgboost_simple with its nested branches, on more rows."""
    x, y = make_classification(30_000, 30, n_informative=12, random_state=0)
    x, x_valid, y, y_valid = train_test_split(x.astype(np.float32), y, test_size=0.25, random_state=0)
    parameters = {
        "verbosity": 0,
        "nthread": 1,
        "objective": "binary:logistic",
        "booster": trial.suggest_categorical("booster", ["gbtree", "gblinear", "dart"]),
        "lambda": trial.suggest_float("lambda", 1e-8, 1.0, log=True),
        "alpha": trial.suggest_float("alpha", 1e-8, 1.0, log=True),
    }
    if parameters["booster"] != "gblinear":
        parameters["tree_method"] = trial.suggest_categorical("tree_method", ["exact", "hist", "approx"])
        parameters["max_depth"] = trial.suggest_int("max_depth", 1, 12)
        parameters["eta"] = trial.suggest_float("eta", 1e-8, 1.0, log=True)
        parameters["subsample"] = trial.suggest_float("subsample", 0.2, 1.0)
        if parameters["tree_method"] != "exact":
            parameters["max_bin"] = trial.suggest_int("max_bin", 8, 2048, log=True)
            parameters["grow_policy"] = trial.suggest_categorical("grow_policy", ["depthwise", "lossguide"])
    if parameters["booster"] == "dart":
        parameters["rate_drop"] = trial.suggest_float("rate_drop", 1e-8, 1.0, log=True)
    rounds = trial.suggest_int("rounds", 2, 25)
    train = xgboost.DMatrix(x, y)
    model = xgboost.train(parameters, train, rounds)
    return float(accuracy_score(y_valid, model.predict(xgboost.DMatrix(x_valid)) > 0.5))


def catboost_objective(trial: optuna.Trial) -> float:
    """Optuna's catboost_simple on numbers and categories."""
    rows = trial.suggest_int("rows", 1_000, 40_000, log=True)
    x, x_valid, y, y_valid = regression(rows, 24)
    parameters = {
        "iterations": trial.suggest_int("iterations", 5, 60),
        "depth": trial.suggest_int("depth", 1, 10),
        "border_count": trial.suggest_int("border_count", 8, 255),
        "boosting_type": trial.suggest_categorical("boosting_type", ["Ordered", "Plain"]),
        "bootstrap_type": trial.suggest_categorical("bootstrap_type", ["Bayesian", "Bernoulli", "MVS"]),
        "colsample_bylevel": trial.suggest_float("colsample_bylevel", 0.05, 1.0),
    }
    if parameters["bootstrap_type"] == "Bayesian":
        parameters["bagging_temperature"] = trial.suggest_float("bagging_temperature", 0, 10)
    elif parameters["bootstrap_type"] == "Bernoulli":
        parameters["subsample"] = trial.suggest_float("subsample", 0.1, 1)
    model = catboost.CatBoostRegressor(
        **parameters, thread_count=1, verbose=False, allow_writing_files=False, random_seed=0
    )
    return float(mean_squared_error(y_valid, model.fit(x, y).predict(x_valid)))
