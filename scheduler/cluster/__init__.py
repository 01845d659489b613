"""Dask: the only room that imports it. A cluster of our own or an existing one, and the page on its dashboard."""
