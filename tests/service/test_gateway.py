"""A running gateway: its refusals, its pages, and what it says of its clients; more in test_admission.py."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import requests
import websockets
from serving import Heard, Service, connect, running, speech
from websockets.http11 import Response as Refused

from personaplex.persona import PROMPTS, VOICES


@pytest.fixture(scope="module")
def service(cluster: str) -> Iterator[Service]:
    with running(
        cluster,
        model="echo",
        slots=2,
        api_keys="right",
        allowed_origins="https://a.example",
        sessions_per_key=1,
        session_limit_s=2.0,
        log_level="info",
    ) as service:
        yield service


def _refused(service: Service, headers: dict[str, str] | None = None, **query: Any) -> Refused:
    """The answer to an upgrade that is refused."""

    async def run() -> Refused:
        with pytest.raises(websockets.InvalidStatus) as caught:
            async with connect(service, headers, **query):
                pass
        return caught.value.response

    return asyncio.run(run())


def test_a_session_without_a_key_is_refused_in_words(service: Service) -> None:
    for answer in (_refused(service), _refused(service, {"X-API-Key": "wrong"}, worker_auth_id="right")):
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert b"key" in answer.body


def test_a_page_of_another_origin_is_refused(service: Service) -> None:
    answer = _refused(service, {"X-API-Key": "right", "Origin": "https://b.example"})
    assert answer.status_code == 403


def test_a_key_holds_as_many_sessions_as_it_may_and_a_session_its_time(service: Service) -> None:
    async def run() -> Heard:
        async with connect(service, {"Authorization": "Bearer right"}) as client:
            await client.headers()
            await client.until(lambda heard: heard.live)
            second = await asyncio.to_thread(_refused, service, {"X-API-Key": "right"})
            assert second.status_code == 429
            assert int(second.headers["retry-after"]) > 0
            talking = asyncio.ensure_future(client.speak(speech(4.0)))
            heard = await client.until_closed(4.0)
            await asyncio.wait({talking})
            talking.exception()
            return heard

    heard = asyncio.run(run())
    assert heard.code == 1000
    assert "limit" in heard.reason


def test_a_page_can_ask_why_it_was_refused(service: Service) -> None:
    """Browsers tell scripts nothing of an upgrade that failed."""
    for query, status in (("", 401), ("worker_auth_id=right", 204), ("worker_auth_id=right&seed=x", 400)):
        answer = service.get(f"api/admission?{query}")
        assert answer.status_code == status
        assert bool(answer.text) == (status != 204)


def test_pages_and_lists_are_served(service: Service) -> None:
    assert service.get("healthz").json() == {"status": "ok", "proxy_limits": True}
    info = service.info()
    assert (info["model"], info["slots"], info["replicas"], info["key_needed"]) == ("echo", 2, 1, True)
    voices = service.get("api/voices").json()
    assert [voice["name"] for voice in voices["voices"]] == list(VOICES)
    prompts = service.get("api/prompts").json()["prompts"]
    assert {prompt["id"]: prompt["text"] for prompt in prompts} == {p.id: p.text for p in PROMPTS.values()}
    page = service.get("")
    assert page.headers["content-type"].startswith("text/html")
    assert service.get("app.js").status_code == 200


@pytest.mark.parametrize("path", ["../settings.py", "..%2f..%2fpyproject.toml", "%2e%2e/app.py", "api/none"])
def test_no_path_leads_out_of_the_page(service: Service, path: str) -> None:
    url = f"http://{service.base}/{path}"
    prepared = requests.Request("GET", url).prepare()
    prepared.url = url  # as it stands: requests would tidy it up
    with requests.Session() as session:
        assert session.send(prepared, timeout=5).status_code == 404


def test_plain_http_on_the_chat_path_is_not_served(service: Service) -> None:
    answer = service.get("api/chat")
    assert answer.status_code == 426
    assert answer.headers["upgrade"] == "websocket"
    for path in ("api/other", "app.js", "api/info"):
        with pytest.raises(websockets.InvalidStatus) as caught:
            asyncio.run(_open(f"ws://{service.base}/{path}"))
        assert caught.value.response.status_code == 404


async def _open(url: str) -> None:
    async with websockets.connect(url):
        pass


async def _end(service: Service, headers: dict[str, str], **query: Any) -> Heard:
    async with connect(service, headers, **query) as client:
        return await client.until_closed()


def test_nothing_a_client_says_is_logged(service: Service) -> None:
    marker = "Zanzibar-4711"
    query = {"text_prompt": marker, "email": marker, "voice_prompt": marker, "text_temperature": marker}
    before = _logs()
    _refused(service, {"X-API-Key": marker, "Origin": f"https://{marker}"}, **query)
    _refused(service, {"X-API-Key": "right"}, **query)
    asyncio.run(_end(service, {"X-API-Key": "right"}, voice_prompt="Zanzibar"))
    after = _logs()
    forbidden = [sum(text.count("refused: Forbidden") for text in logs.values()) for logs in (before, after)]
    assert forbidden[1] == forbidden[0] + 1, "the gateway's own lines are among them"
    assert not [path for path, text in after.items() if "Zanzibar" in text]


def _logs() -> dict[Path, str]:
    """What all processes of the cluster have logged, whichever services they belong to."""
    folder = Path("/tmp/ray", ray.get_runtime_context().get_session_name(), "logs")
    return {
        path: path.read_text(encoding="utf-8", errors="replace")
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_gateway_runs_without_torch(service: Service) -> None:
    """In the live process, and by import."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            title = (entry / "cmdline").read_bytes() if (entry / "cmdline").exists() else b""
            if title.startswith(f"ray::ServeReplica:{service.name}:gateway".encode()):
                assert "libtorch" not in (entry / "maps").read_text()
                break
    else:
        raise AssertionError("no gateway process")
    code = "import sys, deployments.application, deployments.gateway.app; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
