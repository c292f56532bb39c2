"""One run at a time in a workspace: `owner.json` there says which one writes, and that it lives.

Two runs in one folder ask for the same captions, double their pairs and remove each other's files. Who comes second is
refused while the first lives, and takes over when that one is known to be gone, or has not been heard of for LIFE
seconds. Who was taken over from, or could not say for GIVE_UP seconds that it lives, ends at once, and its Ray workers
with it: so an attempt that was given up and wakes again writes nothing.

Buckets know no locks. Of two that take over in the same moment the one that wrote last stays and the other ends, at its
next beat at the latest.
"""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from ip2p.errors import UserError
from ip2p.workspace import Workspace

OWNER = "owner.json"
SUBMISSION = "IP2P_SUBMISSION"  # environment: the id that cluster/submit.py gave a job
FENCED = 75  # exit status, sysexits' EX_TEMPFAIL

# Seconds. Workers whose head is lost go on for a minute (RAY_gcs_rpc_server_reconnect_timeout_s): LIFE is longer.
BEAT = 10.0
GIVE_UP = 40.0
LIFE = 90.0


@contextmanager
def held(workspace: Workspace, job: str) -> Iterator[None]:
    """Inside, this process alone writes to the workspace.

    Raises `UserError` when another run does, or when nothing can be written there.
    """
    with workspace.reached():
        owner = take(workspace, job)
    done = threading.Event()
    beats = threading.Thread(target=beat, args=(workspace, owner, done), daemon=True)
    beats.start()
    try:
        yield
    finally:
        done.set()
        beats.join()
        if (read(workspace) or {}).get("token") == owner["token"]:
            workspace.fs.delete_file(workspace.path(OWNER))


def take(workspace: Workspace, job: str) -> dict[str, Any]:
    """Become the owner. Raises `UserError` when another run is, and lives."""
    if earlier := read(workspace):
        wait_for_the_end_of(earlier, workspace)
    me = psutil.Process()
    owner = {
        "token": uuid4().hex,
        "job": job,
        "submission": os.environ.get(SUBMISSION),
        "host": this_host(),
        "pid": me.pid,
        "process_started": me.create_time(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "beat": 0,
    }
    write(workspace, owner)
    if earlier:  # another may have waited for the same end
        time.sleep(BEAT / 10)
    now = read(workspace)
    if now is None or now["token"] != owner["token"]:
        raise UserError(refusal(workspace, now or owner))
    return owner


def wait_for_the_end_of(owner: dict[str, Any], workspace: Workspace) -> None:
    """Returns when `owner` is gone. Raises `UserError` as soon as it is known to live."""
    if owner["host"] == this_host():
        if process_lives(owner):
            raise UserError(refusal(workspace, owner))
        return
    print(f"{workspace.location} was {described(owner)}: waiting for a sign of life, {LIFE:.0f} s at most", flush=True)
    deadline = time.monotonic() + LIFE
    while time.monotonic() < deadline:
        time.sleep(BEAT / 10)
        now = read(workspace)
        if now is None:
            return
        if now != owner:
            raise UserError(refusal(workspace, now))


def beat(workspace: Workspace, owner: dict[str, Any], done: threading.Event) -> None:
    """Say every BEAT seconds that `owner`, this process, lives; ends the process when it is the owner no more."""
    heard, trouble = time.monotonic(), ""
    while not done.wait(BEAT):
        began = time.monotonic()
        if began - heard <= GIVE_UP:
            try:
                now = read(workspace)
                if now is None or now["token"] != owner["token"]:
                    end(f"{workspace.location} is now {described(now)}" if now else f"{OWNER} was removed")
                owner["beat"] += 1
                write(workspace, owner)
                heard, trouble = began, ""
            except OSError as error:
                trouble = f": {error}"
        if time.monotonic() - heard > GIVE_UP and not done.is_set():
            end(f"could not say to {workspace.location} for {GIVE_UP:.0f} s that this run lives{trouble}")


def end(why: str) -> None:
    """At once, whatever the main thread is doing: Ray removes the workers of a driver that is gone."""
    print(f"error: {why}; this run ends, so that no two write there. The same command goes on.", file=sys.stderr)
    sys.stderr.flush()
    os._exit(FENCED)


def read(workspace: Workspace) -> dict[str, Any] | None:
    try:
        with workspace.open_in(OWNER) as file:
            return json.loads(file.read())
    except FileNotFoundError:
        return None


def write(workspace: Workspace, owner: dict[str, Any]) -> None:
    workspace.write(json.dumps(owner, indent=2), OWNER)


def refusal(workspace: Workspace, owner: dict[str, Any]) -> str:
    stop = f"stop it (ray job stop {owner['submission']})" if owner["submission"] else "stop it"
    return f"{workspace.location} is {described(owner)}: wait for its end, {stop}, or use another workspace"


def described(owner: dict[str, Any]) -> str:
    job = owner["submission"] or owner["job"]
    return f"written by {job} (process {owner['pid']} of {owner['host'].split()[0]}, since {owner['since']})"


def this_host() -> str:
    """Its name, and which start of it: a process number means something there alone."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {boot.read_text().strip() if boot.exists() else ''}"


def process_lives(owner: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(owner["pid"])
        return process.create_time() == owner["process_started"] and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
