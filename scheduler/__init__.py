"""Headroom: a Dask-parallel batch scheduler for Optuna trials with memory-aware admission control."""

__version__ = "0.1.0"
