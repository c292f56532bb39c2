"""Who may use the endpoint: bearer keys, hashed at rest, each with its own limits.

A keys file (YAML or JSON), or the same text in IP2P_SERVE_KEYS:

    - {name: shop, sha256: 9f86d0…, edits_per_minute: 600, concurrent_edits: 64}

`python -m serve.keys NAME >> keys.yaml` draws a key, shows it on the terminal, and adds its line to the file.
"""

import argparse
import hashlib
import hmac
import math
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

VARIABLE = "IP2P_SERVE_KEYS"


class Key(Section):
    """What one client may do."""

    name: str = Field(description="whose it is, for the metrics")
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")] = Field(description="of the key, in hex")
    edits_per_minute: Positive = Field(default=600, description="a minute's worth may come at once")
    concurrent_edits: Positive = Field(default=64, description="waiting or on their way")


KEYS = TypeAdapter(Annotated[list[Key], Field(min_length=1)])


def read_keys(path: str | None) -> list[Key]:
    """The keys in the file at `path`, or without one in IP2P_SERVE_KEYS. Raises `UserError` that names the problem."""
    source = path or f"${VARIABLE}"
    try:
        text = Path(path).read_text() if path else os.environ.get(VARIABLE, "")
    except OSError as error:
        raise UserError(f"--keys {path}: {error}") from error
    if not text:
        raise UserError(
            f"the endpoint has no keys: name a file with --keys (`keys` of a Serve config), or put its text into "
            f"{VARIABLE}; `python -m serve.keys NAME` makes one; --open (`open: true`) serves this machine without any"
        )
    try:
        keys = KEYS.validate_python(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError) as error:
        raise UserError(f"{source}: {error}") from error
    for what in ("name", "sha256"):
        values = [getattr(key, what) for key in keys]
        if twice := {value for value in values if values.count(value) > 1}:
            raise UserError(f"{source}: {what} {min(twice)!r} is there twice")
    return keys


class RefusedError(Exception):
    """The request is not let in: why, with the HTTP status, and after how many seconds to try again."""

    def __init__(self, message: str, status: int, retry_after: float | None = None, param: str | None = None):
        super().__init__(message)
        self.message, self.status, self.param = message, status, param
        self.retry_after = retry_after if retry_after is None else max(1, math.ceil(retry_after))


class Client:
    """What a key has used of its limits. `ingresses` share them evenly."""

    def __init__(self, key: Key, ingresses: int = 1, clock: Callable[[], float] = time.monotonic):
        self.key, self.clock = key, clock
        self.rate = key.edits_per_minute / 60 / ingresses
        self.burst = max(1.0, key.edits_per_minute / ingresses)
        self.places = max(1, key.concurrent_edits // ingresses)
        self.tokens, self.filled, self.running = self.burst, clock(), 0

    def charge(self, edits: float) -> None:
        """Take from the bucket of tokens, which fills with time. Raises `RefusedError`."""
        now = self.clock()
        self.tokens = min(self.burst, self.tokens + (now - self.filled) * self.rate)
        self.filled = now
        if edits > self.tokens:
            raise RefusedError(
                f"key {self.key.name!r} may make {self.key.edits_per_minute} edits a minute: wait, or send fewer",
                429,
                retry_after=(min(edits, self.burst) - self.tokens) / self.rate,
            )
        self.tokens -= edits

    def enter(self, edits: int) -> None:
        """Occupy places until `leave`. Raises `RefusedError`."""
        if self.running + edits > self.places:
            raise RefusedError(
                f"key {self.key.name!r} may have {self.places} edits on their way, and {self.running} are: "
                "wait for one, or send fewer at once",
                429,
                retry_after=1,
            )
        self.running += edits

    def leave(self, edits: int) -> None:
        self.running -= edits


class Clients:
    """All keys. None at all: open, to clients on this machine only."""

    def __init__(self, keys: list[Key] | None, ingresses: int = 1):
        self.clients = None if keys is None else [Client(key, ingresses) for key in keys]

    def of(self, authorization: str | None) -> Client | None:
        """The client of an Authorization header; None where the endpoint is open. Raises `RefusedError`."""
        if self.clients is None:
            return None
        scheme, _, given = (authorization or "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).hexdigest()
        # Every key is compared, in constant time: how long it takes tells nothing.
        found = [client for client in self.clients if hmac.compare_digest(client.key.sha256, digest)]
        if scheme.lower() != "bearer" or not found:
            what = "this key is not known" if scheme.lower() == "bearer" else "no key"
            raise RefusedError(f"{what}: send the header Authorization: Bearer <your key>", 401)
        return found[0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw a key: shown on the terminal, its line for the file printed.")
    parser.add_argument("name", help="whose it is")
    name = parser.parse_args(argv).name
    key = f"ip2p-{secrets.token_urlsafe(32)}"
    print(f"the key, which is kept nowhere: {key}", file=sys.stderr)
    line = Key(name=name, sha256=hashlib.sha256(key.encode()).hexdigest()).model_dump()
    print(yaml.safe_dump([line], sort_keys=False), end="")


if __name__ == "__main__":
    main()
