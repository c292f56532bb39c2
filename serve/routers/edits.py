"""POST /v1/edits: several edits of one image, at once or as a stream of events."""

import asyncio
import base64
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from math import ceil
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from serve.bodies import BodyRoute
from serve.engine_client import EditCall, EditResult
from serve.errors import RefusedError, before
from serve.gateway import Gateway, RequestContext, edit_request, work
from serve.load import Load, memory_of
from serve.pictures import Source
from serve.routers.dependencies import (
    REFUSALS,
    CurrentClient,
    CurrentGateway,
    ModelVersion,
    UntilAnswered,
    run_all,
)
from serve.schema import Edit, Edited, EditsRequest, EditsResponse

logger = logging.getLogger("ray.serve")
router = APIRouter(route_class=BodyRoute)

MAX_PREVIEWS = 10  # of an edit

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

    With `stream`, the answer is events: `progress`, `preview`, `result`, `error`, `done`. An edit
    has at most 10 previews, as JPEG.
    """
    version = gateway.engines.choose(x_model_version, asked.model)
    context = RequestContext(gateway, version, client.key.name if client else "", asked.deadline_s)
    preview_every = asked.preview_every if asked.stream else 0
    async with before(context.deadline):
        upload = await context.inspect(asked.image)
        spaces = [_spaced(gateway, one, preview_every) for one in asked.edits]
        loads = [work(gateway, upload, one, every) for one, every in zip(asked.edits, spaces)]
        lossless = asked.output_format in ("png", "webp")
        memory = memory_of(len(upload.data), upload.pixels, len(loads) * upload.pixels, lossless)
        until_answered.enter_context(gateway.admission.admit(client, len(loads), Load(sum(loads), memory)))

        source, fitted = await context.decode(upload, asked.output_format)
        requests = [edit_request(one, one.instruction, fitted, gateway.recipe.sampling) for one in asked.edits]
        calls = [context.call(*pair, f"edits.{index}") for index, pair in enumerate(zip(requests, loads))]
        edits = _Edits(gateway, calls, source)
        if not asked.stream:
            made = await run_all(edits.make(index) for index in range(len(calls)))
            return EditsResponse(created=int(time.time()), model=made[0].model, edits=made)
    return StreamingResponse(
        edits.events(spaces), media_type="text/event-stream", headers={"cache-control": "no-store"}
    )


def _spaced(gateway: Gateway, edit: Edit, preview_every: int) -> int:
    """Return the steps between previews, so that an edit has at most MAX_PREVIEWS. 0 means none."""
    steps = edit.num_inference_steps or gateway.recipe.sampling.steps
    return preview_every and max(preview_every, ceil(steps / MAX_PREVIEWS))


class _Outbox:
    """The unsent events. A newer progress or preview of an edit replaces an older one."""

    def __init__(self) -> None:
        self._events: dict[tuple[str, int], dict[str, Any]] = {}  # by name and index of the edit
        self._filled = asyncio.Event()

    def put(self, name: str, index: int, data: dict[str, Any]) -> None:
        self._events.pop((name, index), None)
        self._events[name, index] = data
        self._filled.set()

    async def get(self) -> Event:
        while not self._events:
            self._filled.clear()
            await self._filled.wait()
        (name, index), data = next(iter(self._events.items()))
        del self._events[name, index]
        return name, data


@dataclass(frozen=True, eq=False)
class _Edits:
    """The edits of one request."""

    gateway: Gateway
    calls: list[EditCall]
    source: Source

    async def make(self, index: int) -> Edited:
        """Return an edit. Raises `RefusedError`."""
        return await self._finish(index, await self.gateway.engines.edit(self.calls[index]))

    async def events(self, preview_every: list[int]) -> AsyncIterator[str]:
        """Yield server-sent events as they arrive. Closing the iterator cancels the edits."""
        outbox = _Outbox()
        task = asyncio.create_task(self._follow_all(preview_every, outbox))
        try:
            name = ""
            while name != "done":
                name, data = await outbox.get()
                yield f"event: {name}\ndata: {json.dumps(data)}\n\n"
        finally:
            task.cancel()

    async def _follow_all(self, preview_every: list[int], outbox: _Outbox) -> None:
        await asyncio.gather(*(self._follow_safely(k, every, outbox) for k, every in enumerate(preview_every)))
        outbox.put("done", 0, {})

    async def _follow_safely(self, index: int, preview_every: int, outbox: _Outbox) -> None:
        """Put an edit's events into the outbox. A failure is an event, so other edits continue."""
        try:
            await self._follow(index, preview_every, outbox)
        except RefusedError as error:
            outbox.put("error", index, {"index": index, "message": error.message})
        except Exception as error:
            message = f"the edit failed ({type(error).__name__}): try again"
            outbox.put("error", index, {"index": index, "message": message})
            logger.exception("an edit failed")

    async def _follow(self, index: int, preview_every: int, outbox: _Outbox) -> None:
        call = self.calls[index]
        events = self.gateway.engines.follow(call, preview_every)
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, EditResult):
                    async with before(call.deadline):
                        edited = await self._finish(index, event)
                    outbox.put("result", index, edited.model_dump())
                    continue
                progress = {"index": index, "step": event.step, "steps": call.request.steps}
                outbox.put("progress", index, progress)
                if event.preview is not None:
                    file = await self.gateway.pictures.encode_preview(call.client, event.preview)
                    picture = {"output_format": "jpeg", "image": base64.b64encode(file).decode()}
                    outbox.put("preview", index, progress | picture)

    async def _finish(self, index: int, result: EditResult) -> Edited:
        call, (height, width) = self.calls[index], self.source.rgb.shape[:2]
        request = call.request
        file, edit_id = await self.gateway.pictures.finish(call.client, request, self.source, result, (height, width))
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
            output_format=self.source.output_format,
            image=base64.b64encode(file).decode(),
        )
