"""Bearer keys of the endpoint's clients, hashed at rest, each with its own limits.

A keys file (YAML or JSON), or the same text in IP2P_SERVE_KEYS:

    - {name: shop, sha256: 9f86d0…, edits_per_minute: 600, concurrent_edits: 256}

A changed file is taken over without a restart; the variable is read once.

`python -m serve.keys NAME >> keys.yaml` creates a key, shows it on the terminal, and appends its
hash to the file.
"""

import argparse
import hashlib
import hmac
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from ip2p.errors import UserError
from ip2p.recipe import Positive, Section
from serve.errors import RefusedError
from serve.load import Load

logger = logging.getLogger("ray.serve")

VARIABLE = "IP2P_SERVE_KEYS"
OF_NOTHING = hashlib.sha256(b"").hexdigest()  # of an unset shell variable


class Key(Section):
    """The limits of one client."""

    name: str = Field(description="name of the client")
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")] = Field(description="hash of the key, in hex")
    edits_per_minute: Positive = Field(
        default=600,
        description="rate limit, in edits of 20 steps at full size; a minute's worth may come in one burst",
    )
    concurrent_edits: Positive = Field(
        default=256,  # half of it at each of two ingresses holds the page's grid of 25 edits of 100 steps
        description="limit of edits in flight, counted in the same way",
    )


KEYS = TypeAdapter(Annotated[list[Key], Field(min_length=1)])


def read_keys(path: str | None) -> list[Key]:
    """Return the keys in the file at `path`, by default in IP2P_SERVE_KEYS. Raises `UserError`."""
    source = path or f"${VARIABLE}"
    try:
        text = Path(path).read_text() if path else os.environ.get(VARIABLE, "")
    except OSError as error:
        raise UserError(f"--keys {path}: {error}") from error
    if not text:
        raise UserError(
            f"the endpoint has no keys: name a file with --keys (`keys` of a Serve config), or put its text into "
            f"{VARIABLE}; `python -m serve.keys NAME` makes one; --open (`open: true`) serves this machine without keys"
        )
    try:
        keys = KEYS.validate_python(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError) as error:
        raise UserError(f"{source}: {error}") from error
    if empty := [key.name for key in keys if key.sha256 == OF_NOTHING]:
        raise UserError(f"{source}: sha256 of {empty[0]!r} is the hash of an empty key; make one with serve.keys")
    for field in ("name", "sha256"):
        values = [getattr(key, field) for key in keys]
        if duplicates := {value for value in values if values.count(value) > 1}:
            raise UserError(f"{source}: duplicate {field} {min(duplicates)!r}")
    return keys


class Client:
    """The use that a key makes of its limits, at one of `ingresses` that share them evenly."""

    def __init__(self, key: Key, ingresses: int = 1, clock: Callable[[], float] = time.monotonic):
        self.key, self.clock = key, clock
        self.rate = key.edits_per_minute / 60 / ingresses
        self.burst = max(1.0, key.edits_per_minute / ingresses)
        self.slots = max(1.0, key.concurrent_edits / ingresses)
        self.tokens, self.filled = self.burst, clock()
        self.work, self.memory = 0.0, 0  # in flight

    def charge(self, edits: float) -> None:
        """Take a token per edit from a bucket that refills with time. Raises `RefusedError`."""
        now = self.clock()
        self.tokens = min(self.burst, self.tokens + (now - self.filled) * self.rate)
        self.filled = now
        if edits > self.tokens:
            raise RefusedError(
                f"key {self.key.name!r} is limited to {self.key.edits_per_minute} edits a minute; "
                "retry later or send fewer",
                429,
                retry_after=(min(edits, self.burst) - self.tokens) / self.rate,
            )
        self.tokens -= edits

    def refund(self, edits: float) -> None:
        self.tokens = min(self.burst, self.tokens + edits)

    def enter(self, load: Load) -> None:
        """Hold slots until `leave`, and charge all of the load but the edit that is charged already.

        Raises `RefusedError`, with nothing held or charged.
        """
        if self.work + load.work > self.slots:
            raise RefusedError(
                f"key {self.key.name!r} has the work of {self.work:.0f} of {self.slots:.0f} edits in flight; "
                "retry later or send fewer per request",
                429,
                retry_after=1,
            )
        self.charge(load.work - 1)
        self.work += load.work
        self.memory += load.memory

    def leave(self, load: Load) -> None:
        self.work -= load.work
        self.memory -= load.memory


class Clients:
    """The clients of all keys. keys None: the endpoint is open to this machine.

    file: where the keys come from. It is read again when it changes, so a key can be revoked
    without a restart. A file that can't be read leaves the keys as they are.
    """

    RECHECK = 2.0  # seconds between two looks at the file

    def __init__(
        self,
        keys: list[Key] | None,
        ingresses: int = 1,
        file: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._ingresses, self._clock = ingresses, clock
        self.clients = None if keys is None else [Client(key, ingresses, clock) for key in keys]
        self._file = Path(file) if file and keys is not None else None
        self._state = self._stat()
        self._checked = clock()

    def of(self, authorization: str | None) -> Client | None:
        """Return the client of an Authorization header, None if the endpoint is open.

        Raises `RefusedError` (401).
        """
        self._reload()
        if self.clients is None:
            return None
        scheme, _, given = (authorization or "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).hexdigest()
        # Every key is compared, in constant time, so that the time taken reveals nothing.
        matching = [client for client in self.clients if hmac.compare_digest(client.key.sha256, digest)]
        if scheme.lower() != "bearer" or not given.strip() or not matching:
            problem = "unknown key" if scheme.lower() == "bearer" else "no key"
            raise RefusedError(f"{problem}: send the header Authorization: Bearer <your key>", 401)
        return matching[0]

    def _stat(self) -> tuple[int, ...] | None:
        if self._file is None:
            return None
        try:
            facts = self._file.stat()
        except OSError:  # on a machine without the file, the keys stay as they were at the start
            return None
        return facts.st_mtime_ns, facts.st_size, facts.st_ino

    def _reload(self) -> None:
        """Take over changed keys. The use of unchanged ones is kept."""
        if self.clients is None or self._clock() < self._checked + self.RECHECK:
            return
        self._checked = self._clock()
        state = self._stat()
        if state in (None, self._state):
            return
        self._state = state
        try:
            keys = read_keys(str(self._file))
        except UserError as error:
            logger.error("the keys stay as they were: %s", error)
            return
        known = {client.key.model_dump_json(): client for client in self.clients}
        self.clients = [known.get(key.model_dump_json()) or Client(key, self._ingresses, self._clock) for key in keys]
        logger.info("%s: %d keys", self._file, len(keys))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Create a key. Show it on stderr and print its entry for the file.")
    parser.add_argument("name", help="name of the client")
    name = parser.parse_args(argv).name
    key = f"ip2p-{secrets.token_urlsafe(32)}"
    print(f"the key, which is not stored: {key}", file=sys.stderr)
    line = Key(name=name, sha256=hashlib.sha256(key.encode()).hexdigest()).model_dump()
    print(yaml.safe_dump([line], sort_keys=False), end="")


if __name__ == "__main__":
    main()
