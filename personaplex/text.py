"""Role texts to tokens, tokens to text. Knows sentencepiece and the text ids of the model; no tensors.

A prompt is wrapped in the model's own tags, `<system> ... <system>` (both in the opening form: the model was
trained so). Outwards, token by token, `piece` gives the reference's spelling and `PieceDecoder` real text:
byte pieces (`<0xC3>`, `<0xA9>`) become characters there as soon as they are whole.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path

import sentencepiece

from personaplex.config import TEXT_EPAD, TEXT_PAD
from personaplex.errors import BadParameter, CheckpointError
from personaplex.files import read_bounded

_TAG = "<system>"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space inside a piece
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SAMPLE = f"{_TAG} A guide: \N{LATIN SMALL LETTER E WITH ACUTE}\N{GRINNING FACE} {_TAG}"
_FILE_LIMIT = 2**26  # bytes; the released one has half a megabyte
_NAMES = {TEXT_EPAD: "EPAD", TEXT_PAD: "PAD"}


class Tokenizer:
    """A sentencepiece vocabulary: `encode_prompt` inwards, `piece` outwards."""

    def __init__(self, source: Path | str | bytes, size: int | None = None) -> None:
        """`source` is a file or its content; `size` the number of pieces the model's text vocabulary needs.

        Raises CheckpointError when it is no sentencepiece model or of another size.
        """
        try:
            model = source if isinstance(source, bytes) else read_bounded(source, _FILE_LIMIT)
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.LoadFromSerializedProto(model)  # unlike the constructor, refuses an empty file too
            self.size: int = self._model.get_piece_size()
            self._check_pieces()
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError("the tokenizer is no readable sentencepiece model") from error
        if size is not None and self.size != size:
            raise CheckpointError(f"the tokenizer has {self.size} pieces, the model needs {size}")

    def _check_pieces(self) -> None:
        """Raises ValueError or RuntimeError for what would else end the session that meets it."""
        ids = list(range(self.size))
        pieces = self._model.id_to_piece(ids)  # UnicodeDecodeError, a ValueError
        if not all(_BYTE.fullmatch(pieces[i]) for i in ids if self._model.is_byte(i)):
            raise ValueError("a byte piece that names no byte")
        self._model.encode(_SAMPLE)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a role text in its system tags, without BOS and EOS; [] for an empty text.

        Raises BadParameter for a text that is not Unicode: one with lone surrogates.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadParameter("the role text is not Unicode text") from error
        text = text.strip()
        if not text:
            return []
        if not (text.startswith(_TAG) and text.endswith(_TAG)):
            text = f"{_TAG} {text} {_TAG}"
        ids: list[int] = self._model.encode(text, add_bos=False, add_eos=False)
        return ids

    def encode_word(self, word: str) -> list[int]:
        """Token ids of one word of a transcript, as the agent's text stream holds it. `word` is Unicode."""
        ids: list[int] = self._model.encode(word, add_bos=False, add_eos=False)
        return ids

    def piece(self, token: int) -> str:
        """The piece of one id, with a plain space for sentencepiece's own; byte pieces stay `<0xNN>`."""
        piece: str = self._model.id_to_piece(token)
        return piece.replace(_SPACE, " ")

    def label(self, token: int) -> str:
        """`piece`, with the two paddings named: EPAD (end of padding) and PAD."""
        return _NAMES.get(token) or self.piece(token)

    def byte(self, token: int) -> int | None:
        """The value of a byte piece, None for every other piece."""
        return int(self._model.id_to_piece(token)[3:5], 16) if self._model.is_byte(token) else None


class PieceDecoder:
    """One session's text tokens to text, whole characters only.

    Padding gives nothing and does not interrupt a character spelled in byte pieces; any other piece does, and
    what was left unfinished then becomes U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes: "" for padding and inside a character."""
        if token in _NAMES:
            return ""
        byte = self._tokenizer.byte(token)
        if byte is not None:
            return self._bytes.decode(bytes([byte]))
        return self.flush() + self._tokenizer.piece(token)

    def flush(self) -> str:
        """Ends the text: U+FFFD for an unfinished character, else ""."""
        rest = self._bytes.decode(b"", final=True)
        self._bytes.reset()
        return rest
