"""An OpenAI-compatible HTTP server over a `rap_env.runtime.engine.Engine`.

It needs the extra ``serve``; without it, importing anything of this package raises
`MissingDependencyError`.
"""

from importlib.util import find_spec

from rap_env.errors import MissingDependencyError

for _module, _package in (
    ("fastapi", "fastapi"),
    ("uvicorn", "uvicorn"),
    ("prometheus_client", "prometheus-client"),
    ("jinja2", "jinja2"),  # of which chat templates are made
):
    if find_spec(_module) is None:
        raise MissingDependencyError(_package, "Serving", "serve")
