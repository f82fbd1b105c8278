from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from palimpsest.errors import PalimpsestError
from palimpsest.models.encoder import DEFAULT, sentence_encoder

TEXTS = ["Where was she born?", "What is her place of birth?", "The price of cheese has gone up."]


def test_alike_texts_have_alike_vectors_of_length_one():
    vectors = sentence_encoder().encode(TEXTS)
    assert vectors.shape == (3, sentence_encoder().width) == (3, 384)
    assert vectors.dtype == torch.float32
    assert_close(vectors.norm(dim=1), torch.ones(3))
    alike = vectors @ vectors.T
    assert alike[0, 1] > 0.7 > 0.3 > alike[0, 2]


def test_a_text_has_the_same_vector_alone_and_among_others():
    encoder = sentence_encoder()
    together = encoder.encode([*TEXTS, "a " * 100])
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    assert_close(together[:3], alone, rtol=1e-4, atol=1e-5)
    assert encoder.encode([]).shape == (0, 384)


def test_lengths_are_tokens_without_marks_and_without_a_limit():
    assert sentence_encoder().lengths(["hello", "a " * 600, ""]) == [1, 600, 0]


def test_it_is_loaded_once_and_trains_nothing():
    assert sentence_encoder() is sentence_encoder(DEFAULT)
    assert not sentence_encoder().encode(TEXTS).requires_grad


def test_common_words_have_low_ranks():
    ranks = sentence_encoder().word_ranks
    assert ranks["the"] == 1
    assert ranks["city"] < 500 < 5000 < ranks["botanist"]
    assert "##s" not in ranks


def test_an_encoder_from_a_folder_is_the_same(tmp_path):
    sentence_encoder()._network.save_pretrained(str(tmp_path / "encoder"))
    assert_close(sentence_encoder(tmp_path / "encoder").encode(TEXTS), sentence_encoder().encode(TEXTS))


def test_a_folder_without_an_encoder_is_named(tmp_path):
    with pytest.raises(PalimpsestError, match="holds no sentence encoder"):
        sentence_encoder(tmp_path)
    with pytest.raises(PalimpsestError, match="does not exist"):
        sentence_encoder("./nowhere")
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(PalimpsestError, match="cannot be loaded"):
        sentence_encoder(tmp_path)
