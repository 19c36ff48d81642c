import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformer.config import DataConfig
from jaxformer.data import (
    DataError,
    Document,
    Example,
    PairCorpus,
    Report,
    TextCorpus,
    Tokenizers,
    build_tokenizers,
    load_tokenizer,
)
from jaxformer.data.tokenizers import (
    EOS,
    PAD,
    SOS,
    SPECIALS,
    UNK,
    BPETokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    WordTokenizer,
    train_tokenizer,
)

TEXTS = ["the cat sat on the mat", "a naïve café\n\tthe end <eos>", "the cat's 🐈 ran\r\n"]
KINDS = ["byte", "character", "word", "bpe"]
BPE = BPETokenizer.train(TEXTS, 280)
TEXT = st.text(st.characters(exclude_categories=("Cs",)))


@given(TEXT)
def test_bytes_come_back_exactly(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(len(SPECIALS) <= token < len(tokenizer) for token in ids)


@given(TEXT)
def test_bpe_comes_back_exactly_on_text_it_was_not_trained_on(text):
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert all(len(SPECIALS) <= token < len(BPE) for token in ids)


@given(st.text("".join(TEXTS)))
def test_characters_come_back_exactly_on_the_alphabet(text):
    tokenizer = CharacterTokenizer.train(TEXTS)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.sampled_from(["the", "cat", "sat", "on"])))
def test_words_come_back_with_single_spaces(words):
    tokenizer = WordTokenizer.train(TEXTS)
    assert tokenizer.decode(tokenizer.encode("  ".join(words))) == " ".join(words)


def test_bpe_does_merge_up_to_the_size_asked_for():
    assert len(BPE) == 280
    assert len(BPE.encode("the cat")) < len("the cat")


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_spells_a_special_token_is_only_text(kind):
    tokenizer = train_tokenizer(kind, [" ".join(SPECIALS)], 300)
    ids = tokenizer.encode(" ".join(SPECIALS))
    assert min(ids) > UNK
    assert tokenizer.decode(ids) == " ".join(SPECIALS)


@pytest.mark.parametrize("kind", KINDS)
def test_specials_have_the_same_ids_everywhere_and_leave_no_trace_in_text(kind):
    tokenizer = train_tokenizer(kind, TEXTS, 280)
    assert (PAD, SOS, EOS, UNK) == (0, 1, 2, 3)
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode([SOS, *ids, EOS, PAD, PAD]) == "the cat"
    assert tokenizer.decode(np.array([SOS, *ids, EOS], np.int32)) == "the cat"


@pytest.mark.parametrize(
    ("kind", "shown"), [("byte", "�"), ("character", "�"), ("word", "<unk>"), ("bpe", "�")]
)
def test_an_unknown_is_shown(kind, shown):
    assert train_tokenizer(kind, TEXTS, 280).decode([UNK]) == shown


def test_unseen_characters_and_words_are_unknown():
    assert CharacterTokenizer("ab").encode("abz\U0010ffff\x00") == [4, 5, UNK, UNK, UNK]
    assert WordTokenizer(["b", "a"]).encode("a x b") == [4, UNK, 5]
    assert CharacterTokenizer("").encode("ab") == [UNK, UNK]


@pytest.mark.parametrize("kind", KINDS)
def test_empty_text_has_no_tokens(kind):
    tokenizer = train_tokenizer(kind, TEXTS, 280)
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_give_the_same_tokenizer(kind, tmp_path):
    tokenizer = train_tokenizer(kind, TEXTS, 280)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded == tokenizer
    assert len(loaded) == len(tokenizer)
    assert loaded.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert loaded.decode(loaded.encode(TEXTS[1])) == tokenizer.decode(tokenizer.encode(TEXTS[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_one_text_and_many_are_encoded_alike(kind):
    tokenizer = train_tokenizer(kind, TEXTS, 280)
    together = tokenizer.encode_all(TEXTS)
    assert [ids.tolist() for ids in together] == [tokenizer.encode(text) for text in TEXTS]
    assert all(ids.dtype == np.int32 for ids in together)


def test_training_does_not_depend_on_order_or_process(tmp_path):
    for kind in ("character", "word"):
        assert train_tokenizer(kind, TEXTS, 0) == train_tokenizer(kind, TEXTS[::-1], 0)
    program = (
        "import sys; from jaxformer.data.tokenizers import BPETokenizer; "
        f"BPETokenizer.train({TEXTS!r} * 3, 300).save(sys.argv[1])"
    )
    for name in "ab":
        subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_bpe_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(DataError, match="at least 260"):
        BPETokenizer.train(TEXTS, 259)


@pytest.mark.parametrize(
    "content", ["", "{}", '{"kind": "character"}', '{"kind": "bpe", "model": {}}', '{"kind": "x"}']
)
def test_a_file_that_is_no_tokenizer_is_refused_by_name(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(path)


def test_a_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="run folder"):
        load_tokenizer(tmp_path / "target.json")


def pair_corpus():
    train = (Example("ab", ("X Y", "Z")), Example("c", ("X",)))
    return PairCorpus({"train": train, "dev": (Example("q", ("W",)),), "test": ()}, Report())


def test_tokenizers_see_the_train_split_alone():
    config = DataConfig(kind="pairs", files=("-",), tokenizer="character")
    tokenizers = build_tokenizers(pair_corpus(), config)
    assert tokenizers.source.alphabet == ["a", "b", "c"]
    assert tokenizers.target.words == ["X", "Y", "Z"]


def test_pronunciation_is_characters_to_words_whatever_the_options():
    tokenizers = build_tokenizers(pair_corpus(), DataConfig())
    assert (tokenizers.source.kind, tokenizers.target.kind) == ("character", "word")


def test_a_shared_vocabulary_covers_both_sides():
    config = DataConfig(
        kind="pairs", tokenizer="word", target_tokenizer="word", shared_vocabulary=True
    )
    tokenizers = build_tokenizers(pair_corpus(), config)
    assert tokenizers.source is tokenizers.target
    assert tokenizers.target.words == ["X", "Y", "Z", "ab", "c"]


def test_a_shared_vocabulary_of_two_kinds_is_refused():
    with pytest.raises(DataError, match=r"data\.target_tokenizer equal"):
        build_tokenizers(pair_corpus(), DataConfig(kind="pairs", shared_vocabulary=True))


def test_text_has_one_tokenizer():
    splits = {"train": (Document("a", "hello"),), "dev": (), "test": ()}
    config = DataConfig(kind="text", tokenizer="character")
    tokenizers = build_tokenizers(TextCorpus(splits, Report()), config)
    assert tokenizers.source is None
    assert tokenizers.target.alphabet == ["e", "h", "l", "o"]


@pytest.mark.parametrize("source", [None, CharacterTokenizer("ab")])
def test_the_tokenizers_of_a_run_are_saved_and_loaded_together(source, tmp_path):
    tokenizers = Tokenizers(source, BPE)
    tokenizers.save(tmp_path / "run" / "tokenizers")
    assert Tokenizers.load(tmp_path / "run" / "tokenizers") == tokenizers


def test_saved_files_are_plain_json_and_hold_no_path(tmp_path):
    BPE.save(tmp_path / "target.json")
    content = (tmp_path / "target.json").read_text(encoding="utf-8")
    assert json.loads(content)["kind"] == "bpe"
    assert str(tmp_path) not in content
