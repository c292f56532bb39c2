"""Routes about the service, and the route that takes feedback."""

import asyncio
import errno
import logging
from datetime import UTC, datetime

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from serve import feedback
from serve.bodies import BodyRoute
from serve.engine_client import READY_WITHIN
from serve.errors import RefusedError
from serve.gateway import Gateway
from serve.routers.dependencies import REFUSALS, CurrentClient, CurrentGateway
from serve.schema import Defaults, ErrorResponse, Feedback, Health, Limits, Model, Models

logger = logging.getLogger("ray.serve")
router = APIRouter(route_class=BodyRoute)


@router.get("/healthz")
async def healthz(gateway: CurrentGateway) -> Health:
    """Answers as long as this process is alive."""
    return Health(model=gateway.engines.main_version)


@router.get("/readyz", responses={503: {"model": ErrorResponse}})
async def readyz(gateway: CurrentGateway) -> Health:
    """Answers once a model is loaded and warm, or when engines start on demand."""
    wakes = gateway.recipe.serve.replicas[0] == 0  # asking would wake an engine that scaled to zero
    if gateway.admission.draining:
        raise RefusedError("the service is ending", 503)
    if not wakes and not await gateway.engines.ready():
        raise RefusedError("no engine is warm yet: retry later", 503, retry_after=READY_WITHIN)
    return Health(model=gateway.engines.main_version)


@router.get("/metrics", include_in_schema=False)
async def metrics(gateway: CurrentGateway) -> Response:
    return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/defaults", responses={401: REFUSALS[401]})
async def defaults(gateway: CurrentGateway) -> Defaults:
    """Returns the values of fields that a request leaves out, and the limits."""
    sampling = gateway.recipe.sampling
    return Defaults(
        model=gateway.engines.main_version,
        guidance_scale=sampling.guidance_scale,
        image_guidance_scale=sampling.image_guidance_scale,
        num_inference_steps=sampling.steps,
        solver=sampling.solver,
        limits=Limits(max_pixels=gateway.recipe.serve.max_pixels),
    )


@router.get("/v1/models", responses={401: REFUSALS[401]})
async def models(gateway: CurrentGateway) -> Models:
    """Lists the versions that are served."""
    return Models(data=[_model(gateway, name) for name in gateway.engines.handles])


@router.get("/v1/models/{model}", responses={401: REFUSALS[401], 404: REFUSALS[404]})
async def model(gateway: CurrentGateway, model: str) -> Model:
    """Describes a version that is served."""
    if model not in gateway.engines.handles:
        served = ", ".join(gateway.engines.handles)
        raise RefusedError(f"model: {model[:80]!r} is not served; choose one of {served}", 404, param="model")
    return _model(gateway, model)


def _model(gateway: Gateway, name: str) -> Model:
    return Model(id=name, created=gateway.started, share=gateway.engines.shares.get(name, 0.0))


@router.post(
    "/v1/feedback",
    status_code=204,
    responses=REFUSALS | {409: {"model": ErrorResponse}},
)
async def give_feedback(gateway: CurrentGateway, client: CurrentClient, given: Feedback) -> None:
    """Stores a person's opinion of an edit of the same key. It replaces an earlier one."""
    record = feedback.read_edit_id(given.edit_id, gateway.secret)
    if record is None or record["client"] != (client.key.name if client else ""):
        message = "edit_id: unknown; send the edit_id of an answer to the same key"
        raise RefusedError(message, 404, param="edit_id")
    if gateway.workspace is None:
        message = "feedback needs a workspace that can be written: start the service with --workspace"
        raise RefusedError(message, 409)
    opinion = {"edit_id": given.edit_id, "choice": given.choice, "comment": given.comment}
    row = record | opinion | {"time": datetime.now(UTC)}
    try:
        await asyncio.to_thread(feedback.store, gateway.workspace, row)
    except OSError as error:
        logger.exception("feedback could not be stored")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise RefusedError("feedback can't be stored: the workspace can't be written", 409) from error
        raise RefusedError("feedback can't be stored now: retry later", 503, retry_after=10) from error
