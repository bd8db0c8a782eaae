"""JSON lines and JSON arrays, read in parts."""

import json
from collections.abc import Iterator
from typing import Any

from data.documents import PIECE, BadTextError

CHUNK = 1 << 20
"""Bytes read at a time."""


def lines(file: Any, longest: int) -> Iterator[tuple[int, bytes | None]]:
    """Numbers (from 1) and lines of bytes; None for one of over about `longest` bytes."""
    number = 0
    while line := file.readline(2 * longest + CHUNK):  # an escape takes more bytes than its character
        number += 1
        if line.endswith(b"\n") or len(line) < 2 * longest + CHUNK:
            yield number, line
            continue
        while (rest := file.readline(CHUNK)) and not rest.endswith(b"\n"):
            pass
        yield number, None


TOO_LONG = object()


def first_element(head: str) -> Any:
    """The first element of a JSON array, of which `head` is the beginning."""
    return first_object(head.lstrip()[1:].lstrip().encode())


def first_object(head: bytes) -> Any:
    """What JSON `head` begins with; of an object that goes beyond it, the keys up to there without their values."""
    decoder, text = json.JSONDecoder(), head.decode("utf-8", "replace")
    found: dict[str, Any] = {}
    try:
        return decoder.raw_decode(text)[0]
    except (ValueError, RecursionError):
        pass
    place = 1
    try:
        while True:
            key, place = decoder.raw_decode(text, _after_space(text, place))
            found[key] = None
            _, place = decoder.raw_decode(text, _after_space(text, text.index(":", place) + 1))
    except (ValueError, RecursionError, TypeError):
        return found


def _after_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \r\n\t,":
        place += 1
    return place


def elements(parts: Iterator[str], longest: int) -> Iterator[Any]:
    """The elements of a JSON array, read in parts; a BadTextError where it breaks off."""
    decoder = json.JSONDecoder()
    text = next(parts, "")
    place = text.index("[") + 1
    wanted = 0  # characters that are waited for: a long element is not tried anew at every part
    while True:
        place = _after_space(text, place)
        if len(text) - place < max(1, wanted):
            more = next(parts, None)
            if more is not None:
                text, place = text[place:] + more, 0
                continue
            if place == len(text):
                yield BadTextError("the array has no end")
                return
        if text[place] == "]":
            return
        try:
            element, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            waiting = len(text) - place
            if is_broken(error, len(text)):
                yield BadTextError(f"no JSON ({error})")
                return
            if waiting > max(2 * longest, 64 * PIECE):
                yield TOO_LONG
                return
            if wanted > waiting:
                yield BadTextError(f"no JSON ({error})")
                return
            wanted = 2 * waiting
            continue
        wanted = 0
        yield element


def is_broken(error: Exception, size: int) -> bool:
    """Whether more text could not mend the JSON: it goes wrong before its end, and not in a string without one."""
    if not isinstance(error, json.JSONDecodeError) or error.msg.startswith("Unterminated string"):
        return False
    return error.pos < size - 20
