from tiny_mlm import tiny_mlm

from fastmat.text.words import STOP_WORDS, attackable, is_stop_word, replaced, split


def test_split_keeps_empty_words_and_counts_pieces() -> None:
    caption = split("a  dogs bcd ", tiny_mlm())
    assert caption.words == ("a", "", "dogs", "bcd", "")
    assert caption.spans == ((0, 1), (1, 1), (1, 3), (3, 6), (6, 6))
    assert len(caption.pieces) == 6
    assert split("", tiny_mlm()).words == ("",)


def test_the_published_list_and_nothing_more() -> None:
    assert len(STOP_WORDS) == 292
    assert {"the", "and", "a the", "'s"[1:], "!", "~"} - STOP_WORDS == {"~"}
    assert {"dog", "man", "#", ""}.isdisjoint(STOP_WORDS)
    assert not any(word.startswith("# ") or word != word.strip() for word in STOP_WORDS)


def test_stop_words_and_case() -> None:
    assert is_stop_word("the")
    assert is_stop_word("The")
    assert not is_stop_word("The", case_sensitive=True)
    assert not is_stop_word("dog")


def test_attackable() -> None:
    caption = split("The dog  in the Park bcd", tiny_mlm())
    assert attackable(caption, max_length=64) == (1, 5, 6)
    assert attackable(caption, max_length=64, case_sensitive=True) == (0, 1, 5, 6)
    # Pieces: the 0, dog 1, in 2, the 3, park 4, bcd 5-7; a first piece at L - 2 is the last one read.
    assert attackable(caption, max_length=7) == (1, 5, 6)
    assert attackable(caption, max_length=6) == (1, 5)
    assert attackable(caption, max_length=5) == (1,)
    assert (
        attackable(split("the in", tiny_mlm()), max_length=64) == attackable(split("", tiny_mlm()), max_length=64) == ()
    )


def test_replaced() -> None:
    assert replaced(("a", "", "dog"), 2, "big cat") == "a  big cat"
