"""Passwords stay out of messages and files: a storage's address is shown without its own."""

from __future__ import annotations

import re

__all__ = ["masked"]

# scheme://user:password@host; greedy, as a password that was not percent-encoded may hold a / or an @.
_IN_ADDRESS = re.compile(r"(://[^:/?#\s@]*):(\S*)@")
_IN_QUERY = re.compile(r"([?&\s](?:password|passwd|sslpassword)=)[^&\s]*", re.IGNORECASE)


def masked(text: str) -> str:
    """Return ``text`` with the password of every URL in it as ``***``."""
    return _IN_QUERY.sub(r"\1***", _IN_ADDRESS.sub(r"\1:***@", text))
