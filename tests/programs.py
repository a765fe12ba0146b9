"""Python programs in processes of their own that start in milliseconds.

An import of torch and transformers takes seconds of processor time. A server imports them once for
all processes of a test run, and nothing of this project, and is forked for each program. What a
program imports, sets or breaks stays in its own process, as if the interpreter had been started for
it.

Tests of what an import loads, or of memory, need an interpreter of their own: `subprocess`.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from pathlib import Path
from typing import IO, Any

LIBRARIES = (
    "hydra.main", "hydra._internal.utils", "matplotlib.figure", "sb3_contrib", "torch", "wandb",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
)  # fmt: skip
"""What the server imports; one that is not installed is left out."""

_MESSAGE_BYTES = 1 << 20


class PythonProgram:
    """A running Python program; the methods are those of `subprocess.Popen`.

    Args:
        arguments: Arguments of the interpreter: ``-m MODULE ...`` or ``-c CODE ...``.
        cwd: Working directory; that of this process if left out.
        env: Environment variables; those of this process if left out.
        stdout: File for the output.
        stderr: File for errors.
    """

    def __init__(
        self,
        arguments: list[str],
        *,
        cwd: Path | str | None = None,
        env: dict[str, str] | None = None,
        stdout: IO[Any],
        stderr: IO[Any],
    ) -> None:
        self.returncode: int | None = None
        program = {"arguments": arguments, "cwd": str(cwd or Path.cwd()),
                   "env": dict(os.environ if env is None else env)}  # fmt: skip
        self.pid = _ask(program, stdout.fileno(), stderr.fileno())
        self._pidfd = os.pidfd_open(self.pid)

    def poll(self) -> int | None:
        """The exit code; None while the program runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code; raises `subprocess.TimeoutExpired` after `timeout` seconds."""
        if self.returncode is None:
            if not select.select([self._pidfd], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("python", timeout or 0)
            os.close(self._pidfd)
            self.returncode = _ask({"ended": self.pid})
        return self.returncode

    def terminate(self, number: int = signal.SIGTERM) -> None:
        """Send a signal, unless the program has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the program at once."""
        self.terminate(signal.SIGKILL)


def run_python(
    *arguments: str | Path,
    cwd: Path | str | None = None,
    env: dict[str, str] | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as `subprocess.run` with captured text does."""
    given = [str(argument) for argument in arguments]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        program = PythonProgram(given, cwd=cwd, env=env, stdout=output, stderr=errors)
        try:
            code = program.wait(timeout)
        finally:
            program.kill()
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read())
    return subprocess.CompletedProcess([sys.executable, *given], code, *texts)


def _ask(request: dict[str, Any], *files: int) -> int:
    """Send the server a request, perhaps with files, and return its answer."""
    socket.send_fds(_server(), [json.dumps(request).encode()], files)
    return int(_server().recv(_MESSAGE_BYTES))


@functools.cache
def _server() -> socket.socket:
    """A connection to the server of this test run, which ends with its last connection."""
    name = f"\0programs-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    kind = socket.AF_UNIX, socket.SOCK_SEQPACKET
    with socket.socket(*kind) as listener, contextlib.suppress(OSError):
        listener.bind(name)  # which fails if another process has started the server
        listener.listen()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno())], pass_fds=[listener.fileno()],
            env=environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    while True:
        connection = socket.socket(*kind)
        try:
            connection.connect(name)
            return connection
        except ConnectionRefusedError:  # the other process does not listen yet
            connection.close()
            time.sleep(0.01)


def _serve(listener: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for each program; returns in the program's process, with its request and files."""
    connections: list[socket.socket] = []
    while True:
        ready = select.select([listener, *connections], [], [])[0][0]
        if ready is listener:
            connections.append(listener.accept()[0])
            continue
        message, files, _, _ = socket.recv_fds(ready, _MESSAGE_BYTES, 2)
        if not message:
            connections.remove(ready)
            ready.close()
            if not connections:
                os._exit(0)
            continue
        request = json.loads(message)
        if "ended" in request:
            number = os.waitstatus_to_exitcode(os.waitpid(request["ended"], 0)[1])
        else:
            number = os.fork()
            if number == 0:
                for opened in (listener, *connections):
                    opened.close()
                return request, files
        ready.send(b"%d" % number)
        for file in files:
            os.close(file)


def _start(request: dict[str, Any], files: list[int]) -> None:
    """Take over the files, variables and arguments of a program, and run it."""
    for number, target in zip(files, (1, 2), strict=True):
        os.dup2(number, target)
        os.close(number)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    kind, text, *rest = request["arguments"]
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [request["cwd"] if kind == "-m" else "", *added]
    sys.argv = [kind, *rest]
    if kind == "-m":
        runpy.run_module(text, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(text, "<string>", "exec"), vars(sys.modules["__main__"]))


def _main() -> None:
    del sys.path[0]  # the folder of this file
    for name in LIBRARIES:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    program = _serve(socket.socket(fileno=int(sys.argv[1])))
    code = 0
    try:
        _start(*program)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and end.code != code:
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    # As the interpreter ends, without the half second in which it takes the libraries apart.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _main()
