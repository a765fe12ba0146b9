"""llama.cpp's server: what its log says, and the search for the largest context."""

from experiments.server_replay.systems import buffer_bytes, largest_context

LOG = """\
load_tensors:   CPU_Mapped model buffer size =    86.25 MiB
llama_context:        CPU  output buffer size =     1.50 MiB
llama_kv_cache:        CPU KV buffer size =    90.00 MiB
sched_reserve:        CPU compute buffer size =    48.75 MiB
srv  load_model: initializing slots, n_slots = 8
"""
MIB = 2**20


def test_buffers_are_read_from_the_log():
    assert buffer_bytes(LOG.splitlines()) == {
        "model": round(86.25 * MIB), "KV": 90 * MIB, "compute": round(48.75 * MIB),
        "output": round(1.5 * MIB),
    }  # fmt: skip
    assert buffer_bytes([]) == {"model": 0, "KV": 0, "compute": 0, "output": 0}


def search(budget, most_tokens=6000, max_starts=6, bend=0):
    asked = []

    def measure(tokens):
        asked.append(tokens)
        return 100_000 + 20 * tokens + bend * (tokens > 2000)

    context, peaks = largest_context(measure, budget, most_tokens, max_starts)
    assert list(peaks) == asked
    return context, asked


def test_the_search_finds_the_largest_multiple_that_fits():
    assert search(300_000) == (6144, [6144])
    assert search(100_000) == (0, [6144, 256])
    context, asked = search(151_200)
    assert context == 2560  # 100,000 + 20 * 2,560
    assert len(asked) <= 5


def test_a_peak_that_is_no_straight_line_is_searched_between_what_fits_and_what_does_not():
    context, asked = search(145_000, bend=15_000)
    assert context == 1792
    assert len(asked) <= 6
    assert search(145_000, bend=15_000, max_starts=2)[0] == 256
