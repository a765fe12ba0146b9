from rap_env.runtime.hysteresis import Room


def test_room_must_last_and_gives_the_least_that_was_free():
    room = Room(hold_s=2.0)
    spares = [(0.0, 50), (1.0, 30), (1.9, 80)]
    assert [room.held(time_s, spare, 20) for time_s, spare in spares] == [None] * 3
    assert room.held(2.0, 90, 20) == 30


def test_a_moment_without_room_begins_the_time_anew():
    room = Room(hold_s=2.0)
    for time_s, spare in ((0.0, 50), (1.0, 10), (1.5, 50), (3.0, 50)):
        assert room.held(time_s, spare, 20) is None
    assert room.held(3.5, 60, 20) == 50


def test_after_it_was_given_a_new_time_begins():
    room = Room(hold_s=1.0)
    room.held(0.0, 50, 20)
    assert room.held(1.0, 50, 20) == 50
    assert room.held(1.5, 50, 20) is None
    room.close()
    assert room.held(2.4, 50, 20) is None
