"""The contract of conditional writes, in every kind of store."""

import errno
import fcntl

import pytest

from ip2p.workspace import Workspace
from runtime import atomic_file
from runtime.atomic_file import ChangedError, PlainFile, UnsupportedError
from tests.runtime import s3
from tests.runtime.stores import Gcs, Proxy, atomic_puts, serving


@pytest.fixture
def s3_environment(monkeypatch):
    """Environment in which pyarrow and boto3 find the server, without its address."""
    with s3.s3_server() as environment, atomic_puts(monkeypatch):
        address = environment.pop("AWS_ENDPOINT_URL")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield address


@pytest.fixture
def proxy(s3_environment, monkeypatch):
    with serving(Proxy(s3_environment)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.address}")
        yield proxy


@pytest.fixture
def gcs():
    with serving(Gcs()) as server:
        yield server


@pytest.fixture(params=["folder", "s3", "gcs", "plain"])
def file(request, tmp_path):
    if request.param == "s3":
        request.getfixturevalue("proxy")
        return atomic_file.atomic_file(Workspace("s3://bucket/run"), "a.json")
    if request.param == "gcs":
        location = request.getfixturevalue("gcs").location("run")
        return atomic_file.atomic_file(Workspace(location), "a.json")
    workspace = Workspace(tmp_path / "run")
    if request.param == "plain":
        return PlainFile(workspace, "a.json")
    return atomic_file.atomic_file(workspace, "a.json")


def test_write_succeeds_only_on_the_version_that_stands_there(file):
    assert file.read() is None
    first = file.write("1", None)
    with pytest.raises(ChangedError):
        file.write("other", None)
    second = file.write("2", first)
    with pytest.raises(ChangedError):
        file.write("other", first)
    stored = file.read()
    assert (stored.content, stored.version) == ("2", second)
    assert stored.age < 30
    assert file.read().version == file.read().version
    assert file.write("3", stored.version) == file.read().version


def test_a_removed_file_has_changed(s3_environment, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_environment)
    workspace = Workspace("s3://bucket/run")
    file = atomic_file.atomic_file(workspace, "a.json")
    version = file.write("1", None)
    workspace.fs.delete_file(workspace.path("a.json"))
    with pytest.raises(ChangedError):
        file.write("2", version)


@pytest.mark.parametrize("mode", ["ignore", "refuse"])
def test_a_store_without_conditional_writes_is_recognised(proxy, mode):
    proxy.mode = mode
    file = atomic_file.atomic_file(Workspace("s3://bucket/run"), "a.json")
    with pytest.raises(UnsupportedError, match=r"was ignored|NotImplemented"):
        file.write("1", None)


def test_boto_uses_the_endpoint_and_region_of_the_uri(s3_environment):
    address = s3_environment.removeprefix("http://")
    query = f"region=eu-west-3&scheme=http&endpoint_override={address}"
    workspace = Workspace(f"s3://bucket/run?{query}")
    version = atomic_file.atomic_file(workspace, "a.json").write("1", None)
    assert workspace.open_in("a.json").read() == b"1", "pyarrow finds what boto3 wrote"
    client = atomic_file.s3_client(workspace)
    assert (client.meta.endpoint_url, client.meta.region_name) == (s3_environment, "eu-west-3")
    assert version


def test_a_missing_bucket_is_an_os_error(s3_environment, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_environment)
    with pytest.raises(OSError, match="NoSuchBucket"):
        atomic_file.atomic_file(Workspace("s3://nobucket/run"), "a.json").read()


def test_gcs_uploads_are_retried(gcs):
    gcs.failures = 2
    file = atomic_file.atomic_file(Workspace(gcs.location("run/deep")), "a.json")
    assert file.write("1", None)
    assert list(gcs.objects) == ["run/deep/a.json"]
    gcs.failures = 3
    with pytest.raises(OSError, match="HTTP status 503"):
        file.write("2", file.read().version)


def test_a_folder_without_flock_is_recognised(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UnsupportedError, match="flock"):
        atomic_file.atomic_file(Workspace(tmp_path), "a.json").write("1", None)


def test_a_lock_that_is_never_released_ends_the_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_file, "LOCK_TIMEOUT", 0.2)
    with (tmp_path / ".a.json.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match=r"\.a\.json\.lock: locked for"):
            atomic_file.atomic_file(Workspace(tmp_path), "a.json").write("1", None)
