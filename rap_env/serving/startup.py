"""The command ``rap serve``: checks before anything that takes time, then serves until a signal.

Importing it loads no torch.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import ipaddress
import logging
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from rap_env.errors import InvalidRequestError, ServingSettingsError, check_name
from rap_env.extras import require_extra
from rap_env.memory import MemoryModel, ModelFacts
from rap_env.policies.loading import check_policy, load_policy
from rap_env.policies.packaged_files import default_facts, lacks_costs
from rap_env.policies.registry import policy_names
from rap_env.runtime.plan_chooser import no_prediction_text, predicts
from rap_env.serving.settings import ServerSettings

log = logging.getLogger(__name__)

_DTYPES = ("auto", "bfloat16", "float16", "float32")
_TEXT = "%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s"
_TIME = "%Y-%m-%dT%H:%M:%S"


def serve(settings: ServerSettings, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        settings: Settings of the server.
        say: Shows a text to the user.

    Raises:
        RapError: As for `rap_env.serving.stack.build_stack`, the address is not available, or
            `rap_env.serving.http.ApiKeys`, `check_address` or `check_before_loading` rejects the
            settings.
    """
    require_extra("serve", "Serving")
    if settings.api_key_file is not None:
        from rap_env.serving.http import ApiKeys

        ApiKeys(settings.api_key_file)
    check_before_loading(settings)
    with server_logging(settings), bind(settings.host, settings.port) as bound:
        check_address(bound, settings)
        prepare_before(settings)
        gc.disable()  # to search what imports make for garbage takes an eighth of the start
        try:
            # These import torch, which takes seconds.
            from rap_env.models.device import use_threads
            from rap_env.serving.background_preparation import start_preparation
            from rap_env.serving.server import Server
            from rap_env.serving.stack import build_stack, greeting

            if settings.threads is not None:
                use_threads(settings.threads)
            stack = build_stack(settings)
        finally:
            gc.enable()
        text = greeting(stack, url_of(bound))
        preparation = start_preparation(settings, stack.engine.controller, stack.limit)
        try:
            Server(stack.app, lambda: say(text)).run(sockets=[bound])
        finally:
            if preparation is not None:
                preparation.close()


def prepare_before(settings: ServerSettings) -> None:
    """Prepare a model that has no costs of levels and does not fit its limit as it is.

    Raises:
        ServingSettingsError: There is not enough memory to prepare it.
        RapError: As for `rap_env.importance.preparation.prepare`.
    """
    limit_bytes = settings.model_bytes or settings.process_bytes
    if not settings.may_prepare or limit_bytes is None or _known_facts(settings) is not None:
        return
    memory = MemoryModel(_read_facts(settings))
    if not lacks_costs(memory):
        return
    from rap_env.serving.served_model import SHORT_TOKENS  # it imports torch

    native_bytes = memory.native_peak_bytes(1, min(SHORT_TOKENS, memory.facts.max_positions))
    if settings.process_bytes is not None:
        from rap_env.models.device import resident_bytes

        native_bytes += resident_bytes()[1]
    if native_bytes <= limit_bytes:
        return
    from rap_env.importance.preparation import prepare

    log.info("%s does not fit as it is, and is prepared first (once).", settings.model)
    try:
        prepare(
            settings.model,
            memory_bytes=settings.process_bytes,
            device=settings.device,
            dtype=settings.dtype,
        )
    except InvalidRequestError as error:
        raise ServingSettingsError(
            f"{error} Or run `rap prepare {settings.model}` once where there is more memory."
        ) from None


# The address


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket to an address, without listening; port 0 takes a free one.

    Raises:
        ServingSettingsError: The address is in use, forbidden, or not of this machine.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = addresses[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        remedy = "check host and port"
        if error.errno == errno.EADDRINUSE:
            remedy = "stop the program that listens there, or choose another port"
        raise ServingSettingsError(f"Cannot listen at {host}:{port} ({error}); {remedy}.") from None
    return bound


def url_of(bound: socket.socket) -> str:
    """URL of a bound socket, for clients."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


# Checks


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


def check_before_loading(settings: ServerSettings) -> None:
    """Check dtype and policy, for all but the default policies by the facts of the model.

    `build_stack` checks the rest.

    Raises:
        UnknownNameError: There is no such dtype, or no policy of this name and no such file.
        ArtifactError: The policy file is damaged, or of another model.
        PluginError: Several packages offer the policy.
        ServingSettingsError: The policy predicts nothing for a floor of quality.
    """
    check_name("dtype", settings.dtype, _DTYPES)
    check_policy(settings.policy)
    floor = settings.max_delta_nll
    if settings.policy in ("dense", "knapsack") and floor in (None, "auto"):
        return  # they are for every model
    facts = _known_facts(settings)
    if facts is None:
        facts = _read_facts(settings)
    elif settings.policy not in policy_names():
        return  # its file is for a dtype, which torch has to tell
    policy = load_policy(settings.policy, MemoryModel(facts))
    if floor not in (None, "auto") and not predicts(policy):
        raise ServingSettingsError(no_prediction_text(floor, policy.name))


def _read_facts(settings: ServerSettings) -> ModelFacts:
    """Facts of a model from its files, which are converted first, in another process."""
    from rap_env.models.files.loading import load_llm  # it imports torch
    from rap_env.models.files.model_folder import made_apart

    how = {name: getattr(settings, name) for name in ("device", "dtype", "weights")}
    with made_apart():
        llm = load_llm(settings.model, **how, lean=True, on_demand=True, quick_levels=True)
    return replace(llm.facts, name=settings.model)


def _known_facts(settings: ServerSettings) -> ModelFacts | None:
    """Facts of the default model in bfloat16, whatever its dtype; None for any other."""
    facts = default_facts(settings.weights)
    same = settings.model.partition("@")[0] == facts.name.partition("@")[0]
    return facts if same else None


# The log


class TextFormatter(logging.Formatter):
    """A line with time (UTC), level and message; a traceback follows in lines of its own."""

    def __init__(self) -> None:
        super().__init__(_TEXT, _TIME)
        self.converter = time.gmtime


@contextlib.contextmanager
def server_logging(settings: ServerSettings) -> Iterator[None]:
    """Log to standard error as the settings say, within a ``with`` block.

    The process's handlers for the console are replaced; others, such as files, stay.
    """
    root, package = logging.getLogger(), logging.getLogger("rap_env")
    level = settings.log_level.upper()
    handlers, package_level = root.handlers[:], package.level
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter())
    handler.setLevel(level)
    package.setLevel(level)
    root.handlers[:] = [*(h for h in handlers if type(h) is not logging.StreamHandler), handler]
    try:
        yield
    finally:
        root.handlers[:] = handlers
        package.setLevel(package_level)
        handler.close()
