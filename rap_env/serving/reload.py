"""What SIGHUP reads again while the server runs: files of keys, and the memory limit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING

from rap_env.errors import RapError
from rap_env.serving.settings import ServerSettings

if TYPE_CHECKING:
    from rap_env.serving.app import Service

log = logging.getLogger(__name__)


def reload_settings(service: Service, reread: Callable[[], ServerSettings] | None) -> None:
    """Read the files of keys again, and the settings; what is not valid changes nothing.

    Of the settings, the number of bytes of `memory` or `model_memory` changes at once. Others that
    differ are logged: they change when the server starts again.

    Args:
        service: What the server's routes share.
        reread: Reads the settings again; None if they cannot have changed.
    """
    for keys in (service.api_keys, service.admin_keys):
        if keys is not None:
            keys.reload()
    if reread is None:
        return
    try:
        new = reread()
        _change_limit(service, new)
    except (RapError, OSError) as error:
        log.error("The settings stay as they were: %s", error)
        return
    old = service.settings
    limit = service.limit
    live = () if limit is None else (limit.name,)
    changed = [
        field.name
        for field in fields(new)
        if getattr(new, field.name) != getattr(old, field.name) and field.name not in live
    ]
    if changed:
        log.warning("The server must start again for changes of: %s.", ", ".join(changed))


def _change_limit(service: Service, new: ServerSettings) -> None:
    """Apply the limit of new settings if it is one of the same kind and differs."""
    limit = service.limit
    if limit is None:
        return
    value = new.process_bytes if limit.name == "memory" else new.model_bytes
    if value is not None and value != limit.setting_bytes:
        limit.set(value, "setting")
