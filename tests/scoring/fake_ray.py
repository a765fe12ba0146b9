"""The part of Ray that a pool of workers uses, in this process."""

from collections import Counter
from functools import partial
from types import SimpleNamespace


class FakeRay:
    """The part of Ray that a pool uses: a call runs when its result is waited for."""

    def __init__(self, ray, worker):
        self.__spec__ = ray.__spec__  # it may stand in `sys.modules`
        self.exceptions = ray.exceptions
        self.worker = worker
        self.calls = Counter()
        self.started = 0
        self.killed = []

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {"CPU": 1.0}

    def remote(self, _class):
        return self

    def options(self, **asked):
        self.asked = asked
        return SimpleNamespace(remote=self._start)

    def put(self, value):
        return value

    def kill(self, worker):
        self.killed.append(worker)

    def wait(self, results, timeout):
        return results[:1], results[1:]

    def get(self, result):
        return result()

    def _start(self, open_model, threads):
        self.started += 1
        worker = self.worker(open_model, threads)

        def method(name):
            def remote(*arguments):
                self.calls[name] += 1
                return partial(getattr(worker, name), *arguments)

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(**{name: method(name) for name in ("load", "measure")})
