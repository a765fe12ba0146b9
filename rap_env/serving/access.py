"""Access to the server: API keys, TLS, and which addresses may be open without a key."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import socket
import ssl
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from rap_env.errors import ServingSettingsError
from rap_env.serving.errors import ApiError
from rap_env.serving.settings import ServerSettings

log = logging.getLogger(__name__)

PROBE_PATHS = frozenset({"/livez", "/readyz", "/healthz", "/health"})
"""Paths of the probes, which need no key."""
UNLIMITED_PATHS = PROBE_PATHS | {"/metrics", "/admin/budget"}
"""Paths that are answered above the connection limit too."""
_KEY = re.compile(r"[!-~]+")  # what a header can hold without quotes


class ApiKeys:
    """The keys of a file, of which only the SHA-256 stays in memory.

    Args:
        path: The file: one key per line; empty lines and those that begin with # are skipped.
        name: The setting that names the file.

    Raises:
        ServingSettingsError: The file cannot be read, has no key, or a line is not a key. The
            message does not quote the line.
    """

    def __init__(self, path: str, name: str = "api_key_file") -> None:
        self._path = path
        self._name = name
        self._digests = _read_keys(path, name)

    def reload(self) -> None:
        """Read the file again; if it is not valid, log why, and keep the keys."""
        try:
            self._digests = _read_keys(self._path, self._name)
        except ServingSettingsError as error:
            log.error("The keys stay as they were: %s", error)
        else:
            log.info("Read %d keys from %s.", len(self._digests), self._path)

    def shares_with(self, other: ApiKeys) -> bool:
        """Whether some key is in both files."""
        return not self._digests.isdisjoint(other._digests)

    def __contains__(self, key: str) -> bool:
        """Whether a key is one of them; takes the same time for every key."""
        given = _digest(key)
        return sum(hmac.compare_digest(known, given) for known in self._digests) > 0


def open_keys(settings: ServerSettings) -> tuple[ApiKeys | None, ApiKeys | None]:
    """The keys of clients and those of administrators; None for a file that is not set.

    Raises:
        ServingSettingsError: As for `ApiKeys`, or both files have a key in common.
    """
    clients, admins = settings.api_key_file, settings.admin_key_file
    keys = None if clients is None else ApiKeys(clients)
    admin_keys = None if admins is None else ApiKeys(admins, "admin_key_file")
    if keys is not None and admin_keys is not None and keys.shares_with(admin_keys):
        raise ServingSettingsError(
            f"api_key_file {clients} and admin_key_file {admins} must have no key in common: with "
            "it a client could set the memory limit."
        )
    return keys, admin_keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _read_keys(path: str, name: str) -> frozenset[bytes]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ServingSettingsError(f"Cannot read {name} {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ServingSettingsError(f"{name} {path} must be a text file in UTF-8.") from None
    keys = {
        number: line
        for number, line in enumerate(map(str.strip, lines), start=1)
        if line and not line.startswith("#")
    }
    for number, key in keys.items():
        if not _KEY.fullmatch(key):
            raise ServingSettingsError(
                f"Line {number} of {name} {path} must be a key of visible ASCII characters "
                "without spaces, or a comment that begins with #."
            )
    if not keys:
        raise ServingSettingsError(
            f"{name} {path} has no key; write one per line, for example the output of "
            "'openssl rand -hex 32'."
        )
    return frozenset(map(_digest, keys.values()))


class RequireApiKey:
    """ASGI middleware that answers 401 to requests without a valid key, except probes.

    Args:
        app: The application.
        keys: The keys of clients, who send ``Authorization: Bearer KEY``; None if none is needed.
        admin_keys: The keys of administrators, which the paths below ``/admin`` need instead.
    """

    def __init__(
        self, app: ASGIApp, keys: ApiKeys | None, admin_keys: ApiKeys | None = None
    ) -> None:
        self._app = app
        self._keys = keys
        self._admin_keys = admin_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        app, keys = self._app, self._keys
        if scope["type"] == "http" and scope["path"] not in PROBE_PATHS:
            if self._admin_keys is not None and scope["path"].startswith("/admin"):
                keys = self._admin_keys
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            if keys is not None and (scheme.lower() != "bearer" or key.strip() not in keys):
                app = _unauthorized(missing=not key).response(scope)
        await app(scope, receive, send)


def _unauthorized(*, missing: bool) -> ApiError:
    seen = "You didn't provide an API key" if missing else "Incorrect API key provided"
    return ApiError(
        401,
        f"{seen}; send a key of this server in the header 'Authorization: Bearer KEY'.",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def check_access(settings: ServerSettings) -> None:
    """Check the files of keys and certificates, before anything that takes time.

    Raises:
        ServingSettingsError: As for `ApiKeys`, or the certificate and its key are not usable.
    """
    open_keys(settings)
    certificate, key = settings.ssl_certfile, settings.ssl_keyfile
    if certificate is None:
        if key is not None:
            raise ServingSettingsError(
                "ssl_keyfile needs ssl_certfile, the certificate that belongs to the key."
            )
        return
    for name, path in (("ssl_certfile", certificate), ("ssl_keyfile", key)):
        try:
            if path is not None:
                Path(path).read_bytes()
        except OSError as error:
            raise ServingSettingsError(f"Cannot read {name} {path}: {error.strerror}.") from None
    try:
        # A password callback, so that an encrypted key is an error instead of a question.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise ServingSettingsError(
            f"ssl_certfile {certificate} and ssl_keyfile {key or '(the same file)'} must be a "
            f"certificate and its unencrypted private key in PEM format ({error})."
        ) from None


def check_address(bound: socket.socket, settings: ServerSettings) -> None:
    """Refuse to serve without keys at an address that others can reach, unless `insecure` is set.

    Raises:
        ServingSettingsError: The address is no loopback address, and there are no keys.
    """
    host, port = bound.getsockname()[:2]
    if ipaddress.ip_address(host).is_loopback or settings.api_key_file is not None:
        return
    if not settings.insecure:
        raise ServingSettingsError(
            f"Others can reach {host}:{port}, and no API key is required: set api_key_file to a "
            "file of keys (one per line) or host to 127.0.0.1, or set insecure to serve without."
        )
    log.warning("Every client that reaches %s:%d can use it: it requires no API key.", host, port)
