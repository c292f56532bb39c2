"""One run at a time in a workspace: `owner.json` names the run that writes there.

Two runs in one folder would ask for the same captions, double their pairs and remove each other's
files. The owner writes a heartbeat every BEAT seconds. A second run is refused while the first is
alive. A run that was replaced, or could not write a heartbeat for GIVE_UP seconds, exits at once
with status 75, and Ray ends the workers of its driver.

Every write is conditional on the version that was read before (`runtime.atomic_file`). Of two runs
that start together, exactly one becomes the owner. In a store without conditional writes a warning
says so, and the file is compared before each write and once more a second later: two runs that
start within that second may both be owners until the next heartbeat of one. Refusing such stores
would lock out users who start one run at a time, for whom the comparison is enough.

**When a run is taken over**

| the last owner | the next run waits |
|---|---|
| released the workspace (success, failure, signal) | not at all |
| ran on this host, and its process is gone | not at all: Ray ends the workers of a dead driver |
| ran in this Ray cluster with GCS fault tolerance, on a head that was replaced | SHORTEST_LIFE |
| ran elsewhere | the `life` in its record |

The wait starts at the last heartbeat, by the store's clock, and lasts at least two heartbeats from
now. A heartbeat within it refuses the next run.

`life` is longer than what workers outlive a lost head, so that nobody writes for a replaced run:
`RAY_gcs_rpc_server_reconnect_timeout_s` of the owner's environment plus MARGIN. Where that variable
is not set it is Ray's default of 60 s, or the 600 s that KubeRay gives the workers of a cluster
with GCS fault tolerance; KubeRay sets it on workers alone, so the driver knows such a cluster by
the storage namespace of its head. Within one such cluster the shorter wait is enough: the head that
comes back finds the old head's node dead, and ends its jobs and their workers.

MARGIN and GIVE_UP go together. GIVE_UP is two thirds of the shortest life, whatever the cluster,
because the shorter wait must outlast it too. That survives a store that does not answer for 40 s:
up to BEAT s before it, a hung request and a retry at its end.

**Epochs.** The record counts the owners of a workspace: `epoch` is 1 for the first, and one more
for each next one. The file stays when a run ends, with `released`, so that epochs never repeat.
The names of a run's data files hold its epoch. A write that arrives after all from a replaced run
can thus be recognised. Do not delete `owner.json`.
"""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn
from uuid import uuid4

import psutil

from ip2p.errors import UserError
from ip2p.workspace import Workspace
from runtime.atomic_file import (
    AtomicFile,
    ChangedError,
    PlainFile,
    Stored,
    UnsupportedError,
    atomic_file,
)

OWNER = "owner.json"
SUBMISSION = "IP2P_SUBMISSION"  # environment: the id that cluster/submit.py gave a job
LOST = 75  # exit status, sysexits' EX_TEMPFAIL

# Environment variables of Ray's processes, and what they mean for workers whose head is lost.
RECONNECT_TIMEOUT = "RAY_gcs_rpc_server_reconnect_timeout_s"
STORAGE_NAMESPACE = "RAY_external_storage_namespace"  # KubeRay: of heads with fault tolerance
RAY_DEFAULT_TIMEOUT, KUBERAY_TIMEOUT = 60.0, 600.0

HELD: dict[str, "Lease"] = {}  # of this process, by the address of the workspace

# Seconds.
BEAT = 10.0
RETRY = 2.0  # after a heartbeat that could not be written
POLL = 1.0  # while waiting for the end of another run
MARGIN = 60.0
SHORTEST_LIFE = RAY_DEFAULT_TIMEOUT + MARGIN
GIVE_UP = 80.0


@dataclass(frozen=True)
class Owner:
    """The content of `owner.json`.

    `token` is unique to a run and `beat` counts its writes. `cluster` names a Ray cluster with GCS
    fault tolerance. `life`: seconds without a heartbeat after which a run elsewhere may take over.
    """

    token: str
    epoch: int
    job: str
    submission: str | None
    host: str
    pid: int
    process_started: float
    cluster: str | None
    since: str
    life: float
    beat: int = 0
    released: bool = False

    @staticmethod
    def parse(content: str) -> "Owner | None":
        """Return the record in a file, None for a damaged file: a full disk may leave an empty one.

        Raises `UserError` for a record of another version of this project.
        """
        try:
            record = json.loads(content)
        except json.JSONDecodeError:
            return None
        if not isinstance(record, dict):
            return None
        try:
            return Owner(**record)
        except TypeError as error:
            raise UserError(
                f"{OWNER} is not a record of this version ({error}): when no run writes there, remove it"
            ) from error

    def format(self) -> str:
        return json.dumps(asdict(self), indent=2)


@contextmanager
def held(workspace: Workspace, job: str) -> Iterator["Lease"]:
    """Make this process the only one that writes to `workspace`, inside the block.

    Raises `UserError` when another run is alive, or when nothing can be written there.
    """
    with workspace.reached():
        lease = take(workspace, job)
    lease.start()
    HELD[workspace.uri()] = lease
    try:
        yield lease
    finally:
        del HELD[workspace.uri()]
        lease.release()


def lease_of(workspace: Workspace) -> "Lease | None":
    """Return the lease that this process holds on `workspace`, or on a folder above it."""
    inside = f"{workspace.uri()}/"
    return next((lease for location, lease in HELD.items() if inside.startswith(f"{location}/")), None)


class Lease:
    """The ownership of a workspace, kept by a thread that writes heartbeats."""

    def __init__(self, location: str, file: AtomicFile, owner: Owner, version: str, written: float):
        self._location, self._file = location, file
        self._owner, self._version = owner, version
        self._written = written  # monotonic time just before the last write that succeeded
        self._trouble = ""
        self._done = threading.Event()
        self._heartbeats = threading.Thread(target=self._write_heartbeats, daemon=True)
        self._watchdog = threading.Thread(target=self._watch, daemon=True)

    @property
    def epoch(self) -> int:
        """How many runs have owned the workspace, this one included."""
        return self._owner.epoch

    def start(self) -> None:
        """Write a heartbeat every BEAT seconds. Exit the process when ownership is lost."""
        self._heartbeats.start()
        self._watchdog.start()

    def release(self) -> None:
        """Let the next run start. Exits the process when that cannot be written."""
        self._done.set()
        self._watchdog.join()

    def _write_heartbeats(self) -> None:
        while not self._owner.released:
            released = self._done.wait(BEAT)
            self._owner = replace(self._owner, beat=self._owner.beat + 1, released=released)
            self._write_until_done()

    def _write_until_done(self) -> None:
        """Write the record, with retries until it succeeds or GIVE_UP seconds are over."""
        while True:
            self._exit_if_silent()
            began = time.monotonic()
            try:
                self._version = self._write_once()
            except (OSError, ChangedError) as error:
                self._trouble = f": {error}"
                time.sleep(RETRY)
            else:
                self._written, self._trouble = began, ""
                return

    def _write_once(self) -> str:
        content = self._owner.format()
        try:
            return self._file.write(content, self._version)
        except ChangedError:
            now = self._file.read()
            if now is None:
                self._exit(f"{OWNER} was removed from {self._location}")
            owner = Owner.parse(now.content)
            if owner is None:
                self._exit(f"{OWNER} in {self._location} was damaged by another program")
            if owner.token != self._owner.token:
                self._exit(f"{self._location} is now {described(owner)}")
            # An earlier write of this process, whose answer was lost.
            return self._file.write(content, now.version)

    def _watch(self) -> None:
        """Exit when no heartbeat is written for GIVE_UP seconds, even while a request hangs."""
        while self._heartbeats.is_alive():
            self._heartbeats.join(max(self._written + GIVE_UP - time.monotonic(), 0) + 0.01)
            self._exit_if_silent()
        if not self._owner.released:
            self._exit("the thread that writes heartbeats died (see above)")

    def _exit_if_silent(self) -> None:
        if self._heartbeats.is_alive() and time.monotonic() - self._written > GIVE_UP:
            silence = f"for {GIVE_UP:.0f} s{self._trouble}"
            self._exit(f"no heartbeat could be written to {self._location} {silence}")

    def _exit(self, reason: str) -> NoReturn:
        """Exit without unwinding the main thread: Ray ends the workers of a driver that is gone."""
        ending = "this run ends, so that no two runs write there. Run the same command to resume."
        print(f"error: {reason}; {ending}", file=sys.stderr, flush=True)
        os._exit(LOST)


def take(workspace: Workspace, job: str) -> Lease:
    """Become the owner. Raises `UserError` when another run is alive, `OSError` from the store."""
    token = uuid4().hex
    try:
        return take_through(atomic_file(workspace, OWNER), workspace, job, token)
    except UnsupportedError as error:
        print(
            f"warning: {workspace.location}: the store has no conditional writes ({error}), so two "
            "runs that start within the same second may both write there; start one at a time",
            file=sys.stderr,
            flush=True,
        )
    return take_through(PlainFile(workspace, OWNER), workspace, job, token)


def take_through(file: AtomicFile, workspace: Workspace, job: str, token: str) -> Lease:
    """Become the owner by writing `file`. Raises as `take`, and `UnsupportedError`."""
    while True:
        stored = wait_until_free(file, workspace, token)
        previous = Owner.parse(stored.content) if stored else None
        if stored and previous is None:
            print(f"{workspace.location}: {OWNER} is damaged, so no run owns the workspace; replacing it", flush=True)
        owner = new_owner(job, token, previous)
        began = time.monotonic()
        try:
            version = file.write(owner.format(), stored.version if stored else None)
        except ChangedError:
            continue  # either another run was first, or the answer to an own write was lost
        return Lease(workspace.location, file, owner, version, began)


def new_owner(job: str, token: str, previous: Owner | None) -> Owner:
    """Return the record of this process, to be written after `previous`."""
    process = psutil.Process()
    epoch, beat = (previous.epoch, previous.beat) if previous else (0, 0)
    if previous is None or previous.token != token:
        epoch, beat = epoch + 1, -1
    return Owner(
        token=token,
        epoch=epoch,
        job=job,
        submission=os.environ.get(SUBMISSION),
        host=this_host(),
        pid=process.pid,
        process_started=process.create_time(),
        cluster=this_cluster(),
        since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        life=life(),
        beat=beat + 1,
    )


def wait_until_free(file: AtomicFile, workspace: Workspace, token: str) -> Stored | None:
    """Return the file as it stands when nobody owns the workspace, None if there is none.

    A record with this run's own `token` counts as free. Raises `UserError` as soon as another run
    is known to be alive.
    """
    first = file.read()
    owner = Owner.parse(first.content) if first else None
    if first is None or owner is None or owner.released or owner.token == token:
        return first
    if owner.host == this_host():
        if process_is_alive(owner):
            raise UserError(refusal(workspace, owner))
        return first

    wait = seconds_to_wait(silence_before_takeover(owner), first.age)
    waiting = f"waiting up to {wait:.0f} s for a sign of life"
    print(f"{workspace.location} is {described(owner)}: {waiting}", flush=True)
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        time.sleep(POLL)
        now = file.read()
        owner = Owner.parse(now.content) if now else None
        if now is None or owner is None or owner.released:
            return now
        if now.version != first.version:
            raise UserError(refusal(workspace, owner))
    return first


def silence_before_takeover(owner: Owner) -> float:
    """Return the seconds without a heartbeat after which a run on another host is taken over."""
    if owner.cluster is not None and owner.cluster == this_cluster():
        return SHORTEST_LIFE
    return owner.life


def seconds_to_wait(silence: float, age: float) -> float:
    """Return the part of `silence` that is still to come for a record of `age` seconds.

    It is at least two heartbeats: a store's clock alone never ends a run.
    """
    return max(silence - max(age, 0.0), 2 * BEAT)


def life() -> float:
    """Return the seconds without a heartbeat after which no worker of this run writes any more."""
    default = KUBERAY_TIMEOUT if this_cluster() else RAY_DEFAULT_TIMEOUT
    timeout = float(os.environ.get(RECONNECT_TIMEOUT, default))
    return max(timeout + MARGIN, SHORTEST_LIFE)


def this_cluster() -> str | None:
    """Return the id of the Ray cluster whose head this is, None without GCS fault tolerance."""
    return os.environ.get(STORAGE_NAMESPACE)


def refusal(workspace: Workspace, owner: Owner) -> str:
    stop = f"stop it (ray job stop {owner.submission})" if owner.submission else "stop it"
    remedy = f"wait for its end, {stop}, or use another workspace"
    return f"{workspace.location} is {described(owner)}: {remedy}"


def described(owner: Owner) -> str:
    job = owner.submission or owner.job
    host = owner.host.split()[0]
    return f"written by {job} (process {owner.pid} of {host}, since {owner.since})"


def this_host() -> str:
    """Return the host's name, its boot and its namespace of processes.

    A process number means something only there: two pods on one node may share the first two.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    processes = Path("/proc/self/ns/pid")
    return " ".join(
        [
            platform.node(),
            boot.read_text().strip() if boot.exists() else "",
            str(processes.readlink()) if processes.exists() else "",
        ]
    )


def process_is_alive(owner: Owner) -> bool:
    """Whether `owner`, of this host, still runs."""
    try:
        process = psutil.Process(owner.pid)
        started, status = process.create_time(), process.status()
    except psutil.NoSuchProcess:
        return False
    return started == owner.process_started and status != psutil.STATUS_ZOMBIE
