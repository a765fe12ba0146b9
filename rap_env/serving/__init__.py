"""OpenAI-compatible HTTP server over a `rap_env.runtime.engine.Engine`.

Its web packages are the extra ``serve``. The settings (`rap_env.serving.settings`) do not
need it; `rap_env.serving.stack` checks for it before it loads a model.
"""
