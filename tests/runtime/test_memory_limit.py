import sys
from functools import partial

import pytest
import torch

from rap_env.errors import MemorySourceError, UnknownNameError
from rap_env.models.weights.packing import buffer_bytes
from rap_env.policies.loading import StaticPolicy
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.decision import Snapshot
from rap_env.runtime.engine import Engine
from rap_env.runtime.memory_estimator import BatchShape
from rap_env.runtime.memory_limit import CgroupMemory, CudaMemory, GivenMemory, open_memory
from rap_env.runtime.memory_monitor import MemorySource, ResidentMeter
from tests.runtime.harness import set_status
from tests.tiny import tiny_llm

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
UNLIMITED = 9223372036854771712


class Machine:
    """Fakes of /sys/fs/cgroup and /proc."""

    def __init__(self, root) -> None:
        self.mount, self.proc = root / "cgroup", root / "proc"
        (self.proc / "self").mkdir(parents=True)
        self.mount.mkdir()
        self.meminfo(total_mib=8192, available_mib=4096)

    def meminfo(self, total_mib, available_mib) -> None:
        lines = f"MemTotal: {total_mib * 1024} kB\nMemAvailable:   {available_mib * 1024} kB\n"
        (self.proc / "meminfo").write_text(lines)

    def groups(self, text) -> None:
        (self.proc / "self" / "cgroup").write_text(text)

    def files(self, folder, **content) -> None:
        (self.mount / folder).mkdir(parents=True, exist_ok=True)
        for name, value in content.items():
            (self.mount / folder / name.replace("memory_", "memory.")).write_text(f"{value}\n")

    def v2(self, folder, *, limit, used_mib, stat="", **more) -> None:
        used = used_mib * MIB
        self.files(folder, memory_max=limit, memory_current=used, memory_stat=stat, **more)

    def v1(self, folder, *, limit, used_mib, stat="") -> None:
        numbers = {"memory_limit_in_bytes": limit, "memory_usage_in_bytes": used_mib * MIB}
        self.files(folder, **numbers, memory_stat=stat)

    def open(self, reserve_bytes=0) -> CgroupMemory:
        return CgroupMemory(reserve_bytes, mount=self.mount, proc=self.proc)


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("group", "files", "free_mib"),
    [
        ("/app", {"limit": 1000 * MIB, "used_mib": 300}, 700),
        ("/app", {"limit": 1000 * MIB, "used_mib": 100, "memory_high": 400 * MIB}, 300),
        ("/app", {"limit": 100_000 * MIB, "used_mib": 0}, 4096),  # the machine has less
        ("/app", {"limit": 100 * MIB, "used_mib": 130}, -30),
        # In a container the root of the mount is its own group.
        ("/docker/0123abcd", {"limit": 512 * MIB, "used_mib": 12}, 500),
        ("/../../host", {"limit": 512 * MIB, "used_mib": 12}, 500),
    ],
)
def test_the_version_2_budget_is_used_plus_free_bytes(machine, group, files, free_mib):
    machine.groups(f"0::{group}\n")
    machine.v2("app" if group == "/app" else ".", **files)
    memory = machine.open()
    assert memory.free_bytes() == free_mib * MIB
    for used_mib in (10, 200):
        assert memory.budget_bytes(used_mib * MIB) == max(0, used_mib + free_mib) * MIB
    assert memory.limit_bytes == min(8192 * MIB, files.get("memory_high", files["limit"]))


def test_cache_that_can_be_dropped_is_free_and_mapped_or_dirty_pages_are_not(machine):
    machine.groups("0::/app\n")
    stat = (
        f"anon {100 * MIB}\ninactive_file {90 * MIB}\nactive_file {60 * MIB}\n"
        f"file_mapped {30 * MIB}\nfile_dirty {15 * MIB}\nfile_writeback {5 * MIB}"
    )
    machine.v2("app", limit=1000 * MIB, used_mib=300, stat=stat)
    assert machine.open().free_bytes() == (700 + 150 - 50) * MIB


def test_the_tightest_of_the_groups_above_holds_and_limits_may_move(machine):
    machine.groups("0::/pod/app\n")
    machine.v2("pod/app", limit="max", used_mib=100)
    machine.v2("pod", limit=500 * MIB, used_mib=450)
    memory = machine.open()
    assert memory.free_bytes() == 50 * MIB
    machine.v2("pod", limit=800 * MIB, used_mib=450)
    assert memory.free_bytes() == 350 * MIB
    machine.v2("pod/app", limit=120 * MIB, used_mib=100)
    assert memory.free_bytes() == 20 * MIB


def test_the_machine_itself_is_the_limit_where_no_group_has_one(machine):
    machine.groups("0::/\n")
    memory = machine.open(reserve_bytes=96 * MIB)
    assert memory.budget_bytes(used_bytes=10 * MIB) == (10 + 4096 - 96) * MIB
    assert memory.limit_bytes == (8192 - 96) * MIB
    memory = machine.open(reserve_bytes=5000 * MIB)  # of which only a part is free
    assert memory.budget_bytes(used_bytes=10 * MIB) == (10 + 4096 - 5000) * MIB


def test_version_1_reads_its_own_names_and_sums_over_the_groups_below(machine):
    machine.groups("9:name=systemd:/\n4:memory:/box/app\n0::/\n")
    stat = f"inactive_file 1\ntotal_inactive_file {40 * MIB}\ntotal_mapped_file {10 * MIB}"
    machine.v1("memory/box/app", limit=UNLIMITED, used_mib=100)
    machine.v1("memory/box", limit=600 * MIB, used_mib=500, stat=stat)
    machine.v1("memory", limit=UNLIMITED, used_mib=700)
    assert machine.open().free_bytes() == (100 + 30) * MIB
    machine.groups("3:cpu,cpuacct:/\n2:hugetlb,memory:/app\n")  # several controllers in a line
    machine.v1("memory/app", limit=256 * MIB, used_mib=56)
    assert machine.open().free_bytes() == 200 * MIB


def test_what_cannot_be_read_is_rejected_with_a_remedy(machine, tmp_path):
    with pytest.raises(MemorySourceError, match="give the budget as a number of bytes"):
        CgroupMemory(mount=tmp_path, proc=tmp_path)
    machine.groups("0::/app\n")
    machine.v2("app", limit=100 * MIB, used_mib=50)
    memory = machine.open()
    (machine.mount / "app" / "memory.current").unlink()
    with pytest.raises(MemorySourceError, match="cannot be read"):
        memory.budget_bytes(0)


@pytest.mark.parametrize(
    ("given", "budgets", "limit_bytes"),
    [
        (1234, [1234] * 3, 1234),
        (iter([100, 250.9, -5]).__next__, [100, 250, 0], None),
        (GivenMemory(lambda: 50, limit_bytes=90), [50] * 3, 90),
    ],
)
def test_a_given_budget_does_not_depend_on_what_is_used(given, budgets, limit_bytes):
    memory = open_memory(given)
    assert [memory.budget_bytes(used) for used in (0, 10**9, 0)] == budgets
    assert memory.limit_bytes == limit_bytes
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(MemorySourceError, match="should return a number of bytes"):
            open_memory(lambda wrong=wrong: wrong).budget_bytes(0)


def test_this_machine_is_read():
    memory = open_memory("auto", device=torch.device("cpu"))
    assert isinstance(memory, CgroupMemory)
    assert memory.budget_bytes(0) > 0
    assert isinstance(open_memory("cgroup", reserve_bytes=3), MemorySource)


@pytest.mark.parametrize("wrong", ["swap", 1.5, None, True])
def test_unknown_settings_name_the_known_ones(wrong):
    with pytest.raises(UnknownNameError, match="'auto', 'cgroup', 'cuda'"):
        open_memory(wrong)


@pytest.mark.gpu
def test_a_cuda_budget_counts_what_the_allocator_keeps_as_free():
    memory = CudaMemory(reserve_bytes=1 << 20)
    before = memory.budget_bytes(0)
    block = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    held = memory.budget_bytes(64 << 20)
    del block
    assert abs(held - before) < 8 << 20
    assert abs(memory.budget_bytes(0) - before) < 8 << 20


@pytest.fixture
def process(tmp_path):
    """A folder in the place of /proc/self, and a function that sets the resident memory."""
    set_status(tmp_path, 500)
    return tmp_path, partial(set_status, tmp_path)


@linux
@pytest.mark.parametrize("limited", ["model", "process", "system"])
def test_what_is_loaded_late_is_never_charged_to_the_model(process, machine, limited):
    folder, write = process
    llm = tiny_llm()
    meter = ResidentMeter(llm, process=folder)
    machine.groups("0::/\n")
    memory = {
        "model": GivenMemory(100 * MIB),
        "process": GivenMemory(1000 * MIB, meter=meter),
        "system": machine.open(),
    }[limited]
    controller = RuntimeController(llm, StaticPolicy(llm.plan), memory, meter=meter)
    monitor, shape = controller.monitor, BatchShape(1, 8)
    before = monitor.budget_bytes
    write(590)  # a vocabulary, connections, holes in the heap
    machine.meminfo(total_mib=8192, available_mib=4096 - 90)
    monitor.observe_step(shape, "decode")
    engine = Engine(controller)
    act = partial(controller.act, kept=engine._scheduler.batch.kept)
    assert act(Snapshot(running=shape)) is None
    write(595)
    machine.meminfo(total_mib=8192, available_mib=4096 - 95)
    act(Snapshot())
    assert monitor.used_bytes < MIB + buffer_bytes()
    assert before - monitor.budget_bytes == (0 if limited == "model" else 95 * MIB)
    assert engine.nothing_fits() == ""
