"""Whether jobs ask for GPUs, on clusters that have some, could grow some, or never will."""

import pytest
import ray

from runtime.connect import uses_gpu


@pytest.fixture
def cluster(monkeypatch):
    def have(now: dict[str, float], at_most: dict[str, float] | None) -> None:
        monkeypatch.setattr(ray, "cluster_resources", lambda: now)
        monkeypatch.setattr(ray._private.state.state, "get_max_resources_from_cluster_config", lambda: at_most)

    return have


@pytest.mark.parametrize(
    ("now", "at_most", "gpu"),
    [
        ({"CPU": 4}, None, False),  # nothing scales
        ({"CPU": 4}, {"CPU": 64, "GPU": 0}, False),
        ({"CPU": 0}, {"CPU": 64, "GPU": 8}, True),  # scaled down to the head
        ({"GPU": 1}, None, True),
    ],
)
def test_gpus_that_are_there_or_can_come_are_used(cluster, now, at_most, gpu):
    cluster(now, at_most)
    assert uses_gpu("auto") == gpu
    assert not uses_gpu("cpu")
    if gpu:
        assert uses_gpu("cuda")
    else:
        with pytest.raises(ValueError, match="device: cuda"):
            uses_gpu("cuda")
