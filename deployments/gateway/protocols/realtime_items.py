"""The items of one Realtime conversation: what was said and typed, in order, as far as it can be retrieved.

The oldest are forgotten beyond ITEM_LIMIT items or TEXT_LIMIT characters.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from deployments.gateway.protocols.openai_events import object_of, refuse, text_of
from deployments.gateway.protocols.realtime_dialect import Dialect

ITEM_LIMIT = 256  # items that can still be retrieved
TEXT_LIMIT = 262_144  # characters of all of them
ID_LIMIT = 128  # characters of an id that a client chose


class Items:
    """Those of one session, in its client's dialect."""

    def __init__(self, session: str, dialect: Dialect) -> None:
        self._session, self._dialect = session, dialect
        self._kept: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._text = 0  # characters of all that are kept
        self._last: str | None = None
        self._made = 0  # ids

    def spoken_id(self) -> str:
        """For speech of the user."""
        return self._id("u")

    def append(self, item_id: str) -> str | None:
        """`item_id` is the newest now; that of the one before."""
        previous, self._last = self._last, item_id
        return previous

    def keep(self, item: dict[str, Any]) -> None:
        """It can be retrieved, as it stands now."""
        self._text += _characters(item) - _characters(self._kept.pop(item["id"], {}))
        self._kept[item["id"]] = item
        while len(self._kept) > ITEM_LIMIT or self._text > TEXT_LIMIT:
            self._text -= _characters(self._kept.popitem(last=False)[1])

    def get(self, item_id: str) -> dict[str, Any]:
        """Raises Refused for one that is not there."""
        if item_id not in self._kept:
            refuse("item_not_found", "there is no such item", "item_id")
        return self._kept[item_id]

    def remove(self, item_id: str) -> None:
        """Forgets it. Idempotent."""
        self._text -= _characters(self._kept.pop(item_id, {}))

    def typed(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The message that a client made of text. Raises Refused."""
        if item.get("type", "message") != "message":
            refuse("unsupported_item", "items are messages: the model calls no tools", "item.type")
        role = item.get("role")
        if role not in ("user", "assistant", "system"):
            refuse("invalid_value", "roles are user, assistant and system", "item.role")
        parts = item.get("content")
        if not isinstance(parts, list) or not 1 <= len(parts) <= 16:
            refuse("invalid_value", "a message has 1 to 16 parts of text", "item.content")
        kind = self._dialect.content("output_text") if role == "assistant" else "input_text"
        content = []
        for part in parts:
            given = object_of(part, "item.content")
            if given.get("type", kind) not in ("input_text", "output_text", "text"):
                refuse("unsupported_content", "the parts of a message are text", "item.content")
            content.append({"type": kind, "text": text_of(given.get("text"), "item.content")})
        item_id = item.get("id")
        if item_id is None:
            item_id = self._id("t")
        elif id_of(item_id, "item.id") in self._kept:
            refuse("item_exists", "there is an item of that id", "item.id")
        told = {"id": item_id, "object": "realtime.item", "type": "message", "role": role}
        return {**told, "status": "incomplete", "content": content}

    def _id(self, kind: str) -> str:
        self._made += 1
        return f"item_{self._session[:20]}_{kind}{self._made}"


def id_of(value: Any, param: str) -> str:
    """An id that a client names. Raises Refused."""
    text = text_of(value, param)
    if not 0 < len(text) <= ID_LIMIT:
        refuse("invalid_value", f"{param} has 1 to {ID_LIMIT} characters", param)
    return text


def _characters(item: Mapping[str, Any]) -> int:
    """Of an item's text; 0 of no item."""
    return sum(len(part.get("text") or part.get("transcript") or "") for part in item.get("content", ()))
