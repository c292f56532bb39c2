"""A line a minute about what a job waits for: requests that no machine of the cluster has room for."""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import ray
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated.autoscaler_pb2 import (
    GangResourceRequest,  # pyright: ignore[reportAttributeAccessIssue]
    GetClusterStatusReply,  # pyright: ignore[reportAttributeAccessIssue]
    NodeStatus,  # pyright: ignore[reportAttributeAccessIssue]
    ResourceRequest,  # pyright: ignore[reportAttributeAccessIssue]
)
from ray.exceptions import RpcError

INTERVAL = 60.0  # seconds between two lines
# In every interval. A request that one of them misses waits in an ordinary queue, behind tasks that end.
LOOKS = 12
RPC_TIMEOUT = 10  # seconds


def watch_pending(grows: bool) -> None:
    """Print a line every INTERVAL seconds while requests stay pending, until Ray is shut down.

    A daemon thread does it: the call returns at once.

    Args:
        grows: whether machines may join this Ray. A Ray of one process's own stays as it is.
    """
    address = ray.get_runtime_context().gcs_address
    threading.Thread(target=watch, args=(address, grows), name="watch_pending", daemon=True).start()


def watch(address: str, grows: bool) -> None:
    """Look at the Ray at `address` for as long as this process is connected to it."""
    client, pause = GcsClient(address), threading.Event()
    while True:
        looks: list[ClusterState | None] = []
        for _ in range(LOOKS):
            pause.wait(INTERVAL / LOOKS)
            state = look(client)
            if not connected_to(address):
                return
            looks.append(state)
        if line := report(looks, grows):
            print(f"waiting for the cluster: {line}", flush=True)


def connected_to(address: str) -> bool:
    return ray.is_initialized() and ray.get_runtime_context().gcs_address == address


@dataclass(frozen=True)
class Request:
    """Resources that one task, actor or bundle of a placement group asks of one machine.

    Args:
        resources: names and amounts, sorted.
        labels: labels that the machine must have, as Ray writes them: `pool=vllm`.
    """

    resources: tuple[tuple[str, float], ...]
    labels: tuple[str, ...] = ()

    def __str__(self) -> str:
        asked = ", ".join(f"{name}: {amount:g}" for name, amount in self.resources)
        return f"{{{asked}}}" + (f" with {', '.join(self.labels)}" if self.labels else "")

    def fits(self, machine: Mapping[str, float]) -> bool:
        """Whether an idle `machine` has these resources. Its labels are not compared."""
        return all(machine.get(name, 0) >= amount for name, amount in self.resources)


@dataclass(frozen=True)
class ClusterState:
    """One look at a cluster.

    Args:
        pending: requests that no machine has room for now.
        unplaceable: those of them for which the autoscaler can start no machine.
        starting: machines on their way, by kind.
        failed: why machines could not be started, by kind.
        machines: resources of every machine, in use or not.
        free: resources that are not in use, of all machines together.
        autoscaled: whether an autoscaler reports. Ray's first autoscaler does not.
    """

    pending: Counter[Request]
    unplaceable: Counter[Request]
    starting: Counter[str]
    failed: dict[str, str]
    machines: list[dict[str, float]]
    free: Counter[str]
    autoscaled: bool


def look(client: GcsClient) -> ClusterState | None:
    """Return the state of the cluster, or None when its head does not answer."""
    reply = GetClusterStatusReply()
    try:
        reply.ParseFromString(client.get_cluster_status(timeout_s=RPC_TIMEOUT))
    except RpcError:
        return None
    return parse(reply)


def parse(reply: GetClusterStatusReply) -> ClusterState:
    """Read what `ray status` shows, and what the autoscaler has given up on, which it does not."""
    cluster, autoscaler = reply.cluster_resource_state, reply.autoscaling_state
    alive = [node for node in cluster.node_states if node.status != NodeStatus.DEAD]
    pending = Counter[Request]()
    for entry in cluster.pending_resource_requests:
        request = request_of(entry.request)
        # Tasks inside a placement group wait for one another, not for machines.
        if not any("_group_" in name for name, _ in request.resources):
            pending[request] += entry.count
    pending.update(bundles(cluster.pending_gang_resource_requests))
    unplaceable = Counter(map(request_of, autoscaler.infeasible_resource_requests))
    unplaceable.update(bundles(autoscaler.infeasible_gang_resource_requests))
    starting = Counter[str]()
    for launch in autoscaler.pending_instance_requests:
        starting[launch.ray_node_type_name] += launch.count
    starting.update(instance.ray_node_type_name for instance in autoscaler.pending_instances)
    free = Counter[str]()
    for node in alive:
        free.update(dict(node.available_resources))
    return ClusterState(
        pending=pending,
        unplaceable=unplaceable,
        starting=starting,
        failed={one.ray_node_type_name: one.reason for one in autoscaler.failed_instance_requests},
        machines=[dict(node.total_resources) for node in alive],
        free=free,
        autoscaled=autoscaler.autoscaler_state_version > 0,
    )


def request_of(request: ResourceRequest) -> Request:
    labels = (
        f"{one.label_key}{'=' if one.operator == one.LABEL_OPERATOR_IN else '!='}" + "|".join(one.label_values)
        for selector in request.label_selectors[:1]  # the others are fallbacks
        for one in selector.label_constraints
    )
    return Request(tuple(sorted(request.resources_bundle.items())), tuple(labels))


def bundles(gangs: Iterable[GangResourceRequest]) -> Iterator[Request]:
    """Yield the bundles of placement groups, each of which is placed as a whole or not at all."""
    for gang in gangs:
        yield from map(request_of, gang.requests)


def report(looks: list[ClusterState | None], grows: bool) -> str:
    """Say what stayed pending during all `looks`; "" when nothing did."""
    seen = [state for state in looks if state is not None]
    if not seen:
        return "its head does not answer"
    latest, pending = seen[-1], seen[0].pending
    for state in seen:
        pending = pending & state.pending
    if not pending:
        return ""

    parts = [f"{listed(pending)} pending"]
    if latest.autoscaled:
        parts.append(starting(latest.starting))
    asked = {name for request in pending for name, _ in request.resources}
    for name in ("GPU", "CPU"):
        if name in asked:
            total = sum(machine.get(name, 0) for machine in latest.machines)
            parts.append(f"{total - latest.free[name]:g} of {total:g} {name}s in use")
    return "; ".join([", ".join(parts), *advice(pending, latest, grows)])


def listed(requests: Counter[Request]) -> str:
    return ", ".join(f"{count} x {request}" for request, count in requests.most_common())


def starting(nodes: Counter[str]) -> str:
    kinds = ", ".join(nodes) if len(nodes) < 2 else ", ".join(f"{n} {k}" for k, n in nodes.items())
    count = nodes.total()
    return f"{count or 'no'} node{'s' * (count > 1)} starting" + (f" ({kinds})" if nodes else "")


def advice(pending: Counter[Request], state: ClusterState, grows: bool) -> Iterator[str]:
    """Yield why requests wait for longer than a node takes to start, and what to do about it."""
    for kind, reason in state.failed.items():
        yield f"a {kind} node could not be started: {' '.join(reason.split())[:200]}"
    if unplaceable := pending & state.unplaceable:
        yield (
            f"the autoscaler starts no node for {listed(unplaceable)}: "
            "no pool has such nodes, or those that do are at their maximum"
        )
    if state.autoscaled:
        return
    too_large = [one for one in pending if not any(map(one.fits, state.machines))]
    if not too_large:
        return
    if grows:
        yield "no machine that is up can hold this: without an autoscaler it will wait for ever"
    elif any(name == "GPU" for one in too_large for name, _ in one.resources):
        gpus = sum(machine.get("GPU", 0) for machine in state.machines)
        yield (
            f"this Ray has {gpus:g} GPUs and starts no nodes: it will wait for ever; "
            "start one with more GPUs, or set device: cpu"
        )
    else:
        yield "this Ray is too small and starts no nodes: it will wait for ever"
