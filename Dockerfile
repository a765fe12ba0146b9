# An image that serves a model on a CPU, built from the wheel:
#   docker build -t rap-env .
#   docker run -p 8000:8000 -v rap-cache:/var/cache/rap -v "$PWD/api-keys:/run/secrets/api-keys:ro" \
#     rap-env serve --host 0.0.0.0 --api-key-file /run/secrets/api-keys
# With --build-arg TORCH_BACKEND=cu128 (or another one that uv knows), it has torch for that GPU driver.

FROM python:3.12-slim-bookworm AS build
ARG TORCH_BACKEND=cpu
WORKDIR /source
COPY pyproject.toml setup.cfg README.md LICENSE constraints.txt ./
COPY rap_env rap_env
RUN python -m pip install --no-cache-dir "uv>=0.6,<1" \
    && python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && uv venv /opt/rap \
    && uv pip install --no-cache --python /opt/rap/bin/python --torch-backend "${TORCH_BACKEND}" \
        --constraint constraints.txt --compile-bytecode "$(echo /wheels/*.whl)[serve]"

FROM python:3.12-slim-bookworm
RUN useradd --system --uid 10001 --home-dir /var/cache/rap --create-home rap
COPY --from=build /opt/rap /opt/rap
ENV PATH=/opt/rap/bin:$PATH \
    RAP_CACHE_DIR=/var/cache/rap \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /var/cache/rap
# Models, and the files of weights that are not in memory.
VOLUME /var/cache/rap
EXPOSE 8000
# Not /readyz: a server that waits for memory or for its weights recovers by itself.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["rap"]
# The server starts at this address only with --api-key-file or --insecure.
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
