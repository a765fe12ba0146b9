"""OpenAI-compatible HTTP server over a `rap_env.runtime.engine.Engine`.

Its web packages are the extra ``serve``. The settings (`rap_env.serving.settings`) do not need it;
`rap_env.serving.stack` checks for it before it loads a model.
"""

from importlib.util import find_spec

from rap_env.errors import MissingDependencyError

_PACKAGES = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "prometheus_client": "prometheus-client",
    "jinja2": "jinja2",  # renders chat templates
}


def require_extra() -> None:
    """Check that the packages of the extra ``serve`` are installed.

    Raises:
        MissingDependencyError: One is not.
    """
    for module, package in _PACKAGES.items():
        if find_spec(module) is None:
            raise MissingDependencyError(package, "Serving", "serve")
