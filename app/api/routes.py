"""The paths that there are beside those of predictions, and what requests for them are counted as."""

from collections.abc import Mapping

from app.service_counters import Route

ROUTES: Mapping[str, Route] = {
    "/models/status": Route.STATUS,
    "/models/refresh": Route.REFRESH,
    "/metrics": Route.METRICS,
    "/openapi.json": Route.OPENAPI,
    "/docs": Route.DOCS,
    "/health": Route.HEALTH,
    "/health/live": Route.HEALTH,
    "/health/ready": Route.HEALTH,
}
HEALTH = frozenset(path for path, route in ROUTES.items() if route is Route.HEALTH)
