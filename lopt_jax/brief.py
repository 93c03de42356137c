"""Short texts of values, for messages."""

import reprlib

_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = 8
_REPR.maxstring = _REPR.maxother = 80


def brief(value: object) -> str:
    """Returns a short text for a message, in bounded time whatever a file put into `value`.

    Plain `repr` of objects that share parts can take exponential time.
    """
    try:
        return _REPR.repr(value)[:160]
    except ValueError:  # an integer of too many digits for a text
        return f"a {type(value).__name__}"
