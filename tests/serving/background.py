"""A server in a thread."""

import signal
import threading
import time

from rap_env.serving.server import Server
from rap_env.serving.startup import bind, url_of

START_TIMEOUT_S = 60.0


class BackgroundServer:
    """Runs a server in a thread, within a ``with`` block; its `url` has a free port."""

    def __init__(self, app) -> None:
        self._server = Server(app)
        bound = bind("127.0.0.1", 0)
        self._thread = threading.Thread(target=self._server.run, args=([bound],), daemon=True)
        self.url = url_of(bound)

    def __enter__(self):
        self._thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._server.started:
            assert self._thread.is_alive(), f"The server at {self.url} did not start."
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self

    def __exit__(self, *_error) -> None:
        self.stop()

    def stop(self) -> None:
        """Shut down gracefully and wait for the end."""
        self._server.handle_exit(signal.SIGTERM, None)
        self._thread.join()
