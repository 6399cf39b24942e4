"""The clients in docs/protocols run as they are printed, but for the address and the account's token."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from protocol_service import ProtocolService, talker

DOCS = Path(__file__).resolve().parents[2] / "docs" / "protocols"


def first_snippet(page: str) -> str:
    found = re.search(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("live.md", " Hello how are you?\nheard 2 s\n"),
        ("realtime.md", " Hello how are you?\n"),
        ("telephone.md", "80 ms of the agent\n"),
    ],
)
def test_the_pages_client_runs(
    page: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("AUTH_TOKEN\n")
    settings = {"public_url": "https://talk.example.org", "twilio_token_file": token}
    protocols = ("live", "realtime", "twilio")
    with ProtocolService(talker(" Hello", " how are you?"), protocols=protocols, **settings) as service:
        exec(compile(first_snippet(page).replace("localhost:8998", service.base), page, "exec"), {})
    assert capsys.readouterr().out == said
