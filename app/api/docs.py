"""`GET /openapi.json`, and `GET /docs`, which shows it: a page of ours around Swagger UI.

Swagger UI comes from a public CDN, in exactly one version: the page has the digests of its files (computed from the npm package
`swagger-ui-dist`; a test computes them again), so a browser runs what was looked at or nothing. The page's policy allows these two
files, one script of a few lines, and requests to this service. It is the same for everybody: nothing of a request is in it.
"""

from __future__ import annotations

import base64
import hashlib

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from app.api.errors import json_response
from app.api.openapi import Document
from app.auth import Access

SWAGGER_UI = "5.35.0"
DIGESTS = {
    "swagger-ui.css": "sha384-WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I",
    "swagger-ui-bundle.js": "sha384-gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9",
}
_STYLE, _SCRIPT = (f"https://cdn.jsdelivr.net/npm/swagger-ui-dist@{SWAGGER_UI}/{file}" for file in DIGESTS)

# Relative, so that it is right wherever a proxy puts the service.
_START = """
if (window.SwaggerUIBundle) {
  SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null});
}
"""

PAGE = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Diskless</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{_STYLE}" integrity="{DIGESTS["swagger-ui.css"]}" crossorigin="anonymous">
<div id="swagger-ui">
<p>What this service answers is described in <a href="openapi.json">openapi.json</a>.
Swagger UI, which would show it here, could not be loaded.</p>
</div>
<script src="{_SCRIPT}" integrity="{DIGESTS["swagger-ui-bundle.js"]}" crossorigin="anonymous"></script>
<script>{_START}</script>
</html>
""".encode()


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


POLICY = "; ".join(
    [
        "default-src 'none'",
        f"script-src {_SCRIPT} '{_digest(_START)}'",
        f"style-src {_STYLE}",
        "img-src data:",  # the arrows in its style sheet
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = {"content-security-policy": POLICY, "referrer-policy": "no-referrer"}


def router(document: Document, access: Access) -> APIRouter:
    """Return the two routes. Where predictions need a key, what the document says of the models does as well."""
    routes = APIRouter(include_in_schema=False)

    async def openapi(request: Request) -> Response:
        may_ask = not access.needs_key or access.caller(request.scope["headers"]) is not None
        body = await document.read() if may_ask else document.of_no_model()
        if root := request.scope.get("root_path", "").rstrip("/"):
            body = b'{"servers":' + orjson.dumps([{"url": root}]) + b"," + body[1:]
        return json_response(200, body)

    async def docs() -> Response:
        return Response(PAGE, media_type="text/html", headers=_HEADERS)

    routes.add_api_route("/openapi.json", openapi, methods=["GET"])
    routes.add_api_route("/docs", docs, methods=["GET"])
    return routes
