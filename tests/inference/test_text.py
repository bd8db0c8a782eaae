"""Text in pieces: together the whole text before the first stop string, and at no time a part of one."""

from hypothesis import example, given
from hypothesis import strategies as st

from dsv3.inference.text import WINDOW, TextStream, cut_at

PIECES = [b"a", b"b", b"ab", b"ba", b"aab", "é".encode(), "é".encode()[:1], "é".encode()[1:], "€".encode()[:2], b"\xff"]


def decode(ids):
    return b"".join(PIECES[i] for i in ids).decode(errors="replace")


@given(
    ids=st.lists(st.integers(0, len(PIECES) - 1), max_size=3 * WINDOW),
    stops=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
)
@example(ids=[5] * 40, stops=[])
@example(ids=[0, 4, 1, 3, 1], stops=["abb", "bab"])
@example(ids=[3, 0], stops=["a", "baa"])
def test_pieces_make_the_text_before_the_first_stop(ids, stops):
    stream, shown, stopped, read = TextStream(decode, stops), "", False, []
    for token in ids:
        new, stopped = stream.push(token)
        shown += new
        read.append(token)
        assert cut_at(stops, decode(ids)).startswith(shown)
        if stopped:
            break
    if not stopped:
        shown += stream.finish()
    assert shown == cut_at(stops, decode(read))
    assert cut_at(stops, decode(read)) == cut_at(stops, decode(ids))


def test_text_without_stops_is_shown_as_soon_as_its_characters_are_whole():
    stream = TextStream(decode, [])
    assert [stream.push(token)[0] for token in (0, 6, 7, 4)] == ["a", "", "é", "aab"]


def test_the_beginning_of_a_stop_is_held_back():
    stream = TextStream(decode, ["bba"])
    assert [stream.push(token)[0] for token in (0, 1, 1, 1)] == ["a", "", "", "b"]
    assert stream.push(0) == ("", True)


def test_the_first_stop_counts():
    assert cut_at(["b", "a"], "xxbya") == "xx"
    assert cut_at([], "xxbya") == "xxbya"
    assert cut_at(["a", "baa"], "xbaa") == "xb", "the one that is complete first"
