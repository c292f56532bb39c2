"""An S3 server on loopback, and the environment in which pyarrow finds it."""

from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import httpx
from moto.server import ThreadedMotoServer

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Serves a bucket named `bucket`; yields environment variables."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    try:
        client(address).create_bucket(Bucket="bucket")
        yield {**KEYS, "AWS_ENDPOINT_URL": address}
    finally:
        httpx.post(f"{address}/moto-api/reset", timeout=60)  # moto's buckets are the process's
        server.stop()


def client(address: str):  # boto3 makes its types at run time
    names = {"aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"]}
    return boto3.client("s3", endpoint_url=address, region_name="us-east-1", **names)


def enforce_authorization(address: str) -> None:
    """From now on keys must be known to the server, and allowed what they ask for."""
    httpx.post(f"{address}/moto-api/reset-auth", content=b"0", timeout=60).raise_for_status()
