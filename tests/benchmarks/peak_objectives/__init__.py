"""Objectives whose peaks `make_peaks` measures: other people's kinds of work, on generated data of a fixed seed.

Names no library, so that each stream's process imports only what its own module does.
"""

from typing import Literal

# name -> (module, function, direction of the study)
OBJECTIVES: dict[str, tuple[str, str, Literal["minimize", "maximize"]]] = {
    "svc": ("classic", "svc", "maximize"),
    "clustering": ("classic", "clustering", "maximize"),
    "kernel-ridge": ("classic", "kernel_ridge", "minimize"),
    "text": ("classic", "text", "maximize"),
    "neighbours": ("classic", "neighbours", "minimize"),
    "polynomial": ("classic", "polynomial", "minimize"),
    "simple": ("classic", "simple", "maximize"),
    "hist-boosting": ("boosting", "hist_boosting", "minimize"),
    "lightgbm-rows": ("boosting", "lightgbm_rows", "minimize"),
    "xgboost": ("boosting", "xgboost_objective", "maximize"),
    "catboost": ("boosting", "catboost_objective", "minimize"),
    "cnn": ("nets", "cnn", "maximize"),
    "lstm": ("nets", "lstm", "minimize"),
    "conditional-mlp": ("nets", "conditional_mlp", "maximize"),
    "transformer": ("nets", "transformer", "minimize"),
    "autoencoder": ("nets", "autoencoder", "minimize"),
    "recommender": ("nets", "recommender", "minimize"),
    "replay": ("nets", "replay", "maximize"),
    "polars": ("tables", "polars_features", "minimize"),
    "pandas": ("tables", "pandas_features", "minimize"),
    "factorisation": ("tables", "factorisation", "minimize"),
    "monte-carlo": ("tables", "monte_carlo", "minimize"),
    "images": ("tables", "images", "maximize"),
    "walks": ("tables", "walks", "maximize"),
}
