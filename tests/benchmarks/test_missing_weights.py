"""The outage of weights: the longest silence, and files that come back under their names."""

import pytest

from benchmarks.missing_weights import longest_gap_s, renamed


@pytest.mark.parametrize(
    ("times_s", "longest_s"),
    [([], 10.0), ([3.0], 7.0), ([9.0, 1.0, 4.0], 5.0), ([-5.0, 6.0, 20.0], 6.0)],
)
def test_the_longest_silence_is_within_the_phase_and_reaches_its_ends(times_s, longest_s):
    assert longest_gap_s(times_s, 0.0, 10.0) == longest_s


def test_files_and_folders_come_back_even_after_an_error(tmp_path):
    file, folder = tmp_path / "a.safetensors", tmp_path / "offloaded"
    file.write_text("weights")
    (folder / "inner").mkdir(parents=True)
    seen = []

    def look():
        with renamed([file, folder]):
            seen.extend(path.name for path in tmp_path.iterdir())
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert sorted(seen) == ["a.safetensors.away", "offloaded.away"]
    assert file.read_text() == "weights"
    assert (folder / "inner").is_dir()
