"""JSON bodies of HTTP errors, in the shape of OpenAI's API."""

import json
from difflib import get_close_matches
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from serve.bodies import BODIES
from serve.errors import RefusedError
from serve.schema import Edit, EditForm, EditsRequest, ErrorResponse, Feedback, Problem

ERROR_TYPES = {401: "authentication_error", 403: "authentication_error", 429: "rate_limit_error"}
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
SHOWN_FIELDS = 8  # wrong fields named in one message
FIELDS = sorted({name for model in (EditForm, EditsRequest, Edit, Feedback) for name in model.model_fields})


def add_error_handlers(api: FastAPI) -> None:
    api.add_exception_handler(RefusedError, refused)  # pyright: ignore[reportArgumentType]
    api.add_exception_handler(RequestValidationError, invalid_fields)  # pyright: ignore[reportArgumentType]
    api.add_exception_handler(HTTPException, http_error)  # pyright: ignore[reportArgumentType]
    api.add_exception_handler(Exception, internal_error)


async def refused(_: Request, error: RefusedError) -> Response:
    body, headers = refusal(error)
    return Response(body, error.status, headers)


async def invalid_fields(_: Request, error: RequestValidationError) -> JSONResponse:
    """Describe each wrong field in a line, without its value, which may be a whole file."""
    problems = [(_field(one["loc"]), _problem(one)) for one in error.errors()]
    message = "; ".join(f"{field}: {text}"[:300] for field, text in problems[:SHOWN_FIELDS])
    return _answer(Problem(message=message, param=problems[0][0]), 400)


async def internal_error(_: Request, error: Exception) -> JSONResponse:
    """Answer a bug of ours, whose traceback Starlette logs. The guard's headers are not added here."""
    message = f"the service failed ({type(error).__name__}); the same request may fail again"
    return _answer(Problem(message=message, type="server_error"), 500, SECURITY_HEADERS)


async def http_error(request: Request, error: HTTPException) -> Response:
    """Describe a wrong path, method or body, and list what is available. OPTIONS is answered."""
    if error.status_code == 405 and request.method == "OPTIONS":
        return Response(status_code=204, headers=error.headers)
    if error.status_code in (404, 405):
        paths = request.app.openapi()["paths"].items()
        available = [f"{method.upper()} {path}" for path, item in paths for method in item]
        way_out = f"there are {', '.join(available)}, and /openapi.json"
    else:
        limits = BODIES.get(request.url.path)
        content = limits.content_type if limits else "a well-formed body"
        way_out = f"send {content}, as /openapi.json describes it"
    message = f"{request.method} {request.url.path[:200]}: {error.detail}; {way_out}"
    return _answer(Problem(message=message), error.status_code, error.headers)


def refusal(error: RefusedError) -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of the answer to a refused request."""
    kind = ERROR_TYPES.get(error.status, "invalid_request_error")
    problem = Problem(message=error.message, param=error.param, type=kind)
    headers = {"content-type": "application/json"}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return json.dumps(ErrorResponse(error=problem).model_dump()).encode(), headers


def _answer(problem: Problem, status: int, headers=None) -> JSONResponse:
    return JSONResponse(ErrorResponse(error=problem).model_dump(), status, headers)


def _problem(error: dict[str, Any]) -> str:
    if error["type"] != "extra_forbidden":
        return error["msg"].removeprefix("Value error, ")
    given = str(error["loc"][-1])
    containing = [name for name in FIELDS if given and given.lower() in name]
    near = containing[:1] or get_close_matches(given, FIELDS, n=1)
    return f"unknown field; did you mean {near[0]}?" if near else "unknown field; /openapi.json lists the known ones"


def _field(location: tuple[int | str, ...]) -> str:
    """Return the dotted name of a field: ('body', 'edits', 0, 'seed') -> edits.0.seed.

    For a body that can't be parsed at all, pydantic gives a position instead of a name.
    """
    where = ".".join(map(str, location[1:]))[:100]
    return "body" if not where or where.isdigit() else where
