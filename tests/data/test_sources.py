import re

import pytest

from jaxformer.config import DataConfig
from jaxformer.data import DataError, build_tokenizers, encode_corpus, load_corpus
from jaxformer.data.pronunciation import normalise_word
from jaxformer.data.splits import hash_split

NO_SPLIT = {"dev_fraction": 0.0, "test_fraction": 0.0}


def load_pairs(*files, **options):
    return load_corpus(DataConfig(kind="pairs", files=files, **(NO_SPLIT | options)))


def load_text(*files, **options):
    return load_corpus(DataConfig(kind="text", files=files, **(NO_SPLIT | options)))


class TestHashSplit:
    def test_it_is_the_same_for_ever(self):
        splits = {word: hash_split(word, 0.3, 0.3) for word in ("the", "of", "and", "it", "be")}
        assert splits == {"the": "train", "of": "test", "and": "dev", "it": "test", "be": "test"}

    def test_shares_are_as_asked_for(self):
        splits = [hash_split(str(number), 0.05, 0.1) for number in range(20_000)]
        assert splits.count("dev") / len(splits) == pytest.approx(0.05, abs=0.005)
        assert splits.count("test") / len(splits) == pytest.approx(0.1, abs=0.005)

    def test_a_share_of_nothing_is_empty(self):
        assert {hash_split(str(number), 0.0, 0.0) for number in range(100)} == {"train"}


@pytest.fixture(scope="module")
def corpus():
    """CMUdict, whole."""
    return load_corpus(DataConfig())


class TestPronunciation:
    def test_words_are_split_90_5_5_and_stand_in_one_split(self, corpus):
        words = {split: {item.source for item in items} for split, items in corpus.splits.items()}
        total = sum(map(len, words.values()))
        assert total > 120_000
        assert len(words["dev"]) / total == pytest.approx(0.05, abs=0.003)
        assert len(words["test"]) / total == pytest.approx(0.05, abs=0.003)
        assert total == len(words["train"] | words["dev"] | words["test"])

    def test_words_are_lower_case_letters_and_apostrophes(self, corpus):
        pattern = re.compile("[a-z']+")
        assert all(
            pattern.fullmatch(item.source) for items in corpus.splits.values() for item in items
        )

    def test_there_are_39_phonemes_without_stress(self, corpus):
        phonemes = {
            phoneme
            for item in corpus.splits["train"]
            for reference in item.references
            for phoneme in reference.split()
        }
        assert len(phonemes) == 39

    def test_the_report_accounts_for_every_line_of_the_dictionary(self, corpus):
        report = corpus.report
        references = sum(numbers["references"] for numbers in report.counts.values())
        left_out = sum(skipped.count for skipped in report.skipped.values())
        assert references + left_out == 135_166
        assert any("left out: " in line and "cmudict.dict:" in line for line in report.lines())

    def test_variants_are_merged_and_equal_ones_counted_once(self, write):
        path = write(
            "small.dict",
            "read R IY1 D # comment\nread(2) R EH1 D\nread(3) R EH0 D\n3d TH R IY1\n'em AH0 M\n",
        )
        corpus = load_corpus(DataConfig(files=(path,), **NO_SPLIT))
        first, second = corpus.splits["train"]
        assert (first.source, first.references) == ("read", ("R IY D", "R EH D"))
        assert first.locations == ("small.dict:1", "small.dict:2")
        assert second.source == "'em"
        counts = {reason: skipped.count for reason, skipped in corpus.report.skipped.items()}
        assert counts == {
            "repeated pair, kept once": 1,
            "word with more than letters and apostrophes": 1,
        }

    def test_stress_is_kept_on_request(self, write):
        path = write("small.dict", "read R IY1 D\nread(2) R EH1 D\nread(3) R EH0 D\n")
        corpus = load_corpus(DataConfig(files=(path,), keep_stress=True, **NO_SPLIT))
        assert corpus.splits["train"][0].references == ("R IY1 D", "R EH1 D", "R EH0 D")

    def test_a_word_without_phonemes_is_refused(self, write):
        path = write("small.dict", "read R IY1 D\nred\n")
        with pytest.raises(DataError, match=r"small\.dict:2: word without phonemes.*Fix"):
            load_corpus(DataConfig(files=(path,), **NO_SPLIT))

    def test_typed_words_are_spelt_as_in_the_dictionary(self):
        assert normalise_word(" Don\N{RIGHT SINGLE QUOTATION MARK}t\n") == "don't"


class TestPairs:
    def test_repeated_sources_are_references_in_order(self, write):
        path = write("a.tsv", "a\tz\nb\ty\na\tx\na\tz\n")
        corpus = load_pairs(path)
        assert [(e.source, e.references) for e in corpus.splits["train"]] == [
            ("a", ("z", "x")),
            ("b", ("y",)),
        ]
        assert corpus.report.skipped["repeated pair, kept once"].count == 1
        assert corpus.report.counts["train"] == {"examples": 2, "references": 3}

    def test_line_ends_byte_order_mark_and_blank_lines_do_not_matter(self, write):
        plain = load_pairs(write("plain.tsv", "a\tb\nc\té\n"))
        windows = load_pairs(write("windows.tsv", b"\xef\xbb\xbfa\tb\r\n\r\n \nc\t\xc3\xa9"))
        assert [(e.source, e.references) for e in windows.splits["train"]] == [
            (e.source, e.references) for e in plain.splits["train"]
        ]
        assert windows.report.skipped["blank line"].count == 2

    def test_only_line_feeds_end_lines(self, write):
        corpus = load_pairs(write("a.tsv", "a\u2028b\tc\x0bd\n"))
        assert corpus.splits["train"][0].source == "a\u2028b"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"a\tb\nno tab\n", r"bad\.tsv:2: no tab in the line.*source<TAB>target"),
            (b"a\tb\tc\n", r"bad\.tsv:1: more than one tab.*source<TAB>target"),
            (b"a\tb\n\tc\n", r"bad\.tsv:2: empty source.*write the source"),
            (b"a\tb\nc\t \n", r"bad\.tsv:2: empty target.*write the target"),
            (b"a\tb\nc\t\xff\n", r"bad\.tsv:2: invalid UTF-8 \(byte 6 of the file\).*iconv"),
            (b"\xef\xbb\xbfa\tb\n\xe9\tx\n", r"bad\.tsv:2: invalid UTF-8 \(byte 7 of the file\)"),
            (b"", r"bad\.tsv: empty file"),
            (b"\xef\xbb\xbf\r\n", r"bad\.tsv: empty file"),
        ],
    )
    def test_a_bad_line_is_refused_or_skipped_and_counted(self, write, content, message):
        bad, good = write("bad.tsv", content), write("good.tsv", "x\ty\n")
        with pytest.raises(DataError, match=message) as refusal:
            load_pairs(bad, good)
        assert "Fix: " in str(refusal.value)
        assert "--data.on-bad skip" in str(refusal.value)
        corpus = load_pairs(bad, good, on_bad="skip")
        assert corpus.splits["train"][-1].source == "x"
        assert [skipped.count for skipped in corpus.report.skipped.values()] == [1]
        assert any("bad.tsv" in line for line in corpus.report.lines())

    def test_every_skip_is_counted_and_the_first_few_are_located(self, write):
        path = write("bad.tsv", "no tab\n" * 10 + "a\tb\n")
        skipped = load_pairs(path, on_bad="skip").report.skipped["no tab in the line"]
        assert skipped.count == 10
        assert [place.rsplit(":", 1)[1] for place in skipped.first] == ["1", "2", "3"]

    def test_separate_files_are_the_splits(self, write):
        files = {name: write(f"{name}.tsv", f"{name}\tx\n") for name in ("train", "dev", "test")}
        corpus = load_corpus(
            DataConfig(
                kind="pairs",
                files=(files["train"],),
                dev_files=(files["dev"],),
                test_files=(files["test"],),
            )
        )
        assert {split: items[0].source for split, items in corpus.splits.items()} == {
            "train": "train",
            "dev": "dev",
            "test": "test",
        }

    def test_a_missing_split_is_hashed_from_the_files(self, write):
        train = write("train.tsv", "".join(f"{number}\tx\n" for number in range(200)))
        dev = write("dev.tsv", "dev\tx\n")
        config = DataConfig(kind="pairs", files=(train,), dev_files=(dev,), test_fraction=0.2)
        sizes = {split: len(items) for split, items in load_corpus(config).splits.items()}
        assert sizes["dev"] == 1
        assert 20 < sizes["test"] < 60
        assert sizes["train"] + sizes["test"] == 200

    def test_a_source_on_two_sides_is_refused_or_leaves_the_train_split(self, write):
        train, dev = write("train.tsv", "a\tx\nb\tx\n"), write("dev.tsv", "b\ty\n")
        with pytest.raises(DataError, match=r"train\.tsv:2: a source is in .*dev\.tsv:1"):
            load_pairs(train, dev_files=(dev,))
        corpus = load_pairs(train, dev_files=(dev,), on_bad="skip")
        assert [example.source for example in corpus.splits["train"]] == ["a"]
        assert [example.source for example in corpus.splits["dev"]] == ["b"]
        assert sum(skipped.count for skipped in corpus.report.skipped.values()) == 1

    def test_an_empty_split_is_refused(self, write):
        path = write("a.tsv", "a\tb\n")
        with pytest.raises(DataError, match=r"the dev split is empty .*--data\.dev-files"):
            load_pairs(path, dev_fraction=0.5)

    @pytest.mark.parametrize("side", ["source", "target"])
    def test_a_long_sequence_is_refused_by_line_or_skipped(self, write, side):
        long = "l" * 10 + "\tx" if side == "source" else "l\t" + "x" * 10
        path = write("a.tsv", f"a\tb\n{long}\n")
        limit = {f"max_{side}_length": 10, "target_tokenizer": "byte"}
        corpus = load_pairs(path)
        config = DataConfig(kind="pairs", files=(path,), **NO_SPLIT, **limit)
        tokenizers = build_tokenizers(corpus, config)
        message = rf"a\.tsv:2: {side} longer than data\.max_{side}_length=10 \(11 tokens"
        with pytest.raises(DataError, match=message):
            encode_corpus(corpus, tokenizers, config)
        config = DataConfig(kind="pairs", files=(path,), on_bad="skip", **NO_SPLIT, **limit)
        data = encode_corpus(corpus, tokenizers, config)
        assert [example.source for example in data.splits["train"].examples] == ["a"]
        assert sum(skipped.count for skipped in data.report.skipped.values()) == 1
        assert not corpus.report.skipped, "encoding must not change the corpus's own report"

    def test_only_the_long_reference_is_skipped(self, write):
        path = write("a.tsv", "a\t" + "x" * 10 + "\na\ty\n")
        options = {"max_target_length": 10, "target_tokenizer": "byte", "on_bad": "skip"}
        config = DataConfig(kind="pairs", files=(path,), **NO_SPLIT, **options)
        corpus = load_corpus(config)
        data = encode_corpus(corpus, build_tokenizers(corpus, config), config)
        assert data.splits["train"].examples[0].references == ("y",)
        assert len(data.splits["train"].targets) == 1

    def test_unknown_tokens_of_the_held_out_splits_are_counted(self, write):
        train, dev = write("train.tsv", "ab\tX\n"), write("dev.tsv", "azz\tX Y\n")
        config = DataConfig(
            kind="pairs", files=(train,), dev_files=(dev,), tokenizer="character", test_fraction=0.0
        )
        corpus = load_corpus(config)
        report = encode_corpus(corpus, build_tokenizers(corpus, config), config).report
        assert report.counts["dev"]["unknown source tokens"] == 2
        assert report.counts["dev"]["unknown target tokens"] == 1


class TestFiles:
    def test_a_missing_file_is_refused_with_its_option(self, tmp_path):
        with pytest.raises(DataError, match=r"nowhere\.txt does not exist.*--data\.files"):
            load_text(str(tmp_path / "nowhere.txt"))

    def test_a_glob_without_match_is_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"no file matches .*\*\.txt"):
            load_text(str(tmp_path / "*.txt"))

    def test_a_folder_is_refused_with_a_glob_to_use(self, tmp_path):
        with pytest.raises(DataError, match=r"is a folder.*\*\*/\*\.txt"):
            load_text(str(tmp_path))

    def test_globs_are_sorted_and_a_file_is_read_once(self, write, tmp_path):
        for name in ("b/2.txt", "b/1.txt", "a.txt"):
            write(name, f"this is {name}")
        corpus = load_text(str(tmp_path / "a.txt"), str(tmp_path / "**" / "*.txt"))
        names = [document.name for document in corpus.splits["train"]]
        assert names == [str(tmp_path / name) for name in ("a.txt", "b/1.txt", "b/2.txt")]
        assert corpus.report.skipped["file named more than once, read once"].count == 1

    def test_a_file_with_glob_characters_in_its_name_is_found(self, write):
        assert load_text(write("notes[1].txt", "hello")).splits["train"][0].text == "hello"


class TestText:
    def test_line_ends_and_byte_order_mark_are_removed(self, write):
        path = write("a.txt", b"\xef\xbb\xbfone\r\ntwo\n\nthree")
        assert load_text(path).splits["train"][0].text == "one\ntwo\n\nthree"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"one\ntw\xe9\n", r"bad\.txt:2: invalid UTF-8 \(byte 6 of the file\).*iconv"),
            (b"\xef\xbb\xbf\xff", r"bad\.txt:1: invalid UTF-8 \(byte 3 of the file\)"),
            (b"", r"bad\.txt: empty file"),
            (b" \n", r"bad\.txt: empty file"),
        ],
    )
    def test_a_bad_file_is_refused_or_skipped_and_counted(self, write, content, message):
        bad, good = write("bad.txt", content), write("good.txt", "good")
        with pytest.raises(DataError, match=message):
            load_text(bad, good)
        corpus = load_text(bad, good, on_bad="skip")
        assert [document.text for document in corpus.splits["train"]] == ["good"]
        assert [skipped.count for skipped in corpus.report.skipped.values()] == [1]

    def test_tail_cuts_every_text_in_order_and_loses_nothing(self, write):
        path = write("a.txt", "0123456789" * 10)
        corpus = load_text(path, split="tail", dev_fraction=0.05, test_fraction=0.05)
        texts = [corpus.splits[split][0].text for split in ("train", "dev", "test")]
        assert [len(text) for text in texts] == [90, 5, 5]
        assert "".join(texts) == "0123456789" * 10

    def test_tail_without_test_holds_out_the_last_tenth(self, write):
        corpus = load_text(write("a.txt", "x" * 1_115_394), split="tail", dev_fraction=0.1)
        assert len(corpus.splits["train"][0].text) == 1_003_854
        assert corpus.splits["test"] == ()

    def test_the_split_of_a_text_does_not_depend_on_its_name(self, write):
        texts = [f"text number {number}" for number in range(40)]
        options = {"dev_fraction": 0.3, "test_fraction": 0.3}
        corpora = [
            load_text(*[write(f"{run}/{i}.txt", text) for i, text in order], **options)
            for run, order in (("a", list(enumerate(texts))), ("b", list(enumerate(texts[::-1]))))
        ]
        for split in ("train", "dev", "test"):
            first, second = ({d.text for d in corpus.splits[split]} for corpus in corpora)
            assert first == second

    @pytest.mark.parametrize("split", ["hash", "tail"])
    def test_a_document_on_two_sides_is_refused_or_leaves_the_train_split(self, write, split):
        files = (write("a.txt", "same text"), write("b.txt", "another text"))
        dev = (write("dev.txt", "same text"),)
        with pytest.raises(DataError, match=r"a\.txt: a document is in .*dev\.txt"):
            load_text(*files, dev_files=dev, split=split)
        corpus = load_text(*files, dev_files=dev, split=split, on_bad="skip")
        assert [document.text for document in corpus.splits["train"]] == ["another text"]

    def test_one_file_split_by_hash_is_refused_with_the_way_out(self, write):
        with pytest.raises(DataError, match=r"split is empty.*--data\.split tail"):
            load_text(write("a.txt", "text"), dev_fraction=0.1)

    def test_the_default_is_this_pythons_own_library(self):
        corpus = load_corpus(DataConfig(kind="text"))
        names = {d.name for documents in corpus.splits.values() for d in documents}
        assert {"argparse.py", "json/decoder.py"} <= names
        folders = {folder for name in names for folder in name.split("/")[:-1]}
        assert folders.isdisjoint({"site-packages", "test", "tests", "idlelib"})
        assert all(corpus.splits.values())
