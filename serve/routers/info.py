"""Routes about the service, and the route that takes feedback."""

import asyncio
from datetime import UTC, datetime

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from serve import feedback
from serve.errors import RefusedError
from serve.routers.dependencies import REFUSALS, CurrentGateway
from serve.schema import Defaults, ErrorResponse, Feedback, Health, Limits, Model, Models

READY_WITHIN = 5  # seconds that an engine may take to answer /readyz

router = APIRouter()


@router.get("/healthz")
async def healthz(gateway: CurrentGateway) -> Health:
    """Answers as long as this process is alive."""
    return Health(model=gateway.engines.main_version)


@router.get("/readyz", responses={503: {"model": ErrorResponse}})
async def readyz(gateway: CurrentGateway) -> Health:
    """Answers once a model is loaded and warm, or when engines start on demand."""
    if gateway.recipe.serve.replicas[0]:  # asking would wake an engine that scaled to zero
        try:
            async with asyncio.timeout(READY_WITHIN):
                await gateway.engines.ready()
        except TimeoutError as error:
            message = "no engine is warm yet: retry later"
            raise RefusedError(message, 503, retry_after=READY_WITHIN) from error
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
    shares = gateway.engines.shares
    return Models(
        data=[Model(id=name, created=gateway.started, share=shares.get(name, 0.0)) for name in gateway.engines.handles]
    )


@router.post(
    "/v1/feedback",
    status_code=204,
    responses=REFUSALS | {404: {"model": ErrorResponse}, 409: {"model": ErrorResponse}},
)
async def give_feedback(gateway: CurrentGateway, given: Feedback) -> None:
    """Stores a person's opinion of an edit."""
    record = feedback.read_edit_id(given.edit_id, gateway.secret)
    if record is None:
        message = "edit_id: unknown; send the edit_id of an answer"
        raise RefusedError(message, 404, param="edit_id")
    if gateway.workspace is None:
        message = "feedback needs a workspace: start the service with --workspace"
        raise RefusedError(message, 409)
    opinion = {"edit_id": given.edit_id, "choice": given.choice, "comment": given.comment}
    row = record | opinion | {"time": datetime.now(UTC)}
    await asyncio.to_thread(feedback.append, gateway.workspace, row)
