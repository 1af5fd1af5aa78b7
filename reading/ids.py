"""Ids of annotation files, and how messages name an entry.

An id is an int or a str; 7, 7.0 and "7" are the same id. `id_key` is equal for all notations of an
id. `id_order` sorts ids: numbers first, then strings.
"""

import re
from dataclasses import dataclass

import numpy as np

from runtime.errors import InputError, shown

Id = int | str


@dataclass
class EntryName:
    """The name of an entry in messages, formatted only when needed. It contains the id, if any."""

    what: str  # "video"
    index: int
    entry: object
    file: str

    def __str__(self) -> str:
        if isinstance(self.entry, dict) and id_key(self.entry.get("id")) is not None:
            return f"{self.what} {shown(self.entry['id'])} of {self.file}"
        return f"{self.what} at index {self.index} of {self.file}"


def id_key(value) -> Id | None:
    """A value equal for all notations of an id; None if it is no id (true, NaN, 1.5, null)."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str) and value:
        whole = re.fullmatch(r"(-?[0-9]{1,18})(\.0+)?", value)
        return int(whole[1]) if whole else value
    return None


def id_order(value: Id) -> tuple:
    """A sort key: numbers first, then strings with natural order of digits ("v9", "v10")."""
    key = id_key(value)
    if isinstance(key, int):
        return 0, key
    pieces = re.split(r"([0-9]{1,18})", key)  # text and digits alternate
    return 1, [int(piece) if place % 2 else piece for place, piece in enumerate(pieces)], key


def read_id(entry: dict, key: str, where: EntryName) -> Id:
    """The id under a key, numbers as int; InputError if it is no id."""
    value_key = id_key(entry.get(key))
    if value_key is None:
        raise InputError(
            f"{where} has {key} {shown(entry.get(key))}, which is no id: "
            "ids are whole numbers or text"
        )
    return entry[key] if isinstance(entry[key], str) else value_key


def by_id(entries: list[dict], what: str, name: str) -> dict[Id, dict]:
    """{id_key: entry}; InputError if two entries have the same id."""
    entry_of = {}
    for entry in entries:
        other = entry_of.setdefault(id_key(entry["id"]), entry)
        if other is not entry:
            raise InputError(
                f"{name} has two {what} of one id: {shown(other['id'])} and {shown(entry['id'])}"
            )
    return entry_of
