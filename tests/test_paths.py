"""Bytes of folders, also while they change."""

import shutil
import threading
from pathlib import Path

from rap_env.paths import folder_bytes


def test_bytes_of_a_folder_with_folders_in_it(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "deep" / "er" / "b").write_bytes(b"12345")
    assert folder_bytes(tmp_path) == 8
    assert folder_bytes(tmp_path / "none") == 0


def test_folders_may_be_deleted_while_being_counted(tmp_path: Path) -> None:
    done = threading.Event()

    def churn() -> None:
        while not done.is_set():
            (tmp_path / "x" / "y" / "z").mkdir(parents=True)
            (tmp_path / "x" / "y" / "z" / "file").write_bytes(b"1")
            shutil.rmtree(tmp_path / "x")

    writer = threading.Thread(target=churn)
    writer.start()
    try:
        assert {folder_bytes(tmp_path) for _ in range(500)} <= {0, 1}
    finally:
        done.set()
        writer.join()
