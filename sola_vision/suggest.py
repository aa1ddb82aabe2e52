# SPDX-License-Identifier: Apache-2.0
"""Suggestions for misspelt names."""

from collections.abc import Iterable


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean NAME?)" for the known name closest to `word`, or "" if none is close."""
    from difflib import get_close_matches  # used only in errors

    close = get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
