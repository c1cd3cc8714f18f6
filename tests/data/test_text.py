import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.data.text import hash_ngrams, ngrams


def test_ngrams_of_words_and_ideographs():
    assert list(ngrams("Red cat!")) == ["red", "<re", "red", "ed>", "cat", "<ca", "cat", "at>"]
    assert set("笑顔") < set(ngrams("笑顔"))


def test_the_hash_never_changes():
    bag = hash_ngrams(["grinning face"], 16)[0]
    assert np.round(bag, 4).tolist() == [
        0.0,
        -0.942799985408783,
        -0.942799985408783,
        0.942799985408783,
        1.885599970817566,
        0.942799985408783,
        0.942799985408783,
        0.942799985408783,
        0.0,
        0.942799985408783,
        0.0,
        -1.885599970817566,
        0.0,
        -0.942799985408783,
        0.942799985408783,
        0.942799985408783,
    ]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=5))
def test_rows_have_one_length_or_are_empty(texts):
    bag = hash_ngrams(texts, 64)
    length = np.sqrt((bag.astype(float) ** 2).sum(axis=1))
    assert bag.dtype == np.float32
    assert np.all(np.isclose(length, 8.0, atol=1e-4) | (length == 0))


def test_texts_do_not_influence_each_other_and_case_is_folded():
    together = hash_ngrams(["Sun", "moon", ""])
    assert np.array_equal(together[0], hash_ngrams(["SUN"])[0])
    assert np.array_equal(together[1], hash_ngrams(["moon"])[0])
    assert not together[2].any()
