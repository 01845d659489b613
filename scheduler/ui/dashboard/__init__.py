"""Headroom's page on the Dask dashboard."""
