"""ray_cluster.yaml by Ray's own schema and preparation, and by the scheduler of its autoscaler; no cloud is asked."""

import copy
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest, ResourceRequestByCount
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR

from ip2p.recipe import REPOSITORY
from tests.cluster.test_image import final_stages, instructions, pins

Config = dict[str, Any]
SPOT = "-spot"


@pytest.fixture
def config() -> Config:
    return yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())


@pytest.fixture
def node_types(config) -> dict[str, Config]:
    return config["available_node_types"]


def test_ray_accepts_it(config):
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    # What Ray adds where something is not said must not be there: its defaults install and start another Ray.
    for commands in ("head_setup_commands", "worker_setup_commands", "head_start_ray_commands"):
        assert prepared[commands] == config.get(commands, [])


@pytest.mark.parametrize(
    "breakage",
    [
        lambda c: c.update(idle_timeout=5),
        lambda c: c.pop("provider"),
        lambda c: c.update(head_node_type="nothing"),
        lambda c: c["docker"].update(images="x"),
        lambda c: c["available_node_types"]["cpu"]["resources"].update(CPU="16"),
        lambda c: c["available_node_types"]["cpu"].pop("node_config"),
        lambda c: c["available_node_types"]["cpu"]["labels"].update(pool=1),
        lambda c: c["available_node_types"]["cpu"].update(min_workers=100),
    ],
)
def test_ray_refuses_it_broken(config, breakage):
    breakage(config)
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
        validate_config(prepare_config(config))


def test_only_the_head_is_always_there_and_runs_no_tasks(config, node_types):
    assert node_types["head"]["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]
    assert "InstanceMarketOptions" not in node_types["head"]["node_config"]
    workers = {name: node for name, node in node_types.items() if name != "head"}
    assert all(node["min_workers"] == 0 for node in workers.values())
    assert sum(node["max_workers"] for node in workers.values()) >= config["max_workers"]
    assert not config["provider"]["cache_stopped_nodes"]


def test_every_spot_machine_has_its_like_on_demand(node_types):
    pools = {"cpu", "vllm", "diffusion", "training"}
    assert set(node_types) == {"head", *pools, *(pool + SPOT for pool in pools)}
    for pool in pools:
        spot, other = copy.deepcopy(node_types[pool + SPOT]), node_types[pool]
        assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
        assert spot["node_config"] == other["node_config"]
        assert spot["resources"] == other["resources"]
        assert spot["priority"] > other["priority"]
        assert (spot["labels"], other["labels"]) == (
            {"pool": pool, "market": "spot"},
            {"pool": pool, "market": "on-demand"},
        )


def launched(
    config: Config, request: dict[str, float], count: int, gang: bool = False, **availability
) -> dict[str, int]:
    """Machines by type that Ray's autoscaler starts for `count` requests at once."""
    node_types = AutoscalingConfig(prepare_config(config), skip_content_hash=True).get_node_type_configs()
    one = ResourceRequestUtil.make(request)
    scheduling = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=node_types,
        max_num_nodes=config["max_workers"],
        resource_requests=[] if gang else [ResourceRequestByCount(request=one, count=count)],
        gang_resource_requests=[GangResourceRequest(requests=[one] * count)] if gang else [],
        **availability,
    )
    return {launch.instance_type: launch.count for launch in ResourceDemandScheduler().schedule(scheduling).to_launch}


# What the jobs ask for: a generator {GPU: 1}, an engine {GPU: 1}, an editor {CPU: 0.4, GPU: 1}, tasks {CPU: 0.25},
# a training worker {CPU: 1, GPU: 1}, all workers at once.
@pytest.mark.parametrize(
    ("request_", "count", "gang", "pool", "machines"),
    [
        ({"CPU": 0.25}, 10, False, "cpu", 1),
        ({"GPU": 1}, 1, False, "vllm", 1),
        ({"GPU": 1}, 2, False, "vllm", 2),
        ({"CPU": 0.4, "GPU": 1}, 1, False, "vllm", 1),
        ({"GPU": 1}, 8, False, "diffusion", 1),
        ({"GPU": 1}, 16, False, "diffusion", 2),
        ({"CPU": 1, "GPU": 1}, 8, True, "training", 1),
        ({"CPU": 0.4, "GPU": 1}, 8, False, "training", 1),  # not meant, and known: see the file
    ],
)
def test_jobs_get_the_machines_meant_for_them(config, request_, count, gang, pool, machines):
    assert launched(config, request_, count, gang) == {pool + SPOT: machines}
    no_spot = {name: 0.0 for name in config["available_node_types"] if name.endswith(SPOT)}
    without = launched(config, request_, count, gang, recoverable_resource_availabilities=no_spot)
    assert without == {pool: machines}


def test_training_waits_for_machines(config):
    (timeout,) = (option for option in config["docker"]["run_options"] if "RAY_TRAIN_WORKER_GROUP" in option)
    name, seconds = timeout.removeprefix("--env ").split("=")
    assert name == WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
    assert int(seconds) > 600


def test_strangers_are_kept_out(config):
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray": "~/.ray"}, "where Ray looks for auth_token"
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


def test_objects_spill_to_the_local_disk(config):
    assert "--volume /mnt/scratch/spill:/spill" in config["docker"]["run_options"]
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "--object-spilling-directory=/spill" in config[commands][-1]


def test_the_image_is_the_dockerfiles(config):
    assert config["docker"]["image"].endswith("-gpu")
    (gpu,) = (stage for stage in final_stages() if stage.name == "gpu")
    environment = " ".join(argument for name, argument in instructions(gpu) if name == "ENV")
    assert "HOME=/home/ray" in environment
    assert config["head_setup_commands"] == []
    assert "boto3" in pins("gpu"), "Ray's autoscaler on the head starts machines by it"


def test_workers_may_not_start_machines_and_metadata_wants_a_session(config):
    for name, node_type in config["available_node_types"].items():
        node = node_type["node_config"]
        assert node["IamInstanceProfile"]["Name"] == ("ip2p" if name == "head" else "ip2p-worker")
        assert node["MetadataOptions"]["HttpTokens"] == "required"
