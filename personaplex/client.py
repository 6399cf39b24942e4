"""Talks to a PersonaPlex service from a terminal: `python -m personaplex.client --help`.

Streams a recording in real time (or the microphone), keeps what the agent says on the time line of what was
said, and reports how prompt it was. Works with this project's service and with NVIDIA's own server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Sequence

from personaplex import cli

if __name__ == "__main__":
    cli.guard_imports("client")

from personaplex.audio.device import Device
from personaplex.client_access import key_of, upload_voice
from personaplex.client_call import Conversation, microphone, paced
from personaplex.client_io import (
    chat_url,
    check_outputs,
    keep,
    load_recording,
    parser,
    tls_context,
)
from personaplex.config import Pcm
from personaplex.errors import ConfigError, PersonaplexError
from personaplex.outputs import check_room, wav_bytes

LAST_WORDS_S = 2.0  # that a transcriber may need for the end of a recording, beyond its tail


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0 when the conversation ended as wished, 1 for an error, 2 for a command line that
    makes no sense, 130 for an interrupt.

    An interrupt is how a microphone session is meant to end. However it ends, what was heard is kept.
    """
    return cli.run(lambda: _main(parser().parse_args(argv)), "client")


def _main(options: argparse.Namespace) -> int:
    options.api_key = key_of(options.api_key, options.key_file)
    url = chat_url(options)
    try:
        check_outputs(options)
        said = load_recording(options.input_wav, options.tail, options.channel) if options.input_wav else None
        if options.output_wav and said is not None:
            check_room(options.output_wav, wav_bytes(len(said)))
        if options.own_voice is not None:
            options.voice = _own_voice(options, url)
            url = chat_url(options)
    except (PersonaplexError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        cli.complain(cli.reason(error))
        return cli.FAILED
    return _talk(options, url, said)


def _own_voice(options: argparse.Namespace, url: str) -> str:
    """Uploads the recording, says what is wrong with it, and gives the voice's name."""
    tls = tls_context(url, options.insecure)
    voice = upload_voice(url, options.own_voice, options.api_key, tls)
    _inform(f"own voice: {voice.seconds:.1f} s")
    for problem in voice.problems:
        _inform(f"own voice: {problem}")
    return voice.name


def _talk(options: argparse.Namespace, url: str, said: Pcm | None) -> int:
    kept: list[Conversation] = []
    code = 0
    try:
        asyncio.run(_converse(options, url, said, kept))
    except KeyboardInterrupt:
        code = cli.INTERRUPTED if said is not None else 0
    except (PersonaplexError, OSError) as error:
        cli.complain(cli.reason(error))
        code = cli.FAILED
    for conversation in kept:
        report = conversation.report
        print("\n" * bool(report.transcript), end="")
        if options.transcript and report.session and not report.session.get("transcription"):
            _inform("this service does not transcribe what you say: --transcript has the agent's side only")
        _inform(report.lines())
        for failure in keep(
            report, conversation.heard, conversation.transcript, options, 0 if said is None else len(said)
        ):
            cli.complain(failure)
            code = code or cli.FAILED
    return code


async def _converse(
    options: argparse.Namespace, url: str, said: Pcm | None, kept: list[Conversation]
) -> None:
    """Holds one conversation; it is in `kept` from its beginning, so that an interrupt does not lose it."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    loop, ready = asyncio.get_running_loop(), asyncio.Event()

    def notify() -> None:
        loop.call_soon_threadsafe(ready.set)

    last_words_s = LAST_WORDS_S if options.transcript else 0.0
    with contextlib.ExitStack() as stack:
        if said is not None:
            conversation = Conversation(
                lambda: paced(said), show=_show, tell=_inform, last_words_s=last_words_s
            )
        else:
            device = stack.enter_context(Device(notify))
            conversation = Conversation(
                lambda: microphone(device, ready),
                play=device.play,
                show=_show,
                tell=_inform,
                last_words_s=last_words_s,
            )
        kept.append(conversation)
        await conversation.run(url, headers, tls_context(url, options.insecure))


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _inform(notice: str) -> None:
    print(notice, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
