"""The page at /, its style and its script."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

STATIC = Path(__file__).parents[1] / "static"
# Without the first a browser may combine the page of one release with the script of another.
HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'none'; connect-src 'self'; img-src data: blob:; style-src 'self'; "
    "script-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> FileResponse:
    return FileResponse(STATIC / "page.html", headers=HEADERS)


@router.get("/static/page.css")
async def style() -> FileResponse:
    return FileResponse(STATIC / "page.css", headers=HEADERS)


@router.get("/static/page.js")
async def script() -> FileResponse:
    return FileResponse(STATIC / "page.js", media_type="text/javascript", headers=HEADERS)
