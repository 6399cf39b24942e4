"""An operator's view of a service: `python -m personaplex.sessions --help`.

Lists which replica holds which session, brings one session to another replica, or all of one replica's. Talks
to `/api/admin` of any gateway; see docs/resume.md.
"""

from __future__ import annotations

import argparse
import http.client
import json
import ssl
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from personaplex import cli
from personaplex.client_access import read_key
from personaplex.errors import (
    ClientError,
    ConfigError,
    Forbidden,
    PersonaplexError,
    ProtocolError,
    SessionLost,
    Unauthorized,
)

TIMEOUT_S = 330.0  # a drain without room takes as long as a gateway waits for it
ANSWER_LIMIT = 16_000_000
WORDS_LIMIT = 300
MOVED = "moved"

_KINDS: Mapping[int, type[PersonaplexError]] = {400: ClientError, 401: Unauthorized, 403: Forbidden}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; exit codes are those of `cli`, and 1 where a session that was to be moved stayed."""
    return cli.run(lambda: run(_parser().parse_args(argv)), "client")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m personaplex.sessions",
        description="Which replica holds which session; with --move or --drain, brings sessions to others.",
    )
    parser.add_argument("--url", default="http://localhost:8998", help="the service's address")
    parser.add_argument("--key-file", type=Path, required=True, help="operator's key, of admin_keys_file")
    parser.add_argument("--insecure", action="store_true", help="accept any certificate")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--move", metavar="SESSION", help="bring this session to another replica")
    chosen.add_argument("--drain", metavar="REPLICA", help="bring all sessions of this replica to others")
    parser.add_argument(
        "--hold", type=float, default=60.0, metavar="SECONDS", help="that --drain keeps new sessions away"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Raises the typed error of a refusal, ConfigError, SessionLost where nobody answers."""
    key = read_key(options.key_file)
    tls = ssl.create_default_context()
    if options.insecure:
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    if not options.move and not options.drain:
        print(table(ask(options.url, key, "sessions", tls=tls)))
        return 0
    order = {"session": options.move} if options.move else {"replica": options.drain, "hold_s": options.hold}
    answer = ask(options.url, key, "moves", order, tls)
    print(outcomes(answer))
    stayed = [one for one in answer["sessions"] if one["outcome"] not in (MOVED, "ended")]
    return cli.FAILED if stayed or answer["gateways_silent"] else 0


def ask(
    url: str, key: str, what: str, order: Mapping[str, Any] | None = None, tls: ssl.SSLContext | None = None
) -> dict[str, Any]:
    """The answer of `/api/admin/WHAT` of the service at `url`, to an order if there is one. Raises the typed
    error of a refusal, SessionLost where nobody answers."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("--url must look like http://HOST:8998")
    try:
        port = parts.port
    except ValueError as error:
        raise ConfigError("--url must look like http://HOST:8998") from error
    connection = (
        http.client.HTTPSConnection(parts.hostname, port, timeout=TIMEOUT_S, context=tls)
        if parts.scheme == "https"
        else http.client.HTTPConnection(parts.hostname, port, timeout=TIMEOUT_S)
    )
    body = None if order is None else json.dumps(order).encode()
    try:
        path = f"{parts.path.rstrip('/')}/api/admin/{what}"
        connection.request("GET" if body is None else "POST", path, body, {"Authorization": f"Bearer {key}"})
        with connection.getresponse() as answer:
            status, said = answer.status, answer.read(ANSWER_LIMIT)
    except (OSError, http.client.HTTPException) as error:
        raise SessionLost(f"the service does not answer: {error or type(error).__name__}") from error
    finally:
        connection.close()
    if status != 200:
        raise _refusal(status, said)
    return _read(said, "replicas" if order is None else "sessions")


def _refusal(status: int, body: bytes) -> PersonaplexError:
    words = body[:WORDS_LIMIT].decode(errors="replace").strip()
    said = f": {words}" if words and words.isprintable() else ""
    kind = _KINDS.get(status, SessionLost if status >= 500 else ProtocolError)
    return kind(f"the service refused it (HTTP {status}){said}")


def _read(body: bytes, rows: str) -> dict[str, Any]:
    """Raises ProtocolError for what is no answer of ours."""
    wrong = ProtocolError("the service's answer cannot be read")
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise wrong from error
    if not isinstance(answer, dict) or not isinstance(answer.get(rows), list):
        raise wrong
    if rows == "sessions" and not (
        isinstance(answer.get("gateways_silent"), int)
        and all(isinstance(one, dict) and "outcome" in one for one in answer[rows])
    ):
        raise wrong
    return answer


def table(answer: Mapping[str, Any]) -> str:
    """One line a session, under its replica, for people."""
    lines = []
    for one in answer["replicas"]:
        closed = "" if one["accepting"] else ", takes no new ones"
        lines.append(f"{one['replica']}: {len(one['sessions'])} of {one['slots']} slots{closed}")
        lines += [f"  {each['session']}  {each['seconds']:.0f} s" for each in one["sessions"]]
        lines += [f"  {session}  its client is away" for session in one["detached"]]
    return "\n".join(lines) or "no replica is there"


def outcomes(answer: Mapping[str, Any]) -> str:
    """One line a session that was to be moved, for people."""
    lines = [
        f"{one['session']}: {one['outcome']}"
        + (f", {one['from']} -> {one['to']}" if one["outcome"] == MOVED else f", at {one['from']}")
        for one in answer["sessions"]
    ]
    if answer["gateways_silent"]:
        lines.append(f"{answer['gateways_silent']} gateways gave no answer: ask again")
    return "\n".join(lines) or "no session was there"


if __name__ == "__main__":
    sys.exit(main())
