"""Every error this project raises on purpose.

    PersonaplexError
    ├── ConfigError          a setting is wrong; the process does not start
    ├── CheckpointError      weights, tokenizer or voices cannot be loaded; the process does not start
    ├── TrainingFailed       a training run cannot go on; what it had saved is there
    ├── BadRecord            a file is no record, or so damaged that nothing of it can be read
    ├── RecordingFailed      a record cannot be kept any further: disk full, store out of reach
    ├── ClientError          the client can mend it; close code 1008 unless a class says otherwise
    │   ├── ProtocolError    bytes or messages outside the wire protocol (1002)
    │   ├── BadAudio         audio that cannot be used: unreadable, silent, too short (1007)
    │   ├── BadParameter     a sampling value, seed or option outside its range
    │   ├── UnknownVoice     no such voice in the library
    │   ├── PromptTooLong    the role text has more tokens than the service accepts
    │   ├── Unauthorized     missing or wrong key (HTTP 401)
    │   ├── Forbidden        pages of this origin may not connect (HTTP 403)
    │   ├── ResumeRefused    there is no session to be had for this token (HTTP 410)
    │   └── TooManySessions  the caller's own limit (HTTP 429); `retry_after_s` says when to come back
    ├── NoCapacity           no slot is free (1013, HTTP 503); `retry_after_s` says when to come back
    ├── SessionLost          the session ended through no fault of the client (1012)
    │   └── RepeatedlyLost   it lost replica after replica, and may be what ends them: it is not kept
    ├── SessionTaken         its client has come back over another connection (1012)
    ├── LogRefused           a session log that nothing can be rebuilt from: damaged, or of another model
    │   └── UnknownVersion   a log of a version that this process does not read
    ├── SessionExpired       the session reached its longest duration (1000)
    │   └── SessionIdle      the client sent no audio for too long (1000)
    └── EngineFault          the engine cannot go on; its replica reports itself unhealthy (1011)

The message of every error is fit to be read by a client: it holds no path, no key and nothing of another
session. `close_code` is the WebSocket close code and `http_status` the answer to an upgrade that is refused.
"""

from __future__ import annotations


class PersonaplexError(Exception):
    """Root of the tree; `str(error)` is safe to show to a client."""

    close_code = 1011
    http_status = 500


class ConfigError(PersonaplexError):
    """A setting or option is wrong."""


class CheckpointError(PersonaplexError):
    """Weights, tokenizer or voices are missing, damaged or of another shape."""


class TrainingFailed(PersonaplexError):
    """A training run cannot go on from here."""


class BadRecord(PersonaplexError):
    """A file is no record, or its head is damaged."""


class RecordingFailed(PersonaplexError):
    """A record cannot be kept any further; the conversation goes on."""


class ClientError(PersonaplexError):
    """The request cannot be served as it stands; the client can mend it."""

    close_code = 1008
    http_status = 400


class ProtocolError(ClientError):
    """Bytes or messages outside the wire protocol."""

    close_code = 1002


class BadAudio(ClientError):
    """Audio that cannot be used."""

    close_code = 1007
    http_status = 422


class BadParameter(ClientError):
    """A value outside its range."""


class UnknownVoice(ClientError):
    """No such voice in the library."""


class PromptTooLong(ClientError):
    """The role text has more tokens than the service accepts."""


class Unauthorized(ClientError):
    """The client shows no valid key."""

    http_status = 401


class Forbidden(ClientError):
    """Pages of the browser's origin may not connect."""

    http_status = 403


class ResumeRefused(ClientError):
    """A resume token is used, expired, forged, or of a session that is gone; nobody is told which."""

    http_status = 410

    def __init__(self, message: str = "expired") -> None:
        super().__init__(message)


class TooManySessions(ClientError):
    """The caller is at a limit of its own, or is back too soon; try after `retry_after_s` seconds. `limit`
    names which one: sessions, minutes, queue, address, audio, uploads."""

    http_status = 429

    def __init__(self, message: str, retry_after_s: float = 5.0, limit: str = "") -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s, self.limit = retry_after_s, limit

    def __str__(self) -> str:
        return str(self.args[0])


class NoCapacity(PersonaplexError):
    """No slot is free; try again after `retry_after_s` seconds."""

    close_code = 1013
    http_status = 503

    def __init__(self, message: str, retry_after_s: float = 5.0) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class SessionLost(PersonaplexError):
    """The session ended through no fault of the client."""

    close_code = 1012
    http_status = 503


class RepeatedlyLost(SessionLost):
    """The session lost one replica after another without having gone on: nobody goes on with it."""


class SessionTaken(PersonaplexError):
    """The session's client has come back over another connection, so this one ends."""

    close_code = 1012

    def __init__(self, message: str = "the conversation goes on over another connection") -> None:
        super().__init__(message)


class LogRefused(PersonaplexError):
    """A session log that nothing can be rebuilt from here; its session stays where it is."""

    close_code = 1012
    http_status = 503


class UnknownVersion(LogRefused):
    """A session log of a version that this process does not read; another one may."""


class SessionExpired(PersonaplexError):
    """The session reached its longest duration."""

    close_code = 1000


class SessionIdle(SessionExpired):
    """The client sent no audio for too long."""


class EngineFault(PersonaplexError):
    """The engine cannot go on."""
