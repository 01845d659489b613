"""The studies: the only room that imports Optuna and its database."""
