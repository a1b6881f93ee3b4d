"""How many pixels, and so tokens, an image may have: in pop.load, for one image, and in errors about a full context.

The tiny Qwen3-VL of tests/support has patches of 16 pixels a side, so 32 x 32 pixels are a token.
"""

import json
import shutil

import pytest
import torch
from support.text import GOLDENS
from support.tiny import random_model, tiny_config, tiny_gemma3_vl_config, write_checkpoint, write_weights
from support.tiny_images import random_bytes
from support.tiny_qwen3_vl import FILM, IMAGE, IMAGE_MARK, VIDEO_MARK, A, B, seeing_model

import pop
from pop.checkpoints.config_json import read_config
from pop.errors import ConfigError, ContextOverflow, InputError


@pytest.fixture(scope="module")
def model():
    return seeing_model()


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with patches of 4 pixels a side, so 8 x 8 pixels are a token."""
    shutil.copy(GOLDENS.parent / "qwen3_vl" / "untied" / "config.json", tmp_path)
    write_weights(tmp_path, read_config(tmp_path), seed=7)
    return tmp_path


def tokens_of(model, image):
    pieces = model.vision.prepare("image", image).pieces
    return sum(piece.count(model.config.image_id) for piece in pieces if not isinstance(piece, str))


def test_load_reads_the_checkpoints_files_and_takes_limits(folder):
    picture = random_bytes(80, 160, 3, seed=1)  # 12,800 pixels
    assert tokens_of(pop.load(folder, progress=False), picture) >= 65536 // 64
    files = {"patch_size": 4, "merge_size": 2, "min_pixels": 640, "max_pixels": 6400}
    files |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(files))
    model = pop.load(folder, progress=False)
    assert tokens_of(model, picture) == 7 * 14  # at most 6,400 pixels in the same shape: 56 x 112
    assert tokens_of(pop.load(folder, max_pixels=1600), picture) == 3 * 7
    assert tokens_of(pop.load(folder, min_pixels=20_000, max_pixels=30_000), picture) == 13 * 25
    assert tokens_of(pop.load(folder, min_pixels=20_000), picture) == 13 * 25  # the checkpoint's limit is lower
    assert tokens_of(pop.load(folder, max_pixels=320), picture) == 1 * 3
    tokens = [5, 62, *[60] * 98, 63, 7]
    assert model.generate(tokens, images=[picture], max_new_tokens=2).prompt_tokens == len(tokens)


def test_a_wrong_file_or_limit_is_refused_before_the_weights_are_read(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="max_pixels is 'many'"):
        pop.load(folder, max_pixels="many")
    (folder / "video_preprocessor_config.json").write_text('{"patch_size": 14}')
    with pytest.raises(ConfigError, match=r"video_preprocessor_config.json: patch_size must be 4, not 14"):
        pop.load(folder)


def test_an_image_may_have_its_own_limits(model):
    """In a list, and in a message. It is prepared as by a model with these limits."""
    big = random_bytes(320, 640, 3, seed=4)  # 10 x 20 tokens
    counts = [tokens_of(model, image) for image in (big, pop.Image(big), pop.Image(big, max_pixels=80_000))]
    assert counts == [200, 200, 6 * 12]
    assert tokens_of(model, pop.Image(big, min_pixels=400_000)) == 14 * 28
    assert tokens_of(model, pop.Image(big, 10_000, 20_000)) == 3 * 6
    other = pop.inputs.processors.processor_of(model.config, {"image": (1024, 80_000)})
    found = model.vision.prepare("image", pop.Image(big, max_pixels=80_000))
    assert torch.equal(found.pixels, other.prepare("image", big).pixels)
    part = {"type": "image", "image": big, "max_pixels": 80_000}
    tokens = model.chat_tokens([{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}])
    assert tokens.count(IMAGE) == 72
    both = [pop.Image(big, max_pixels=80_000), A]
    answer = model.generate(f"{IMAGE_MARK}a{IMAGE_MARK}", images=both, max_new_tokens=1)
    assert answer.prompt_tokens == 72 + 64 + 4 + len(model.tokenizer.encode("a"))


def test_wrong_limits_are_refused_everywhere(model, folder):
    for limits, message in (
        ({"min_pixels": 0}, "min_pixels is 0"),
        ({"max_pixels": 1e6}, "max_pixels is 1000000.0"),
        ({"min_pixels": 5000, "max_pixels": 4000}, "min_pixels is 5000; .* 4000"),
    ):
        with pytest.raises(InputError, match=message):
            pop.load(folder, **limits)
        with pytest.raises(InputError, match=message):
            model.generate(IMAGE_MARK, images=[pop.Image(A, **limits)])
        with pytest.raises(InputError, match=message):
            model.generate(VIDEO_MARK, videos=[pop.Video(FILM, **limits)])


def test_families_without_limits_say_so(tmp_path):
    config = tiny_gemma3_vl_config()
    model = pop.Model(random_model(config), config, compile=False)
    with pytest.raises(InputError, match="gemma3 family .* leave out min_pixels and max_pixels"):
        model.vision.prepare("image", pop.Image(A, max_pixels=5000))
    assert tokens_of(model, pop.Image(A)) == tokens_of(model, A) == 4
    with pytest.raises(InputError, match="llama family .* leave out min_pixels and max_pixels"):
        pop.load(write_checkpoint(tmp_path), max_pixels=5000)


def test_an_image_that_overflows_the_context_says_so(model):
    """It names the tokens of the images, and what lowers their number."""
    small = pop.Model(model.module, model.config, model.tokenizer, max_seq_len=100, compile=False)
    text = IMAGE_MARK * 2
    two = {"images": [A, B]}  # 64 and 72 tokens, each between two more
    content = [{"type": "image", "image": A}, {"type": "image", "image": B}]
    tokens = model.encode(text, media=model.vision.prepare_batch([A, B], None, 1)[0])
    for call in (
        lambda: small.generate([[2], text], images=[None, [A, B]]),
        lambda: [*small.stream(text, **two)],
        lambda: small.chat([{"role": "user", "content": content}]),
        lambda: small.start_chat().send(content),
        lambda: small.prefix(text, **two),
        lambda: small.prefix("a").generate(text, **two),
        lambda: small.score(text, "a", **two),
        lambda: pop.calibrate(small, [text], model.plan, images=[[A, B]], progress=False),
        lambda: small.prefill([tokens], small.new_cache(), images=[[A, B]]),
        lambda: small.logits([tokens], images=[[A, B]]),
    ):
        with pytest.raises(ContextOverflow, match=r"1\d\d tokens.*fewer images.*max_pixels"):
            call()
    fits = {"images": [pop.Image(A, max_pixels=32_000), pop.Image(B, max_pixels=32_000)], "max_new_tokens": 1}
    assert small.generate(text, **fits).prompt_tokens < 70


def test_a_text_that_overflows_the_context_says_nothing_of_images():
    model = pop.Model(random_model(tiny_config()), tiny_config(), max_seq_len=20, compile=False)
    with pytest.raises(ContextOverflow, match="takes 20; shorten the prompt$"):
        model.generate([5] * 30)
