"""The FastAPI application of an ingress."""

from fastapi import FastAPI

from serve.error_handlers import add_error_handlers
from serve.gateway import Gateway
from serve.guard import RequestGuard
from serve.keys import Clients
from serve.routers import edits, info, openai, page


def make_api(gateway: Gateway, clients: Clients) -> FastAPI:
    """Return the application. Its routes find the gateway in `app.state.gateway`."""
    api = FastAPI(
        title="ip2p",
        summary="Edit images by written instructions",
        docs_url=None,  # Swagger's page loads its script from another site
        redoc_url=None,
    )
    api.state.gateway = gateway
    api.add_middleware(
        RequestGuard,
        clients=clients,
        upload_s=gateway.recipe.serve.upload_s,
        count=gateway.metrics.count_request,
    )
    add_error_handlers(api)
    for module in (page, info, openai, edits):
        api.include_router(module.router)
    return api
