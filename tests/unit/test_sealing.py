"""What is sealed for one purpose, with one of the secrets, is opened for that and by nobody else."""

from __future__ import annotations

import base64

import pytest

from deployments.wire.sealing import Sealer

SECRET, OTHER = bytes(32), bytes(range(32))
ONE = Sealer("one", [SECRET])


@pytest.mark.parametrize("plain", [b"", b"x", bytes(range(256)) * 9])
def test_what_was_sealed_is_opened_again(plain: bytes) -> None:
    opened, again = (ONE.open(ONE.seal(plain)) for _ in range(2))
    assert opened is not None
    assert again is not None
    assert opened.plain == again.plain == plain
    assert opened.nonce != again.nonce


def test_the_first_secret_seals_and_all_of_them_open() -> None:
    both = Sealer("one", [OTHER, SECRET])
    opened = both.open(ONE.seal(b"old"))
    assert opened is not None
    assert opened.plain == b"old"
    assert ONE.open(both.seal(b"new")) is None


def test_another_purpose_opens_nothing() -> None:
    assert Sealer("two", [SECRET]).open(ONE.seal(b"x")) is None
    assert Sealer("one", []).open(ONE.seal(b"x")) is None


def test_no_other_text_is_opened() -> None:
    text = ONE.seal(b"x")
    assert text.isascii()
    assert not set(text) & set("+/=")
    for other in ("", "A", "AAAA", "é" * 40, "a b", text[:-1], text[1:], text + "AAAA", text.swapcase()):
        assert ONE.open(other) is None, other
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert ONE.open(base64.urlsafe_b64encode(changed).decode().rstrip("=")) is None
