"""What the routes ask of a request: the gateway, the client, and a place for what they hold."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Header, Request

from serve.gateway import Gateway
from serve.keys import Client
from serve.schema import ErrorResponse

T = TypeVar("T")

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "a field is wrong: the answer names it"},
    401: {"model": ErrorResponse, "description": "a key is missing or unknown"},
    403: {"model": ErrorResponse, "description": "an endpoint without keys serves its own machine only"},
    404: {"model": ErrorResponse, "description": "no such version, or no such edit"},
    408: {"model": ErrorResponse, "description": "the upload was too slow, or the edit missed its deadline"},
    413: {"model": ErrorResponse, "description": "the body or the file is too large"},
    415: {"model": ErrorResponse, "description": "the content type is wrong"},
    429: {"model": ErrorResponse, "description": "too many requests: retry after Retry-After seconds"},
    503: {"model": ErrorResponse, "description": "the service is ending: retry after Retry-After seconds"},
}


async def _gateway(request: Request) -> Gateway:
    return request.app.state.gateway


async def _client(request: Request) -> Client | None:
    """Return the client of a request, whose body is parsed by now."""
    if parsed := request.scope.get("body_parsed"):
        parsed()
    return request.scope["client_of_key"]


async def _until_answered() -> AsyncIterator[contextlib.ExitStack]:
    """Yield a stack that is closed when the answer has been sent or the client is gone."""
    with contextlib.ExitStack() as stack:
        yield stack


CurrentGateway = Annotated[Gateway, Depends(_gateway)]
CurrentClient = Annotated[Client | None, Depends(_client)]  # None when the endpoint has no keys
UntilAnswered = Annotated[contextlib.ExitStack, Depends(_until_answered)]
ModelVersion = Annotated[str | None, Header(description="one of /v1/models; takes precedence over the field `model`")]


async def run_all(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines concurrently and return their results in order.

    The first failure cancels the others and is raised.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
