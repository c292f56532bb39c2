"""Keys and their limits; no server."""

import hashlib
import subprocess
import sys

import pytest
import yaml

from ip2p.recipe import REPOSITORY
from serve.errors import RefusedError
from serve.keys import VARIABLE, Client, Clients, read_keys
from serve.load import Load
from tests.serve.conftest import make_key


def test_created_key_authorizes_and_file_holds_only_its_hash(tmp_path):
    file, tokens = tmp_path / "keys.yaml", {}
    for name in ("shop", "archive"):
        command = [sys.executable, "-m", "serve.keys", name]
        ran = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=120)
        tokens[name] = ran.stderr.split()[-1]
        with file.open("a") as keys:
            keys.write(ran.stdout)
        assert tokens[name] not in file.read_text()
    clients = Clients(read_keys(str(file)))
    for name, token in tokens.items():
        client = clients.of(f"Bearer {token}")
        assert client is not None
        assert client.key.name == name
    for wrong in (None, "", token, f"Basic {token}", f"Bearer {token}x", "Bearer", "Bearer \udcff"):
        with pytest.raises(RefusedError, match="Authorization: Bearer") as refused:
            clients.of(wrong)
        assert refused.value.status == 401


def test_keys_are_read_from_environment(monkeypatch):
    monkeypatch.setenv(VARIABLE, yaml.safe_dump([make_key("shop", "x").model_dump()]))
    assert [key.name for key in read_keys(None)] == ["shop"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no keys"),
        ("[]", "at least 1"),
        ("[{name: a, sha256: secret}]", "sha256"),
        ("[{name: a, key: secret}]", "sha256"),
        ("[{", "keys.yaml"),
        ("keys: []", "valid list"),
        (yaml.safe_dump([make_key("a", "x").model_dump()] * 2), "duplicate name 'a'"),
        (yaml.safe_dump([make_key("a", "").model_dump()]), "hash of an empty key"),
    ],
)
def test_wrong_keys_file_is_rejected(tmp_path, monkeypatch, text, says):
    monkeypatch.delenv(VARIABLE, raising=False)
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=says):
        read_keys(str(file))


def test_missing_keys_file_is_named():
    with pytest.raises(ValueError, match="nowhere"):
        read_keys("nowhere.yaml")


def test_rate_limit_refills_with_time_and_gives_retry_after():
    now = [0.0]
    client = Client(make_key("a", "x", edits_per_minute=60), clock=lambda: now[0])
    client.charge(60)
    with pytest.raises(RefusedError, match="limited to 60 edits a minute") as refused:
        client.charge(5)
    assert (refused.value.status, refused.value.retry_after) == (429, 5)
    now[0] = 5.0
    client.charge(5)
    now[0] = 1e6
    client.charge(60)  # no more than a minute's worth is saved up
    with pytest.raises(RefusedError):
        client.charge(1)


def test_refund_gives_back_what_was_charged_and_no_more():
    client = Client(make_key("a", "x", edits_per_minute=60), clock=lambda: 0.0)
    client.charge(2)
    client.refund(1)
    assert client.tokens == 59
    client.refund(99)
    assert client.tokens == 60


def test_slots_are_freed_on_leave():
    client = Client(make_key("a", "x", concurrent_edits=4), ingresses=2)
    client.enter(Load(2, 7))
    with pytest.raises(RefusedError, match="the work of 2 of 2 edits in flight"):
        client.enter(Load(1, 7))
    client.leave(Load(2, 7))
    client.enter(Load(1, 7))
    assert (client.work, client.memory) == (1, 7)


def write_keys(file, *names: str, **limits: int) -> None:
    file.write_text(yaml.safe_dump([make_key(name, name, **limits).model_dump() for name in names]))


def test_a_changed_file_is_taken_over_without_a_restart(tmp_path):
    now, file = [0.0], tmp_path / "keys.yaml"
    write_keys(file, "kept", "revoked")
    clients = Clients(read_keys(str(file)), file=str(file), clock=lambda: now[0])
    kept = clients.of("Bearer kept")
    assert kept is not None
    kept.charge(5)

    write_keys(file, "kept", "new")
    now[0] += Clients.RECHECK
    assert clients.of("Bearer kept") is kept, "its use is forgotten"
    assert clients.of("Bearer new") is not None
    with pytest.raises(RefusedError):
        clients.of("Bearer revoked")


@pytest.mark.parametrize("damage", ["", "[{", "[]", None])
def test_a_damaged_file_leaves_the_keys_as_they_are(tmp_path, damage):
    now, file = [0.0], tmp_path / "keys.yaml"
    write_keys(file, "shop")
    clients = Clients(read_keys(str(file)), file=str(file), clock=lambda: now[0])
    file.unlink() if damage is None else file.write_text(damage)
    now[0] += Clients.RECHECK
    assert clients.of("Bearer shop") is not None
    write_keys(file, "other")
    now[0] += Clients.RECHECK
    with pytest.raises(RefusedError):
        clients.of("Bearer shop")


def test_new_limits_of_a_key_are_taken_over(tmp_path):
    now, file = [0.0], tmp_path / "keys.yaml"
    write_keys(file, "shop")
    clients = Clients(read_keys(str(file)), file=str(file), clock=lambda: now[0])
    write_keys(file, "shop", concurrent_edits=3)
    now[0] += Clients.RECHECK
    client = clients.of("Bearer shop")
    assert client is not None and client.slots == 3


def test_without_keys_any_header_is_accepted():
    assert Clients(None).of("Bearer anything") is None


def test_hash_covers_the_whole_key():
    assert make_key("a", "x").sha256 == hashlib.sha256(b"x").hexdigest()
