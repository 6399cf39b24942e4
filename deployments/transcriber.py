"""The transcriber deployment: Whisper on CPUs, a piece of speech at a time.

It starts at once and loads its model beside: while there is none it says so, tries again, and answers every
call with Unready. So a model that is missing or wrong stops no deployment and no call. It runs niced, and
what it reads is neither logged nor kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor

from deployments import logs, metrics
from deployments.parts import TranscriberSettings
from deployments.wire.speech import Answer, Reading, Unreadable, Unready
from personaplex.errors import ConfigError
from personaplex.transcription.listener import Speech
from personaplex.transcription.whisper import Options, Whisper

logger = logging.getLogger(__name__)

AT_ONCE = 2  # calls a transcriber takes: the one it works on and the next
NICE = 5  # below gateways and replicas of the same machine
RETRY_S, LONGEST_RETRY_S = 2.0, 60.0  # between two tries to load the model


class Transcriber:
    """Made by Serve, one per process."""

    async def __init__(self, settings: TranscriberSettings) -> None:  # type: ignore[misc]  # Serve awaits it
        logs.configure(settings.log_level, settings.log_format)
        with contextlib.suppress(OSError):
            os.nice(NICE)
        self._options = Options(
            model=settings.transcription_model,
            language=settings.transcription_language,
            threads=math.ceil(settings.transcriber_num_cpus),
        )
        self._metrics = metrics.transcriber_metrics()
        self._metrics.set(metrics.TRANSCRIBER_READY, 0)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="whisper")
        self._whisper: Whisper | None = None
        self._unready = "its model is being loaded"
        self._tasks = [asyncio.ensure_future(self._load()), asyncio.ensure_future(self._metrics.keep())]

    async def transcribe(self, speech: Speech) -> Answer:
        """What is said in a piece of speech."""
        if self._whisper is None:
            return Unready(self._unready)
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._worker, self._read, self._whisper, speech
            )
        except Exception as error:  # noqa: BLE001  CTranslate2's own; what it says may hold no word of the user
            logger.error("a piece of speech could not be read: %s", type(error).__name__)
            return Unreadable()

    def _read(self, whisper: Whisper, speech: Speech) -> Reading:
        began = time.perf_counter()
        segment = whisper.read(speech)
        took = time.perf_counter() - began
        self._metrics.add(metrics.TRANSCRIPTION_SPEECH, speech.seconds)
        self._metrics.add(metrics.TRANSCRIPTION_WORK, took)
        self._metrics.observe(metrics.TRANSCRIPTION_FACTOR, took / speech.seconds)
        return Reading(segment)

    async def _load(self) -> None:
        """Until there is a model; a failure is one line, however often it repeats."""
        wait_s = RETRY_S
        while True:
            try:
                self._whisper = await asyncio.get_running_loop().run_in_executor(
                    self._worker, Whisper, self._options
                )
            except ConfigError as error:
                if str(error) != self._unready:
                    logger.error("no words of users until there is a model: %s", error)
                self._unready = str(error)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_RETRY_S)
            else:
                self._metrics.set(metrics.TRANSCRIBER_READY, 1)
                logger.info("transcribing with %s", self._options.model or "the embedded model")
                return
