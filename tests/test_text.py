"""Vocabularies, the authors' batches, windows, texts, and WikiText-103."""

import json

import numpy as np
import pytest

from experiments.language import comparison as language_comparison
from experiments.language import text, wikitext
from experiments.language.text import Segments, Vocabulary
from experiments.translation import pairs as parallel_text

LINES = " the cat\n\n the dog and the <unk> cat \nend"  # the last line has no line break


def test_words_are_numbered_as_the_authors_do():
    """<eos> for each line, also for empty ones, then by frequency, equals in the order of their first occurrence."""
    vocabulary = Vocabulary.words(LINES)
    assert vocabulary.pieces == ("<eos>", "the", "cat", "dog", "and", "<unk>", "end")
    assert vocabulary.encode(LINES).tolist() == [1, 2, 0, 0, 1, 3, 4, 1, 5, 2, 0, 6, 0]
    assert vocabulary.encode(LINES).dtype == np.int32
    assert vocabulary.decode(vocabulary.encode(LINES)) == "the cat\n\nthe dog and the <unk> cat\nend\n"
    assert text.count_words(LINES) == len(vocabulary.encode(LINES))


def test_words_that_are_rare_or_unheard_of():
    assert Vocabulary.words(LINES, min_count=2).pieces == ("<eos>", "<unk>", "the", "cat")
    assert Vocabulary.words(LINES, max_size=1).pieces == ("<eos>", "<unk>", "the")
    assert Vocabulary.words(LINES, min_count=2).encode("a cat").tolist() == [1, 3, 0]
    assert Vocabulary.words("a b").encode("b a").tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match=r"the word 'c' is not in the vocabulary, which has no '<unk>'; make it with"):
        Vocabulary.words("a b").encode("a c")


def test_characters():
    vocabulary = Vocabulary.characters("abba\n")
    assert vocabulary.pieces == ("<unk>", "\n", "a", "b")
    assert vocabulary.encode("ab\nc").tolist() == [2, 3, 1, 0]
    assert vocabulary.decode([2, 3, 1, 0]) == "ab\n\ufffd"
    assert vocabulary.missing("a cab") == [" ", "c"] and Vocabulary.words("a b").missing("b c d") == ["c", "d"]


def test_sentencepiece_learns_from_long_lines_too():
    line = " ".join(["memory", "weights", "of", "linear", "transformers"] * 400)
    assert len(text.Vocabulary.sentencepiece(f"{line}\nx\n", 300).encode(line)) < len(line) / 3


def test_sentencepiece_cuts_lines_that_are_too_long_at_spaces(monkeypatch):
    monkeypatch.setattr(text, "LONGEST_LINE", 10)
    assert [*text._short_lines("a fat cat sat on themountains ")] == ["a fat cat", "sat on", "themountai", "ns "]
    words = "the children sat on a mat " * 60
    assert Vocabulary.sentencepiece(words, 290).pieces == Vocabulary.sentencepiece(words.replace(" ", "\n"), 290).pieces


def test_sentencepiece_encodes_every_text():
    corpus = text.demo_text()[:50_000]
    vocabulary = Vocabulary.sentencepiece(corpus, 500)
    assert len(vocabulary) == 500
    for sample in (corpus[:999], "naïve ∑ 語\n\n  two  spaces\n"):
        assert vocabulary.decode(vocabulary.encode(sample)).rstrip("\n") == sample.rstrip("\n")
    with pytest.raises(
        ValueError, match=r"no 9000 pieces \(--vocabulary-size\) can be made of this text; take another number"
    ):
        Vocabulary.sentencepiece("just these words", 9000)


@pytest.mark.parametrize("kind", ["words", "characters", "sentencepiece"])
def test_a_vocabulary_is_saved_and_told_from_another(kind, tmp_path):
    corpus = text.demo_text()[:20_000]
    sizes = (400,) if kind == "sentencepiece" else ()
    vocabulary = getattr(Vocabulary, kind)(corpus, *sizes)
    vocabulary.save(tmp_path / "vocabulary.json")
    loaded = Vocabulary.load(tmp_path / "vocabulary.json")
    assert loaded == vocabulary and loaded.digest() == vocabulary.digest()
    np.testing.assert_array_equal(loaded.encode(corpus), vocabulary.encode(corpus))
    assert getattr(Vocabulary, kind)(corpus + " zebra~zebra", *sizes).digest() != vocabulary.digest()


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", '{"kind": "word"}', "[1]", '{"kind": "word", "pieces": "abc", "model": ""}'),
        *(json.dumps({"kind": kind, "pieces": [1], "model": ""}) for kind in ("word", "other")),
        *(json.dumps({"kind": "sentencepiece", "pieces": ["a"], "model": model}) for model in ("a", "QUJD")),
    ],
)
def test_a_file_that_is_no_vocabulary(content, tmp_path):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(ValueError, match=r"v.json is not a vocabulary"):
        Vocabulary.load(tmp_path / "v.json")


@pytest.mark.parametrize("kind", ["words", "characters"])
def test_an_empty_text_has_no_vocabulary(kind):
    with pytest.raises(ValueError, match="the text is empty"):
        getattr(Vocabulary, kind)(" \n\n")


# --- batches ---------------------------------------------------------------------------------------------------------


def test_segments_are_contiguous_rows_shifted_by_one():
    segments = Segments(np.arange(23), 2, 4)  # rows 0..10 and 11..21, 22 is left out
    batches = [next(segments) for _ in range(4)]
    assert len(segments) == 3
    assert [batch["tokens"].shape for batch in batches] == [(2, 4), (2, 4), (2, 2), (2, 4)]
    assert [bool(batch["start"]) for batch in batches] == [True, False, False, True]
    np.testing.assert_array_equal(batches[1]["tokens"], [[4, 5, 6, 7], [15, 16, 17, 18]])
    for batch in batches:
        np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)
    np.testing.assert_array_equal(np.hstack([b["tokens"] for b in batches[:3]]), [np.arange(10), np.arange(11, 21)])


def test_segments_go_on_where_they_were():
    one, other = (Segments(np.arange(23), 2, 4) for _ in range(2))
    for _ in range(5):
        next(one)
    other.set_state(json.loads(json.dumps(one.get_state())))
    for _ in range(4):
        np.testing.assert_equal(next(one), next(other))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((3, 2, 4), "needs at least 4 tokens, got 3"), ((9, 0, 4), "must be at least 1, got 0 and 4")],
)
def test_segments_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=words):
        Segments(np.arange(arguments[0]), *arguments[1:])


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_windows_score_every_token_but_the_first_once(batch_size):
    tokens = np.arange(20)
    (first, targets), rest, number = text.windows(tokens, 6, batch_size)
    np.testing.assert_array_equal(first, [np.arange(6)])
    scored, count = [*targets[0]], 0
    for batch in rest:
        count += 1
        assert batch["tokens"].shape == (batch_size, 6)
        np.testing.assert_array_equal(batch["tokens"][:, -1] + 1, batch["targets"])
        scored += [t for t, weight in zip(batch["targets"], batch["weights"], strict=True) if weight]
    assert scored == [*range(1, 20)] and count == number
    assert text.windows(tokens, 50, 4)[0][0].shape == (1, 19)
    with pytest.raises(ValueError, match="takes at least two, got 1"):
        text.windows(tokens[:1], 6, 1)


# --- texts -----------------------------------------------------------------------------------------------------------


def test_files_and_folders_are_read_in_order(tmp_path):
    for name, content in (("b.txt", "second"), ("a.txt", "first\n"), ("c.md", "not this")):
        (tmp_path / name).write_text(content)
    assert text.read_files([tmp_path]) == "first\nsecond\n"
    assert text.read_files([tmp_path / "c.md", tmp_path / "a.txt"]) == "not this\nfirst\n"


def test_lines_end_where_they_do_in_pairs_of_sentences(tmp_path):
    """A byte order mark is none of the text, "\\r\\n" is one line end and a lone "\\r" is none, for both readers."""
    (tmp_path / "a.txt").write_bytes("\ufeffThe\rcat\r\nsat\u2028on\n\ufeffno mark".encode())
    content = text.read_files([tmp_path])
    assert content == "The\rcat\nsat\u2028on\n\ufeffno mark\n"
    assert content.removesuffix("\n").split("\n") == parallel_text._lines(tmp_path / "a.txt")
    assert Vocabulary.words(content).pieces == ("<eos>", "The", "cat", "sat", "on", "\ufeffno", "mark")
    assert len(Vocabulary.words(content).encode(content)) == text.count_words(content) == 6 + 3
    assert language_comparison.separate("a.\rb\n\nc\u2028d\n") == "a . b\n\nc d\n"


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "mixed").mkdir()
    for name in ("a", "b"):
        (tmp_path / "mixed" / f"{name}.txt").write_bytes(b"\xff")
    for path, words in (
        ("mixed", "a.txt is not UTF-8: .*; .*b.txt is not UTF-8"),
        ("nothing.txt", "nothing.txt is not there"),
        ("empty.txt", "the text is empty"),
        ("latin", "latin is not UTF-8: .*; convert it first"),
        ("folder", "folder has no .txt files"),
    ):
        with pytest.raises(ValueError, match=words):
            text.read_files([tmp_path / path])


def test_a_text_is_split_at_lines():
    whole = "".join(f"line {i}\n" for i in range(1000))
    parts = text.split(whole)
    assert "".join(parts.values()) == whole
    assert [len(part) / len(whole) for part in parts.values()] == pytest.approx([0.9, 0.05, 0.05], abs=0.01)
    assert all(part.endswith("\n") for part in parts.values())
    with pytest.raises(ValueError, match="a text of 3 characters is too short for training, validation and test"):
        text.split("ab\n")


@pytest.mark.parametrize("separator", [" ", "x"])
@pytest.mark.parametrize("lines", ["", "short\n" * 500])
def test_a_text_with_a_line_that_is_too_long_is_split_in_it(separator, lines):
    """After a space, or between any two characters of a word."""
    whole = f"{lines}{separator.join(['word'] * 20_000)}\n"
    parts = text.split(whole)
    assert "".join(parts.values()) == whole
    assert [len(part) / len(whole) for part in parts.values()] == pytest.approx([0.9, 0.05, 0.05], abs=0.001)
    assert separator == "x" or (parts["train"].endswith("word ") and parts["validation"].endswith("word "))


def test_the_text_that_ships_is_plain_and_large_enough():
    demo = text.demo_text()
    assert demo.isascii() and 1e6 < len(demo) < 1.3e6
    assert "gutenberg" not in demo.lower() and "copyright" not in demo.lower()
    assert set(text.split(demo)["test"]) <= set(text.split(demo)["train"])


# --- WikiText-103 ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(wikitext.FILES.values()):
        (tmp_path / name).write_text(" \n = First = \n \n A <unk> b — c .\n" * (i + 1), encoding="utf-8", newline="")
    return tmp_path


def test_wikitext_comes_back_as_its_files_have_it_and_nothing_is_written(folder):
    before = sorted(folder.iterdir())
    (folder / "wiki.test.tokens").write_bytes(b"\xef\xbb\xbfThe\r\ncat\rsat\n")
    texts = wikitext.load(folder)
    assert texts["train"] == (folder / "wiki.train.tokens").read_text(encoding="utf-8")
    assert texts["validation"] == 2 * texts["train"] and texts["test"] == "The\ncat\rsat\n"
    assert sorted(folder.iterdir()) == before


def test_wikitext_that_is_not_there_says_what_to_put_where(folder):
    (folder / "wiki.valid.tokens").unlink()
    with pytest.raises(ValueError, match=r"WikiText-103 is not in .*: put wiki.valid.tokens of wikitext-103-v1 .*"):
        wikitext.load(folder)
    with pytest.raises(ValueError, match=r"name the folder of wiki.train.tokens, .* with --wikitext"):
        wikitext.load(None)
