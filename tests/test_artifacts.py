import contextlib
import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rap_env.artifacts import (
    atomic_write,
    canonical_json,
    digest,
    disk_errors,
    load_artifact,
    save_artifact,
)
from rap_env.errors import ArtifactError, StorageFullError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
FINITE = SCALARS.filter(lambda value: value not in (float("inf"), float("-inf")))
VALUES = st.recursive(
    FINITE, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10
)
BODIES = st.dictionaries(st.text(), VALUES)
few_examples = settings(max_examples=40)


@few_examples
@given(body=BODIES)
def test_an_artifact_round_trips(body: dict[str, Any], tmp_path: Path) -> None:
    save_artifact(tmp_path / "a.json", "thing", 3, body)
    assert load_artifact(tmp_path / "a.json", "thing", 3) == body


@few_examples
@given(data=st.data())
def test_a_truncated_artifact_is_rejected(data: Any, tmp_path: Path) -> None:
    save_artifact(tmp_path / "a.json", "thing", 3, {"order": ["layer00.attn"], "nll": [1.5, 2.0]})
    content = (tmp_path / "a.json").read_bytes()
    kept = data.draw(st.integers(0, len(content) - 2))  # the last byte is a line break
    (tmp_path / "a.json").write_bytes(content[:kept])
    with pytest.raises(ArtifactError, match="truncated .*; delete it"):
        load_artifact(tmp_path / "a.json", "thing", 3)


@few_examples
@given(data=st.data())
def test_every_altered_byte_is_detected(data: Any, tmp_path: Path) -> None:
    body = {"order": ["layer00.attn"], "nll": [1.5, 2.0]}
    save_artifact(tmp_path / "a.json", "thing", 3, body)
    content = bytearray((tmp_path / "a.json").read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    (tmp_path / "a.json").write_bytes(content)
    with contextlib.suppress(ArtifactError):
        assert load_artifact(tmp_path / "a.json", "thing", 3) == body  # only spaces differ


def test_another_kind_or_version_is_rejected(tmp_path: Path) -> None:
    save_artifact(tmp_path / "a.json", "thing", 1, {})
    with pytest.raises(ArtifactError, match="is of the kind 'thing', but 'other' was expected"):
        load_artifact(tmp_path / "a.json", "other", 1)
    with pytest.raises(ArtifactError, match="has format 1, but this version reads 2; delete it"):
        load_artifact(tmp_path / "a.json", "thing", 2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "null",
        "\xff",
        "9" * 5000,
        '{"kind": "thing"}',
        '{"kind": "thing", "version": 1, "sha256": "", "body": {"nll": NaN}}',
    ],
)
def test_other_files_are_rejected(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match="is truncated or no artifact of this project"):
        load_artifact(tmp_path / "a.json", "thing", 1)


def test_nan_is_not_saved_and_the_old_file_is_kept(tmp_path: Path) -> None:
    save_artifact(tmp_path / "a.json", "thing", 1, {"nll": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_artifact(tmp_path / "a.json", "thing", 1, {"nll": float("nan")})
    assert load_artifact(tmp_path / "a.json", "thing", 1) == {"nll": 1.0}


@few_examples
@given(value=BODIES)
def test_equal_values_have_equal_digests(value: dict[str, Any]) -> None:
    shuffled = dict(reversed(value.items()))
    assert canonical_json(value) == canonical_json(shuffled)
    assert digest(value) == digest(json.loads(json.dumps(value)))


def test_the_digest_never_changes_between_versions() -> None:
    # Stores and artifacts on users' disks are keyed by it.
    value = {"b": [1, 2.5, None, True], "a": "é"}
    assert canonical_json(value) == '{"a":"\\u00e9","b":[1,2.5,null,true]}'
    assert digest(value) == "0b8cc543e984d4d7398f5f603a4b91d358a2565f1d6b6a058565d662854e37cf"


@pytest.mark.parametrize("pair", [(1, 1.0), (True, 1), ("1", 1), (None, "null"), ([], {})])
def test_values_of_different_types_have_different_digests(pair: tuple[Any, Any]) -> None:
    assert digest(pair[0]) != digest(pair[1])


# Writing in one move


def test_a_failed_write_keeps_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.writelines([b"half of the new", "no bytes"])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_invisible_until_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    with atomic_write(path) as file:
        file.write(b"content")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"content"


def test_file_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with atomic_write(tmp_path / "file") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_raises_a_short_error(code: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with (
        pytest.raises(StorageFullError, match=r"No space left while writing .*file; free some"),
        atomic_write(path),
    ):
        raise OSError(code, os.strerror(code))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "no")
