"""Energy that a piece of work took, where the machine tells it."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules since it was made: of the processor's packages (RAPL) and of NVIDIA devices (NVML).

    What cannot be read counts as not there. Other programs on the machine are counted too.

    Args:
        root: Where the kernel shows RAPL's counters.
        devices: Whether to ask NVML.
    """

    def __init__(self, root: Path = POWERCAP, *, devices: bool = True) -> None:
        self._packages = [zone for zone in sorted(root.glob("*:*")) if _is_package(zone)]
        self._handles = _nvml_handles() if devices else []
        self._package_uj = [_number(zone / "energy_uj") for zone in self._packages]
        self._device_mj = [_device_mj(handle) for handle in self._handles]

    def joules(self) -> float | None:
        """Joules so far; None where nothing can be read."""
        found = []
        for zone, before in zip(self._packages, self._package_uj, strict=True):
            now = _number(zone / "energy_uj")
            if before is not None and now is not None:
                # The counter starts again at 0 after its range.
                most = _number(zone / "max_energy_range_uj") or 0
                found.append((now - before if now >= before else now + most - before) / 1e6)
        for handle, before in zip(self._handles, self._device_mj, strict=True):
            now = _device_mj(handle)
            if before is not None and now is not None:
                found.append((now - before) / 1e3)
        return sum(found) if found else None


def _is_package(zone: Path) -> bool:
    """Whether a zone is a whole package: its parts would be counted twice."""
    try:
        name = (zone / "name").read_text().strip()
    except OSError:
        return False
    return name.startswith("package") and _number(zone / "energy_uj") is not None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _nvml_handles() -> list[Any]:
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return [nvml.nvmlDeviceGetHandleByIndex(n) for n in range(nvml.nvmlDeviceGetCount())]
    except Exception as error:  # not installed, no driver, no rights
        log.debug("NVML tells no energy: %s", error)
        return []


def _device_mj(handle: Any) -> int | None:
    try:
        nvml = importlib.import_module("pynvml")
        return int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    except Exception as error:  # older devices do not count
        log.debug("A device tells no energy: %s", error)
        return None
