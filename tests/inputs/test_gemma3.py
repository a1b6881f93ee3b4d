"""Gemma-3's images: pixels against the reference's image processor, and how a prompt contains them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.text import train
from support.tiny import random_model, tiny_gemma3_vl_config
from support.tiny_images import IMAGES, image, levels, random_bytes

import pop
from pop.errors import InputError
from pop.inputs import gemma3
from pop.inputs.chat_templates import TEMPLATES
from pop.inputs.gemma3 import gemma_pixels
from pop.inputs.processors import Prepared, processor_of
from pop.inputs.sentence_piece import from_tokenizer_model
from pop.models.config import SiglipConfig

GOLDENS = Path(__file__).parents[1] / "goldens" / "vision"
PIXELS = dict(np.load(GOLDENS / "images.npz"))
IMAGE, BOI, EOI = 500, 501, 502
ONE = [BOI, *[IMAGE] * 4, EOI]  # an image in a prompt
A, B = random_bytes(30, 50, 3, seed=1), random_bytes(61, 20, 3, seed=2)


@pytest.mark.parametrize("name", IMAGES)
def test_prepared_as_the_reference_does(name):
    expected = torch.from_numpy(PIXELS[name].astype(np.float32))
    assert torch.equal(gemma_pixels(image(name), 28), (expected - 127.5) / 127.5)


@pytest.mark.parametrize("name", ["wide", "tiny"])
def test_prepared_in_real_size(name):
    pixels = levels(gemma_pixels(image(name), 896))
    assert pixels.shape == (1, 3, 896, 896)
    where = np.random.RandomState(0).choice(pixels.size, len(PIXELS[f"{name}-real-samples"]), replace=False)
    assert np.array_equal(pixels.ravel()[where], PIXELS[f"{name}-real-samples"])
    assert np.array_equal(pixels.sum((0, 2, 3), dtype=np.int64), PIXELS[f"{name}-real-sums"])


@pytest.fixture(scope="module")
def model():
    config = tiny_gemma3_vl_config(vocab_size=503, image_id=IMAGE, boi_id=BOI, eoi_id=EOI)
    tokenizer = from_tokenizer_model(train())
    tokenizer.chat_template = TEMPLATES["gemma"]
    return pop.Model(random_model(config), config, tokenizer, plan=0.5, compile=False, chunk_size=5)


def test_a_text_says_where_its_images_are(model):
    """As in the reference: two line breaks around each image, encoded as one text with the words next to them."""
    encode = model.tokenizer.encode
    text = "Look: <start_of_image> and <start_of_image>"
    expected = encode("Look: \n\n") + ONE + encode("\n\n and \n\n", bos=False) + ONE + encode("\n\n", bos=False)
    assert model.encode(text, media=model.vision.prepare_batch([A, B], None, 1)[0]) == expected
    seen = model.vision.prepare_batch([A], None, 1)[0]
    assert model.encode("<start_of_image>a", media=seen) == encode("\n\n") + ONE + encode("\n\na", bos=False)
    assert model.encode("<start_of_image>") == encode("<start_of_image>")  # ordinary text without an image


def test_a_text_with_images_is_laid_out_as_by_the_reference():
    golden = json.loads((GOLDENS / "layouts.json").read_text())
    pictures = [random_bytes(height, width, 3, seed=0) for width, height in golden["sizes"]]
    config = tiny_gemma3_vl_config(vision=SiglipConfig(24, 36, 2, 3, 28, 7, tokens_per_image=4))
    vision = processor_of(config)
    names = {config.boi_id: "<start_of_image>", config.image_id: "<image_soft_token>", config.eoi_id: "<end_of_image>"}
    pieces = vision.replace_marks(golden["text"], vision.prepare_batch(pictures, None, 1)[0], vision.marks, "prompt")
    text = "".join(piece if isinstance(piece, str) else "".join(names[token] for token in piece) for piece in pieces)
    assert text.replace("<image_soft_token>" * 4, "<image_soft_token>" * 2) == golden["whole"]


def test_a_conversation_has_images_among_its_text(model):
    text = {"type": "text", "text": " What is "}
    content = [text, {"type": "image", "image": A}, {"type": "text", "text": "th"}, {"type": "text", "text": "is? "}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "image", "image": B}]},
    ]
    special, encode = model.tokenizer.special_tokens, lambda text: model.tokenizer.encode(text, bos=False)
    start, end = special["<start_of_turn>"], special["<end_of_turn>"]
    expected = [2, start, *encode("user\nBe brief.\n\nWhat is\n\n"), *ONE, *encode("\n\nthis?"), end, *encode("\n")]
    expected += [start, *encode("model\nA cat."), end, *encode("\n")]
    expected += [start, *encode("user\n\n\n"), *ONE, *encode("\n\n"), end, *encode("\n"), start, *encode("model\n")]
    assert model.chat_tokens(messages) == expected


def test_many_images_go_through_the_tower_in_pieces(model, monkeypatch):
    tokens = [[2, *ONE * 5, 4]]
    expected = model.logits(tokens, images=[A, B, A, B, A])
    monkeypatch.setattr(gemma3, "IMAGES_AT_ONCE", 2)
    torch.testing.assert_close(model.logits(tokens, images=[A, B, A, B, A]), expected, rtol=0, atol=1e-5)


def test_a_chunk_and_a_cache_hold_an_image(model):
    assert pop.Model(model.module, model.config, compile=False, chunk_size=1).chunk_size == 4
    tokens, images = [[2, 3, *ONE, 4]], [[A]]
    small = pop.engine.cache.KVCache(model.config, 1, 20, dtype=torch.float32, device=torch.device("cpu"), chunk_size=3)
    with pytest.raises(InputError, match="takes 3 tokens at once, .* 4"):
        model.prefill(tokens, small, images=images)


FILM = Prepared("video", torch.zeros(1, 3, 28, 28), ([2],))  # by another model
REFUSED = [
    (
        lambda m: m.logits([[2, *[IMAGE] * 3, 9, IMAGE]], images=[A]),
        r"row 0 .*\[3, 1\] tokens 500, .* 1 images .*\[4\]",
    ),
    (lambda m: m.generate([2], videos=[A]), "gemma3 model takes text and images only"),
    (lambda m: m.generate([2], images=[FILM]), "takes text and images only; leave out the videos"),
]


def test_images_that_do_not_fit_the_prompt(model):
    for call, message in REFUSED:
        with pytest.raises(InputError, match=message):
            call(model)
