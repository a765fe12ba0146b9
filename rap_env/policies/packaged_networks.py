"""The trained policies in the package, and those in files."""

from __future__ import annotations

import os
from functools import lru_cache, partial
from pathlib import Path

from rap_env.errors import ArtifactError
from rap_env.ladder.observation import ImportanceFeatures, ObservationBuilder
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.policies.base import Policy
from rap_env.policies.block_network import BlockNetwork
from rap_env.policies.network import LadderPolicy, LadderPolicyFile
from rap_env.policies.packaged_files import packaged_file
from rap_env.policies.policy_file import PolicyFile, read_policy
from rap_env.policies.registry import packaged, reads
from rap_env.request import Request

_FILES: tuple[type[PolicyFile | LadderPolicyFile], ...] = (PolicyFile, LadderPolicyFile)
NETWORK_FILES = {"rap": "ladder", "rap-recall": "recall", "rap-v0": ""}
"""The trained policies in the package, and the names of their files."""


class NetworkPolicy(Policy):
    """A trained block-wise network, which removes its best block until the request fits.

    If no mask fits, it removes every block. Threads may share a policy.

    Args:
        memory: The model's byte arithmetic.
        file: The exported policy.
        features: Importance of the model's blocks; None takes the file's.

    Attributes:
        order: The model's blocks in GSI order, length 2L; None where no importance is known.
        file: The exported policy.
    """

    name = "rap-v0"

    def __init__(
        self,
        memory: MemoryModel,
        file: PolicyFile,
        features: ImportanceFeatures | None = None,
    ) -> None:
        seen, order = file.features_for(memory.facts, features)
        self.order = order or None
        self.memory = memory
        self.file = file
        self._network = BlockNetwork(file.weights, ObservationBuilder(memory, seen))
        self._cached_choice = lru_cache(maxsize=1024)(self._choose)

    def choose(self, request: Request) -> Plan:
        """Return the blocks that the network removes until the request fits."""
        return self._cached_choice(request)

    def _choose(self, request: Request) -> Plan:
        return Plan.removing(*self._network.removals(request))


@reads(PolicyFile.kind)
def _read_policy(path: Path, memory: MemoryModel) -> Policy:
    file = read_policy(path, *_FILES)
    if isinstance(file, LadderPolicyFile):
        return LadderPolicy(memory, file)
    return NetworkPolicy(memory, file)


def network_file(source: str | os.PathLike[str]) -> PolicyFile | LadderPolicyFile:
    """The file of a trained policy, by its name or path."""
    name = NETWORK_FILES.get(str(source))
    path = Path(source) if name is None else packaged_file(f"{name}.safetensors")
    return read_policy(path, *_FILES)


def _packaged_policy(name: str, memory: MemoryModel) -> Policy:
    file = network_file(name)
    if isinstance(file, PolicyFile):
        return NetworkPolicy(memory, file)
    if not file.serves(memory.facts):
        own, facts = file.model.name, memory.facts
        raise ArtifactError(
            f'The packaged policy "{name}" is of {own} with native weights, but {facts.name} '
            f"is loaded with {facts.weights} weights, so its items have other levels. Load "
            f'{own} with weights="native", or use the packaged policy "rap-v0", which removes '
            "blocks only."
        )
    policy = LadderPolicy(memory, file)
    policy.name = name
    return policy


for _name in NETWORK_FILES:
    packaged(_name)(partial(_packaged_policy, _name))
