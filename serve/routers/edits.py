"""POST /v1/edits: several edits of one image, at once or as a stream of events."""

import asyncio
import base64
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from ip2p.edit.editor import EditRequest
from serve.engine_client import EditResult
from serve.errors import RefusedError
from serve.gateway import Gateway, edit_request
from serve.pictures import Source, from_base64
from serve.routers.dependencies import (
    REFUSALS,
    CurrentClient,
    CurrentGateway,
    ModelVersion,
    UntilAnswered,
    run_all,
)
from serve.schema import Edited, EditsRequest, EditsResponse, OutputFormat

logger = logging.getLogger("ray.serve")
router = APIRouter()

Event = tuple[str, dict[str, Any]]  # name, data


@router.post(
    "/v1/edits",
    response_model=EditsResponse,
    responses={200: {"content": {"text/event-stream": {}}}} | REFUSALS,
)
async def edit(
    gateway: CurrentGateway,
    client: CurrentClient,
    until_answered: UntilAnswered,
    asked: EditsRequest,
    x_model_version: ModelVersion = None,
):
    """Makes several edits of one image.

    With `stream`, the answer is events: `progress`, `preview`, `result`, `error`, `done`.
    """
    version = gateway.engines.choose(x_model_version, asked.model)
    deadline = time.monotonic() + (asked.deadline_s or gateway.longest_edit)
    until_answered.enter_context(gateway.admission.admit(client, len(asked.edits)))

    model = await gateway.engines.describe(version, deadline)
    source = await gateway.pictures.decode(from_base64(asked.image), asked.output_format)
    fitted = await gateway.pictures.fit(source, model)
    sampling = gateway.recipe.sampling
    requests = [edit_request(one, one.instruction, fitted, sampling) for one in asked.edits]
    batch = _Edits(gateway, version, deadline, source, requests, asked.output_format)

    if asked.stream:
        headers = {"cache-control": "no-store"}
        events = batch.events(asked.preview_every)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    edits = await run_all(batch.make(index) for index in range(len(requests)))
    return EditsResponse(created=int(time.time()), model=edits[0].model, edits=edits)


@dataclass(frozen=True, eq=False)
class _Edits:
    """The edits of one request. deadline: by time.monotonic."""

    gateway: Gateway
    version: str
    deadline: float
    source: Source
    requests: list[EditRequest]
    output_format: OutputFormat

    async def make(self, index: int) -> Edited:
        """Return an edit. Raises `RefusedError`."""
        engines, request = self.gateway.engines, self.requests[index]
        result = await engines.edit(self.version, request, self.deadline, f"edits.{index}")
        return await self._finish(index, result)

    async def events(self, preview_every: int) -> AsyncIterator[str]:
        """Yield server-sent events as they arrive. Closing the iterator cancels the edits."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        task = asyncio.create_task(self._follow_all(preview_every, queue))
        try:
            name = ""
            while name != "done":
                name, data = await queue.get()
                yield f"event: {name}\ndata: {json.dumps(data)}\n\n"
        finally:
            task.cancel()

    async def _follow_all(self, preview_every: int, queue: asyncio.Queue[Event]) -> None:
        indices = range(len(self.requests))
        await asyncio.gather(*(self._follow_safely(k, preview_every, queue) for k in indices))
        queue.put_nowait(("done", {}))

    async def _follow_safely(self, index: int, preview_every: int, queue: asyncio.Queue[Event]) -> None:
        """Put an edit's events into the queue. A failure is an event, so other edits continue."""
        try:
            await self._follow(index, preview_every, queue)
        except RefusedError as error:
            queue.put_nowait(("error", {"index": index, "message": error.message}))
        except Exception as error:
            message = f"the edit failed ({type(error).__name__}): try again"
            queue.put_nowait(("error", {"index": index, "message": message}))
            logger.exception("an edit failed")

    async def _follow(self, index: int, preview_every: int, queue: asyncio.Queue[Event]) -> None:
        request = self.requests[index]
        events = self.gateway.engines.follow(self.version, request, self.deadline, f"edits.{index}", preview_every)
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, EditResult):
                    edited = await self._finish(index, event)
                    queue.put_nowait(("result", edited.model_dump()))
                    continue
                progress = {"index": index, "step": event.step, "steps": request.steps}
                queue.put_nowait(("progress", progress))
                if event.preview is not None:
                    file = await self.gateway.pictures.encode(event.preview, self.output_format)
                    picture = {"image": base64.b64encode(file).decode()}
                    queue.put_nowait(("preview", progress | picture))

    async def _finish(self, index: int, result: EditResult) -> Edited:
        request, (height, width) = self.requests[index], self.source.rgb.shape[:2]
        file, edit_id = await self.gateway.pictures.finish(
            request, self.source, result, self.output_format, (height, width)
        )
        return Edited(
            edit_id=edit_id,
            index=index,
            instruction=request.instruction,
            guidance_scale=request.guidance_scale,
            image_guidance_scale=request.image_guidance_scale,
            num_inference_steps=request.steps,
            negative_prompt=request.negative_prompt,
            seed=request.seed,
            solver=request.solver,
            model=result.engine.version,
            image=base64.b64encode(file).decode(),
        )
