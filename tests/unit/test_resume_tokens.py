"""What a token is good for: one resume of one session, shown to whoever holds it."""

from __future__ import annotations

import base64
import os
import uuid

import pytest

from deployments.wire.tokens import TOKEN_LENGTH, ResumeClaim, ResumeTokens
from personaplex.errors import ResumeRefused

SECRET, OTHER = bytes(range(32)), bytes(range(1, 33))
CLAIM = ResumeClaim(uuid.UUID(int=7).hex, 3)


def test_a_token_says_to_its_maker_what_it_was_made_of() -> None:
    tokens = ResumeTokens([SECRET])
    for counter in (0, 1, 2**32 - 1):
        claim = ResumeClaim(uuid.uuid4().hex, counter)
        token = tokens.make(claim)
        assert len(token) == TOKEN_LENGTH
        assert tokens.read(token) == claim


def test_nothing_of_it_can_be_read_and_no_two_are_alike() -> None:
    tokens = ResumeTokens([SECRET])
    made = {tokens.make(CLAIM) for _ in range(50)}
    assert len(made) == 50
    for token in made:
        data = base64.urlsafe_b64decode(token)
        assert bytes.fromhex(CLAIM.session) not in data
        assert CLAIM.session not in token
    for position in range(12, 48):
        seen = {base64.urlsafe_b64decode(token)[position] for token in made}
        assert len(seen) > 10, "no byte of it stays the same"


def test_the_secret_before_this_one_still_reads() -> None:
    token = ResumeTokens([SECRET]).make(CLAIM)
    assert ResumeTokens([OTHER, SECRET]).read(token) == CLAIM
    with pytest.raises(ResumeRefused):
        ResumeTokens([OTHER]).read(token)


@pytest.mark.parametrize(
    "token", ["", "x", "ß" * 64, "A" * 64, "A" * 63, "A" * 10_000, "%00", "a b", "=" * 64]
)
def test_what_is_no_token_is_refused_with_one_word(token: str) -> None:
    with pytest.raises(ResumeRefused) as caught:
        ResumeTokens([SECRET]).read(token)
    assert str(caught.value) == "expired"


def test_a_token_with_any_bit_changed_is_refused() -> None:
    tokens = ResumeTokens([SECRET])
    data = base64.urlsafe_b64decode(tokens.make(CLAIM))
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ResumeRefused):
            tokens.read(base64.urlsafe_b64encode(changed).decode())


def test_random_tokens_are_refused() -> None:
    tokens = ResumeTokens([SECRET])
    for _ in range(1_000):
        with pytest.raises(ResumeRefused):
            tokens.read(base64.urlsafe_b64encode(os.urandom(48)).decode())
