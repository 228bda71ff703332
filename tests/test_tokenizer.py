"""Prompts as token ids: the published vector by its length, the binning of states, real and broken model files."""

from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from pi0exp.errors import UserError
from pi0exp.tokenizer import SentencePiece, StandIn, clean, load_tokenizer, pad_tokens, prompt_tokens, state_bins

VOCABULARY = 257152
PUBLISHED_TEXT = "Task: pick up cube, State: 0 128 255;\nAction: "
PUBLISHED_IDS = [2, 7071, 235292, 4788, 908, 28660, 235269, 3040, 235292, 235248, 235276, 235248, 235274, 235284]
PUBLISHED_IDS += [235321, 235248, 235284, 235308, 235308, 235289, 108, 4022, 235292, 235248]
"""What PaliGemma's own tokenizer gives for the text, start of text included."""


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("sentencepiece") / "tiny"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            ["pick up the cube", "transfer cube", "Task: State: 0 1 2 3 4 5 6 7 8 9;", "Action:"] * 20
        ),
        model_prefix=str(prefix),
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        add_dummy_prefix=False,
        byte_fallback=False,
        user_defined_symbols=["\n"],
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


def test_the_stand_in_has_the_pieces_of_the_published_vector() -> None:
    tokenizer = StandIn(VOCABULARY)
    ids = [tokenizer.bos, *tokenizer.encode(PUBLISHED_TEXT)]
    assert len(ids) == len(PUBLISHED_IDS) == 24
    # Not only as many: where the published ids repeat, these do too.
    same = [[a == b for b in ids] for a in ids]
    assert same == [[a == b for b in PUBLISHED_IDS] for a in PUBLISHED_IDS]


@pytest.mark.parametrize("vocabulary", [4, 100, 512, VOCABULARY])
def test_stand_in_ids_are_fixed_and_below_the_vocabulary(vocabulary: int) -> None:
    text = "Put the\tgreen_cube (n° 12) on “it”, -1 é!\n  "
    ids = StandIn(vocabulary).encode(text)
    assert ids == StandIn(vocabulary).encode(text)
    assert min(ids) >= 3
    assert max(ids) < vocabulary


def test_stand_in_newline_is_paligemmas_where_it_fits() -> None:
    assert StandIn(VOCABULARY).encode("\n") == [108]
    assert StandIn(108).encode("\n") != [108]
    assert StandIn(VOCABULARY).encode("cube") == StandIn(VOCABULARY).encode("cube")
    with pytest.raises(UserError, match="vocab_size is 3"):
        StandIn(3)


def test_every_character_of_a_text_counts() -> None:
    """n digits are n + 1 tokens with the space before them; nothing is dropped."""
    encode = StandIn(VOCABULARY).encode
    assert [len(encode(text)) for text in ("", "a", " a", " 7", " 128", " -1", "a, b", "  a", "a_b", "don't")] == [
        *(0, 1, 1, 2, 4, 2, 3, 2, 3, 3)
    ]


def test_clean() -> None:
    assert clean(" Pick_up\nthe Cube \n") == "Pick up the Cube"


def test_state_bins() -> None:
    state = np.array([0.0, 1.0, 7.0, 0.999, -1.0, -0.999, -1.001, -50.0, 1 / 128])
    assert state_bins(state) == [128, 255, 255, 255, 0, 0, -1, -1, 129]


def test_prompt_of_pi0_ends_with_a_newline_and_ignores_the_state() -> None:
    tokenizer = StandIn(VOCABULARY)
    ids = prompt_tokens(tokenizer, "Transfer_cube\n", np.zeros(14), pi05=False)
    assert ids == [2, *tokenizer.encode("Transfer cube"), 108]
    assert len(ids) == 4


def test_prompt_of_pi05_holds_the_state() -> None:
    tokenizer = StandIn(VOCABULARY)
    ids = prompt_tokens(tokenizer, "pick_up cube", np.array([-1.0, 0.0, 1.0]), pi05=True)
    assert ids == [2, *tokenizer.encode(PUBLISHED_TEXT)]
    below = prompt_tokens(tokenizer, "pick up cube", np.array([-2.0]), pi05=True)
    assert below == [2, *tokenizer.encode("Task: pick up cube, State: -1;\nAction: ")]


def test_pad_tokens() -> None:
    tokens, mask = pad_tokens([2, 7, 8], 5)
    assert (tokens.tolist(), tokens.dtype) == ([2, 7, 8, 0, 0], np.int64)
    assert mask.tolist() == [True, True, True, False, False]
    tokens, mask = pad_tokens([2, 7, 8], 2)
    assert (tokens.tolist(), mask.tolist()) == ([2, 7], [True, True])
    tokens, mask = pad_tokens([], 0)
    assert (tokens.shape, mask.shape) == ((0,), (0,))


def test_a_sentencepiece_model_encodes(model_file: Path) -> None:
    tokenizer = SentencePiece(model_file)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    ids = prompt_tokens(tokenizer, "pick up_cube", np.zeros(3), pi05=False)
    assert (tokenizer.label, tokenizer.bos, tokenizer.vocab_size) == ("sentencepiece", 2, processor.vocab_size())
    assert ids == [2, *processor.encode("pick up cube"), processor.piece_to_id("\n")]
    assert processor.decode(tokenizer.encode("pick up cube")) == "pick up cube"


def test_load_tokenizer(model_file: Path) -> None:
    assert load_tokenizer(None, 512).label == "stand-in"
    assert load_tokenizer(model_file, 512).label == "sentencepiece"
    with pytest.raises(UserError, match=r"tiny\.model has \d+ pieces; the model's vocabulary has 10"):
        load_tokenizer(model_file, 10)


def test_bad_model_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer .*nowhere\.model is no file"):
        SentencePiece(tmp_path / "nowhere.model")
    with pytest.raises(UserError, match="is no file"):
        SentencePiece(tmp_path)
    for content in (b"this is no model", b"", b"\x00" * 100):
        file = tmp_path / "broken.model"
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer .*broken\.model is no SentencePiece model"):
            SentencePiece(file)
