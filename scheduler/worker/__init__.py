"""What runs on a worker, without Dask: the agent and its trial processes."""
