"""Prompts as token ids: PaliGemma's SentencePiece model where there is one, else a stand-in that counts alike.

How long a call takes depends on the number of tokens, not on their ids, so a benchmark can do without the file. Actions
that mean something need it.
"""

import re
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np

from pi0exp.errors import UserError

PAD, BOS, NEWLINE = 0, 2, 108
"""Ids in PaliGemma's vocabulary."""

FIRST_WORD = 3
"""The first id that a made-up word may have; those below are marks (1 ends a text)."""

# As in PaliGemma's pieces a word and a punctuation mark take the space before them along, while digits stand alone,
# with the space before them a piece of its own.
_PIECES = re.compile(r"\n| ?[^\W\d_]+| ?[^\w\s]|\d|\s|_")


class Tokenizer(Protocol):
    """`label` goes into the record of a run: actions from different tokenizers cannot be compared."""

    label: str
    bos: int
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...


class SentencePiece:
    """A SentencePiece model file. Raises UserError if it is missing, no such model or has no start-of-text piece."""

    label = "sentencepiece"

    def __init__(self, path: Path | str) -> None:
        if not Path(path).is_file():
            raise UserError(
                f"tokenizer {path} is no file; wanted PaliGemma's SentencePiece model, or null for a stand-in"
            )
        # Only a recorded or a live prompt is tokenised; everything else starts without the library.
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"tokenizer {path} is no SentencePiece model") from error
        self.bos = int(self._processor.bos_id())
        self.vocab_size = int(self._processor.vocab_size())
        if self.bos < 0:
            raise UserError(f"tokenizer {path} has no start-of-text piece, with which every prompt begins")

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self._processor.encode(text)]


class StandIn:
    """Ids by checksum: the same piece always has the same id, any id is below `vocab_size` and none is special."""

    label = "stand-in"
    bos = BOS

    def __init__(self, vocab_size: int) -> None:
        if vocab_size <= FIRST_WORD:
            raise UserError(f"vocab_size is {vocab_size}; a prompt needs {FIRST_WORD + 1} or more")
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [self._id(piece) for piece in _PIECES.findall(text)]

    def _id(self, piece: str) -> int:
        if piece == "\n" and self.vocab_size > NEWLINE:
            return NEWLINE
        return FIRST_WORD + zlib.crc32(piece.encode()) % (self.vocab_size - FIRST_WORD)


def load_tokenizer(path: Path | str | None, vocab_size: int) -> Tokenizer:
    """The model file's tokenizer, or the stand-in for None. `vocab_size` is the model's, which the ids must fit."""
    if path is None:
        return StandIn(vocab_size)
    tokenizer = SentencePiece(path)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"tokenizer {path} has {tokenizer.vocab_size} pieces; the model's vocabulary has {vocab_size}")
    return tokenizer


def clean(text: str) -> str:
    """One line without underscores. Upper and lower case stay as they are."""
    return text.strip().replace("_", " ").replace("\n", " ")


def prompt_tokens(tokenizer: Tokenizer, text: str, state_A: np.ndarray, pi05: bool) -> list[int]:
    """The prompt as the model was trained on it; Pi0.5 reads the state from it.

    state_A: the normalised state of the robot, before it is padded; only Pi0.5 looks at it.
    """
    if not pi05:
        return [tokenizer.bos, *tokenizer.encode(clean(text)), *tokenizer.encode("\n")]
    numbers = " ".join(str(number) for number in state_bins(state_A))
    return [tokenizer.bos, *tokenizer.encode(f"Task: {clean(text)}, State: {numbers};\nAction: ")]


def state_bins(state_A: np.ndarray) -> list[int]:
    """256 bins over [-1, 1]: 0.0 -> 128, 1.0 and above -> 255. Below -1 it is -1, which Pi0.5 saw in training too."""
    return [int(number) for number in np.digitize(state_A, np.linspace(-1, 1, 257)[:-1]) - 1]


def pad_tokens(ids: list[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """`ids` as int64 [length] and the bool mask [length] of those that are real. What is too long loses its end."""
    kept = ids[:length]
    tokens_L = np.full(length, PAD, np.int64)
    tokens_L[: len(kept)] = kept
    return tokens_L, np.arange(length) < len(kept)
