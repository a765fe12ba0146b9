"""A killed distillation resumes identically, or raises an error with the reason."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from rap_env.errors import ArtifactError
from rap_env.memory import MemoryModel
from rap_env.plan import Plan
from rap_env.repair.config import DistillConfig
from rap_env.repair.distilling import MaskSampler
from rap_env.repair.stub_library import StubLibrary
from rap_env.workload.sampler import FixedSampler
from rap_env.workload.traffic import TraceSampler
from tests.models.stubs import random_stubs
from tests.repair.test_distilling import HELD_BACK, LAYERS, SHORT, distilled, draw, fitted, tiny


@dataclass(frozen=True)
class Killed(MaskSampler):
    """Draws masks as usual until the process is to be killed."""

    after: int = 6
    drawn: list[Plan] = field(default_factory=list)

    def draw(self, rng: np.random.Generator) -> Plan:
        if len(self.drawn) == self.after:
            raise KeyboardInterrupt
        self.drawn.append(super().draw(rng))
        return self.drawn[-1]


def killed_at(after: int, llm, library, path, config=SHORT) -> None:
    with pytest.raises(KeyboardInterrupt):
        distilled(llm, library, config, masks=draw(llm, kind=Killed, after=after), path=path)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "after", [2, 6, *(pytest.param(after, marks=pytest.mark.slow) for after in (4, 11))]
)
def test_a_killed_run_resumes_bit_for_bit(after: int, dtype, tmp_path) -> None:
    llm, path = tiny(dtype=dtype), tmp_path / "deep" / "progress.pt"
    library = fitted(llm)
    whole = distilled(llm, library)
    killed_at(after, llm, library, path)
    assert llm.mask == Plan()
    assert path.exists() == (after >= SHORT.save_every)
    # As in another process: nothing of the first run is used but the file.
    llm = tiny(dtype=dtype)
    masks = draw(llm, kind=Killed, after=SHORT.steps)
    resumed = distilled(llm, fitted(llm), masks=masks, path=path)
    assert resumed.sha256 == whole.sha256
    assert resumed.provenance["divergences"] == whole.provenance["divergences"]
    assert len(masks.drawn) == SHORT.steps - after // SHORT.save_every * SHORT.save_every
    assert list(path.parent.iterdir()) == [path]


def test_a_finished_run_is_there_until_its_file_is_removed(tmp_path) -> None:
    llm, path = tiny(), tmp_path / "progress.pt"
    library = fitted(llm)
    whole = distilled(llm, library, path=path)
    masks = draw(llm, kind=Killed, after=0)  # no mask is drawn again
    assert distilled(llm, library, masks=masks, path=path).sha256 == whole.sha256


def test_two_kills_are_no_worse_than_one(tmp_path) -> None:
    llm, path = tiny(), tmp_path / "progress.pt"
    library = fitted(llm)
    killed_at(5, llm, library, path)
    killed_at(5, llm, library, path)
    assert distilled(llm, library, path=path).sha256 == distilled(llm, library).sha256
    assert list(tmp_path.iterdir()) == [path]


def test_a_replayed_trace_resumes_at_its_position(tmp_path) -> None:
    rows = "".join(f"{n},{3 + 7 * n % 50},{1 + n % 5}\n" for n in range(9))
    (tmp_path / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    llm, path = tiny(), tmp_path / "progress.pt"
    library = fitted(llm)

    def replay(after: int) -> Killed:
        sampler = TraceSampler(MemoryModel(llm), path=str(tmp_path / "trace.csv"), order="replay")
        return draw(llm, sampler, Killed, after=after)

    whole = replay(12)
    distilled(llm, library, masks=whole)
    first, rest = replay(6), replay(12)
    with pytest.raises(KeyboardInterrupt):
        distilled(llm, library, masks=first, path=path)
    distilled(llm, library, masks=rest, path=path)
    assert first.drawn[:4] + rest.drawn == whole.drawn


def test_progress_of_another_run_is_rejected_and_kept(tmp_path) -> None:
    llm, path = tiny(), tmp_path / "progress.pt"
    library = fitted(llm)
    killed_at(5, llm, library, path)
    kept = path.read_bytes()
    longer = DistillConfig(**{**vars(SHORT), "steps": 13})
    others = [
        {"config": longer},
        {"text": HELD_BACK},
        {"masks": draw(llm, noise=(1.0,))},
        {"masks": draw(llm, FixedSampler(MemoryModel(llm), 1, 8))},
    ]
    stubs = random_stubs(llm, (1,) * 2 * LAYERS)
    for library_of, changed in [
        *((library, other) for other in others),
        (StubLibrary(llm.name, llm.fingerprint, stubs), {}),
    ]:
        with pytest.raises(ArtifactError, match="of another model, text or settings; give another"):
            distilled(llm, library_of, **changed, path=path)
    assert path.read_bytes() == kept


@pytest.mark.parametrize(
    "content",
    [b"", b"not torch's own", b"\x80\x02}q\x00.", None, torch.zeros(3), [1, 2], {"step": 3}, 7],
)
def test_damaged_progress_is_rejected(content: object, tmp_path) -> None:
    llm, path = tiny(), tmp_path / "progress.pt"
    library = fitted(llm)
    if content is None:  # the first half of a file
        killed_at(5, llm, library, path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(
        ArtifactError, match="is damaged or not a distillation checkpoint; delete it to"
    ):
        distilled(llm, library, path=path)
