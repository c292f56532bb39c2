"""The page at /, its style and its script."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

STATIC = Path(__file__).parents[1] / "static"
# Without this a browser may combine the page of one release with the script of another.
REVALIDATE = {"cache-control": "no-cache"}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> FileResponse:
    return FileResponse(STATIC / "page.html", headers=REVALIDATE)


@router.get("/static/page.css")
async def style() -> FileResponse:
    return FileResponse(STATIC / "page.css", headers=REVALIDATE)


@router.get("/static/page.js")
async def script() -> FileResponse:
    return FileResponse(STATIC / "page.js", media_type="text/javascript", headers=REVALIDATE)
