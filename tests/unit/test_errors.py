"""Laws of `safepatch.errors`: every error can be caught as ours, reads as one line and helps."""

import pytest

from safepatch import errors
from safepatch.errors import SafepatchError, UnknownName, lookup, nearest

ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_is_ours_and_prints_its_message_as_it_is(kind):
    assert issubclass(kind, SafepatchError)
    assert str(kind("a 'b'; do c")) == "a 'b'; do c"


def test_control_a_plain_key_error_prints_a_repr():
    assert str(KeyError("a 'b'")) != "a 'b'"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("tise", "; did you mean 'ties'?"), ("zzz", "; known: dare, linear, ties")],
)
def test_nearest_offers_the_closest_name_or_all_of_them(name, hint):
    assert nearest(name, {"ties": 1, "linear": 2, "dare": 3}) == hint


def test_lookup_returns_the_entry_and_refuses_others_with_the_nearest():
    table = {"ties": 1, "linear": 2}
    assert lookup(table, "ties", "merge method") == 1
    with pytest.raises(UnknownName) as caught:
        lookup(table, "tise", "merge method")
    assert str(caught.value) == "no merge method 'tise'; did you mean 'ties'?"
    assert isinstance(caught.value, KeyError)
