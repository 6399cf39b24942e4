"""Decodes the few protobuf messages that client-go sends instead of JSON: Secrets, ConfigMaps, Namespaces,
options of a delete. Field numbers are those of k8s.io/api/core/v1 and of apimachinery.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

MAGIC = b"k8s\x00"


def decode(body: bytes) -> dict[str, Any]:
    """The object in an envelope. Raises ValueError for kinds that are not needed here."""
    if not body.startswith(MAGIC):
        raise ValueError("no Kubernetes protobuf envelope")
    envelope = dict(_fields(body[len(MAGIC) :]))
    kind = dict(_fields(envelope[1]))
    api, name, raw = kind[1].decode(), kind[2].decode(), envelope[2]
    decoded: dict[str, Any] = {"apiVersion": api, "kind": name}
    if name == "DeleteOptions":
        return decoded
    if name not in ("Secret", "ConfigMap", "Namespace"):
        raise ValueError(f"protobuf {name} is not decoded")
    values: dict[str, Any] = {}
    for number, value in _fields(raw):
        if number == 1:
            decoded["metadata"] = _metadata(value)
        elif number == 2 and name != "Namespace":
            key, data = _entry(value)
            values[key] = base64.b64encode(data).decode() if name == "Secret" else data.decode()
        elif number == 3 and name == "Secret":
            decoded["type"] = value.decode()
    if values:
        decoded["data"] = values
    return decoded


def _metadata(raw: bytes) -> dict[str, Any]:
    metadata: dict[str, Any] = {"labels": {}, "annotations": {}}
    names = {1: "name", 3: "namespace", 5: "uid", 6: "resourceVersion"}
    for number, value in _fields(raw):
        if number in names and value:
            metadata[names[number]] = value.decode()
        elif number in (11, 12):
            key, text = _entry(value)
            metadata["labels" if number == 11 else "annotations"][key] = text.decode()
    return metadata


def _entry(raw: bytes) -> tuple[str, bytes]:
    fields = dict(_fields(raw))
    return fields[1].decode(), fields.get(2, b"")


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    position = 0
    while position < len(raw):
        tag, position = _varint(raw, position)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, position = _varint(raw, position)
            yield number, value
        elif kind == 2:
            length, position = _varint(raw, position)
            yield number, raw[position : position + length]
            position += length
        else:
            raise ValueError(f"wire type {kind}")


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if not byte & 0x80:
            return value, position
