"""/docs: the API's document as a page that works offline: its scripts come with a package, where those of FastAPI's
own page are loaded from elsewhere."""

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

_FILES = "docs/files"


def add_docs_page(app: FastAPI) -> None:
    """Add the page and its files."""

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=f"{app.title} - API",
            swagger_js_url=f"{_FILES}/swagger-ui-bundle.js",
            swagger_css_url=f"{_FILES}/swagger-ui.css",
            swagger_favicon_url=f"{_FILES}/favicon-32x32.png",
            swagger_ui_parameters={"filter": True, "tryItOutEnabled": True},
        )

    app.mount(f"/{_FILES}", StaticFiles(packages=[("fastapi_swagger", "resources")]))
