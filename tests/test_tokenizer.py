import io

import pytest
import sentencepiece
from conftest import write_checkpoint
from tiny_models import VARIANTS

import convert
from convert.tokenizer import _sentencepiece

TEXTS = [
    "Hello world",
    "In 1969, 400,000 people; 3.14159 and 2^10 = 1024.",
    "It's   three spaces,\ttabs and\nnew lines\n\n.",
    "Größe, naïve café, 東京, привет, 🙂👍🏽",
    "def f(x):\n    return x + 1  # comment",
    "",
]


@pytest.mark.smollm2
@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_round_trip(smollm2_tokenizer, text):
    ids = smollm2_tokenizer(text)["input_ids"]
    assert smollm2_tokenizer.decode(ids) == text
    assert all(0 <= i < 49152 for i in ids)


@pytest.mark.smollm2
def test_smollm2_splits_digits_and_keeps_special_tokens_whole(smollm2_tokenizer):
    tokens = smollm2_tokenizer.convert_ids_to_tokens(smollm2_tokenizer("<|im_start|>user 2024<|im_end|>")["input_ids"])
    assert tokens == ["<|im_start|>", "user", "Ġ", "2", "0", "2", "4", "<|im_end|>"]


@pytest.mark.smollm2
def test_smollm2_chat_template(smollm2_tokenizer):
    text = smollm2_tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert smollm2_tokenizer.eos_token == "<|im_end|>"


@pytest.fixture(scope="module")
def spm() -> sentencepiece.SentencePieceProcessor:
    """A small SentencePiece model with the settings of Llama 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            [text for text in TEXTS if text] * 20 + ["the quick brown fox jumps over the lazy dog"] * 9
        ),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        character_coverage=0.98,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("text", [*TEXTS, "the lazy fox jumps over 12 dogs", "unseen: ☃ ß"])
def test_sentencepiece_tokenizers_encode_as_sentencepiece_does(spm, text):
    size = spm.get_piece_size()
    metadata = {
        "tokenizer.ggml.tokens": [spm.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [spm.get_score(i) for i in range(size)],
        "tokenizer.ggml.unknown_token_id": spm.unk_id(),
    }
    backend = _sentencepiece(metadata)
    ids = backend.encode(text).ids
    assert ids == spm.encode(text)
    assert backend.decode(ids) == text


def test_folders_without_a_tokenizer_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path, VARIANTS["llama3"])
    with pytest.raises(FileNotFoundError, match="has no tokenizer .none of tokenizer.json"):
        convert.load_tokenizer(folder)


@pytest.mark.smollm2
def test_tokenizers_are_saved_and_loaded_beside_the_weights(tmp_path, tiny, smollm2_tokenizer):
    convert.save(tmp_path / "out", *tiny, tokenizer=smollm2_tokenizer)
    again = convert.load_tokenizer(tmp_path / "out")
    for text in TEXTS:
        assert again(text)["input_ids"] == smollm2_tokenizer(text)["input_ids"]
    assert again.chat_template == smollm2_tokenizer.chat_template
