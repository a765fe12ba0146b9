from rap_env.runtime.margin import LearnedMargin


def test_the_margin_is_the_most_that_went_beyond_its_prediction():
    margin = LearnedMargin(window=4)
    for beyond in (-50, 30, 10):
        margin.note("decode", beyond)
    assert margin.bytes == 30


def test_it_is_never_less_than_its_least():
    margin = LearnedMargin(least_bytes=20, window=2)
    margin.note("decode", 5)
    assert margin.bytes == 20
    margin.note("decode", 25)
    assert margin.bytes == 25


def test_a_single_burst_is_forgotten_within_two_windows():
    margin = LearnedMargin(window=10)
    margin.note("decode", 100)
    seen = []
    for _ in range(20):
        margin.note("decode", 7)
        seen.append(margin.bytes)
    assert seen[8] == 100
    assert seen[-1] == 7


def test_what_comes_again_is_not_forgotten():
    margin = LearnedMargin(window=10)
    for step in range(200):
        margin.note("decode", 100 if step % 9 == 0 else 0)
        assert margin.bytes == 100


def test_steps_of_one_kind_do_not_make_it_forget_another():
    margin = LearnedMargin(window=4)
    margin.note("prefill", 60)
    for _ in range(100):
        margin.note("decode", 3)
    assert margin.bytes == 60
