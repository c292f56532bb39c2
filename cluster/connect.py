"""Which Ray cluster a job runs on."""

import os

import ray
from ray.data import DataContext


def connect() -> None:
    """Connect to the cluster that RAY_ADDRESS names (Ray's job submission sets it), else start one on this machine.

    Plain `ray.init()` would also join whatever cluster was last started here, and wait minutes for one that is gone.
    """
    # The newer reader starts 32 actors to read the footers of a few files: on two cores that takes minutes.
    DataContext.get_current().use_datasource_v2 = False
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        ray.init(address) if address else ray.init("local", include_dashboard=False)
