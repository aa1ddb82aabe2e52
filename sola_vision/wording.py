# SPDX-License-Identifier: Apache-2.0
"""Counts with their nouns, for messages and titles."""


def amount(number: float, noun: str, nouns: str = "") -> str:
    """Return "1 image", or "1,437 images"; `nouns` is a plural that is not formed with s."""
    return f"{number:,.10g} {noun if number == 1 else nouns or noun + 's'}"
