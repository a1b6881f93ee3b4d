"""Images through pop.Model: where they go in a prompt, what is refused, and under which names the weights load."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.text import train
from support.tiny import random_model, tiny_gemma3_config, tiny_gemma3_vl_config, write_weights
from support.tiny_images import both_ways, random_bytes

import pop
from pop.errors import CheckpointError, InputError, UnsupportedError
from pop.inputs.images import gemma_pixels
from pop.inputs.processors import processor_of
from pop.inputs.tokenizers import SentencePieceTokenizer
from pop.models.config import SiglipConfig

IMAGE, BOI, EOI = 500, 501, 502
ONE = [BOI, *[IMAGE] * 4, EOI]  # an image in a prompt
A, B = random_bytes(30, 50, 3, seed=1), random_bytes(61, 20, 3, seed=2)


@pytest.fixture(scope="module")
def model():
    config = tiny_gemma3_vl_config(vocab_size=503, image_id=IMAGE, boi_id=BOI, eoi_id=EOI)
    tokenizer = SentencePieceTokenizer(train())
    return pop.Model(random_model(config), config, tokenizer, plan=0.5, compile=False, chunk_size=5)


def test_an_image_takes_the_place_of_its_tokens(model):
    """The numbers, from the parts: preparation, tower, embeddings."""
    tokens = [2, 7, *ONE, 8, 9, *ONE, 3]
    pixels = torch.cat([gemma_pixels(image, 28) for image in (A, B)])
    numbers = torch.tensor([[-1, -1, -1, 0, 1, 2, 3, -1, -1, -1, -1, 4, 5, 6, 7, -1, -1]])
    expected = model.module(torch.tensor([tokens]), both_ways(model.module.image_features(pixels), numbers))
    assert torch.equal(model.logits([tokens], images=[[A, B]]), expected)
    assert torch.equal(model.logits([tokens], images=[A, B]), expected)  # one row needs no list of lists
    assert not torch.allclose(model.logits([tokens], images=[B, A]), expected, atol=0.1)


def test_images_do_not_see_each_other(model):
    """Another second image changes nothing before it, be the first one next to it; another pixel of the first does."""
    tokens = [[2, 7, *ONE, *ONE, 3]]
    begin = 2 + len(ONE) + 1  # of the second one's image tokens
    one, other = model.logits(tokens, images=[A, B]), model.logits(tokens, images=[A, A])
    assert torch.equal(one[:, :begin], other[:, :begin])
    assert not torch.allclose(one[:, begin:], other[:, begin:], atol=1e-3)
    turned = model.logits(tokens, images=[np.rot90(A, 2), B])
    assert torch.equal(one[:, :3], turned[:, :3])
    assert not torch.allclose(one[:, 3], turned[:, 3], atol=1e-3)  # its first token sees its last one


def test_a_text_says_where_its_images_are(model):
    """As Gemma's processor: two line breaks around each, one run of text with what is there."""
    encode = model.tokenizer.encode
    text = "Look: <start_of_image> and <start_of_image>"
    expected = encode("Look: \n\n") + ONE + encode("\n\n and \n\n", bos=False) + ONE + encode("\n\n", bos=False)
    assert model.encode(text, seen=model.vision.prepare_batch([A, B], None, 1)[0]) == expected
    options = {"images": [A, B], "max_new_tokens": 6}
    answer = model.generate(text, **options)
    assert answer.tokens == model.generate(expected, **options).tokens
    assert answer.prompt_tokens == len(expected)
    assert "".join(model.stream(text, **options)) == answer.text
    seen = model.vision.prepare_batch([A], None, 1)[0]
    assert model.encode("<start_of_image>a", seen=seen) == encode("\n\n") + ONE + encode("\n\na", bos=False)
    assert model.encode("<start_of_image>") == encode("<start_of_image>")  # text, where there is no image


@pytest.mark.parametrize("way", ["whole", "pan_and_scan"])
def test_a_text_with_images_is_laid_out_as_by_the_reference(way):
    golden = json.loads((Path(__file__).parents[1] / "goldens" / "vision" / "layouts.json").read_text())
    options = {name: golden["options"][name] for name in ("min_crop_size", "max_num_crops", "min_ratio_to_activate")}
    pictures = [random_bytes(height, width, 3, seed=0) for width, height in golden["sizes"]]
    if way == "pan_and_scan":
        pictures = [pop.PanAndScan(picture, *options.values()) for picture in pictures]
    config = tiny_gemma3_vl_config(vision=SiglipConfig(24, 36, 2, 3, 28, 7, tokens_per_image=4))
    vision = processor_of(config)
    names = {config.boi_id: "<start_of_image>", config.image_id: "<image_soft_token>", config.eoi_id: "<end_of_image>"}
    pieces = vision.replace_marks(golden["text"], vision.prepare_batch(pictures, None, 1)[0], "prompt")
    text = "".join(piece if isinstance(piece, str) else "".join(names[token] for token in piece) for piece in pieces)
    assert text.replace("<image_soft_token>" * 4, "<image_soft_token>" * 2) == golden[way]


def test_pan_and_scan_goes_wherever_an_image_does(model):
    """The whole and its crops are images like others: in texts, token ids, batches and conversations."""
    wide = pop.PanAndScan(random_bytes(20, 60, 3, seed=3), min_crop_size=8)  # three crops
    text, encode = "Look: <start_of_image>!", lambda text: model.tokenizer.encode(text, bos=False)
    expected = [2, *encode("Look: Here is the original image \n\n"), *ONE]
    expected += encode("\n\n and here are some crops to help you see better \n\n")
    expected += [*ONE, *encode("\n\n \n\n"), *ONE, *encode("\n\n \n\n"), *ONE, *encode("\n\n!")]
    crops = [np.ascontiguousarray(wide.image[:, begin : begin + 20]) for begin in (0, 20, 40)]
    answer = model.generate(expected, images=[wide.image, *crops], max_new_tokens=5)
    assert model.generate(text, images=[wide], max_new_tokens=5).tokens == answer.tokens
    assert answer.prompt_tokens == len(expected)
    found = model.prefill([expected], model.new_cache(), images=[[wide]])
    assert torch.equal(found, model.prefill([expected], model.new_cache(), images=[[wide.image, *crops]]))
    batch = model.generate([[2, 9], text, "<start_of_image>"], images=[None, [wide], [A]], max_new_tokens=5)
    assert batch[1].tokens == answer.tokens
    content = [{"type": "image", "image": wide}, {"type": "text", "text": "What?"}]
    tokens = model.chat_tokens([{"role": "user", "content": content}])
    assert sum(token == IMAGE for token in tokens) == 4 * 4
    assert model.chat([{"role": "user", "content": content}], max_new_tokens=3).prompt_tokens == len(tokens)
    with pytest.raises(InputError, match="row 0 has 4 images, crops counted, but 4 tokens 500 for images"):
        model.generate([2, *ONE], images=[wide])
    square = pop.PanAndScan(A, min_ratio=2)
    assert torch.equal(model.logits([[2, *ONE]], images=[square]), model.logits([[2, *ONE]], images=[A]))


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
    answer = model.chat(messages, max_new_tokens=5)
    assert answer.tokens == model.generate(expected, images=[A, B], max_new_tokens=5).tokens


def test_a_conversation_goes_on_behind_images(model, tmp_path):
    """Turn by turn what one prompt of them all would be; kept by the images' paths."""
    Image.fromarray(A).save(tmp_path / "a.png")
    chat = model.start_chat("Be brief.", plan=pop.PrunePlan.none())
    chat.send("What?", images=[tmp_path / "a.png"], max_new_tokens=3)
    wide = pop.PanAndScan(B, min_crop_size=8)
    answer = chat.send([{"type": "text", "text": "And"}, {"type": "image", "image": wide}], max_new_tokens=4)
    prompt = chat.tokens[: -len(answer.tokens)]
    again = model.generate(prompt, images=[A, wide], max_new_tokens=4, plan=pop.PrunePlan.none())
    assert again.tokens == answer.tokens and sum(token == IMAGE for token in prompt) == 4 * (1 + 1 + 3)
    other = model.start_chat(plan=pop.PrunePlan((1, 3)))
    other.send("What?", images=[tmp_path / "a.png"], max_new_tokens=3)
    other.save(tmp_path / "chat.json")
    restored = model.load_chat(tmp_path / "chat.json", plan=other.plan)
    assert restored.send("And?", max_new_tokens=4).tokens == other.send("And?", max_new_tokens=4).tokens


def test_images_of_any_kind(model, tmp_path):
    Image.fromarray(A).save(tmp_path / "a.png")
    tokens = [[2, *ONE, 4]]
    expected = model.logits(tokens, images=[A])
    for image in (Image.fromarray(A), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.equal(model.logits(tokens, images=[image]), expected)


def test_a_batch_has_a_list_for_each_prompt(model):
    prompts = [[2, *ONE, 4, *ONE], [2, 9], [7, 8, *ONE, 3]]
    images = [[A, B], None, [B]]
    together = model.generate(prompts, images=images, max_new_tokens=4)
    for prompt, row, answer in zip(prompts, images, together, strict=True):
        assert answer.tokens == model.generate(prompt, images=row, max_new_tokens=4).tokens


def test_many_images_go_through_the_tower_in_pieces(model, monkeypatch):
    tokens = [[2, *ONE * 5, 4]]
    expected = model.logits(tokens, images=[A, B, A, B, A])
    monkeypatch.setattr("pop.inputs.processors.IMAGES_AT_ONCE", 2)
    torch.testing.assert_close(model.logits(tokens, images=[A, B, A, B, A]), expected, rtol=0, atol=1e-5)


def test_bfloat16_images():
    config = tiny_gemma3_vl_config()
    tokens = [[2, 64, 66, 66, 66, 66, 65, 4]]
    expected = pop.Model(random_model(config), config, compile=False).logits(tokens, images=[A])
    found = pop.Model(random_model(config).bfloat16(), config, compile=False).logits(tokens, images=[A])
    assert (found - expected).abs().max() < 0.15 * expected.std()


def test_a_chunk_and_a_cache_hold_an_image(model):
    assert pop.Model(model.module, model.config, compile=False, chunk_size=1).chunk_size == 4
    tokens, images = [[2, 3, *ONE, 4]], [[A]]
    expected = model.prefill(tokens, model.new_cache(), images=images, plan=pop.PrunePlan.none())
    found = model.prefill(tokens, model.new_cache(), images=images, plan=pop.PrunePlan.none(), chunk_size=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    small = pop.engine.cache.KVCache(model.config, 1, 20, dtype=torch.float32, device=torch.device("cpu"), chunk_size=3)
    with pytest.raises(InputError, match="takes 3 tokens at once, fewer than the 4 of an image"):
        model.prefill(tokens, small, images=images)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m.generate([2, *ONE]),
            "the prompt has tokens 500, which stand for images, but no image",
        ),
        (lambda m: m.score([2, *ONE], [3]), "the context has tokens 500, which"),
        (lambda m: pop.calibrate(m, [[2, *ONE] * 20], m.plan), "tokens 500, which stand for images"),
        (lambda m: pop.importance(m, [[2, *ONE]]), "the prompt has tokens 500, which"),
        (lambda m: m.generate([2, *ONE], images=[A, B]), "row 0 has 2 images, crops counted, but 4 tokens 500"),
        (lambda m: m.logits([[2, *ONE, *ONE]], images=[A]), "row 0 has 1 images, crops counted, but 8 tokens 500"),
        (lambda m: m.logits([[2, 3], [2, IMAGE]]), "row 1 has 0 images, crops counted, but 1 tokens 500"),
        (lambda m: m.logits([[2, *[IMAGE] * 8]], images=[A, B]), "must be 4 side by side, with others around"),
        (lambda m: m.logits([[2, *[IMAGE] * 3, 9, IMAGE]], images=[A]), "must be 4 side by side, with others around"),
        (lambda m: m.generate("a cat", images=[A]), "1 images are given, but the prompt says <start_of_image> 0 times"),
        (lambda m: m.generate("<start_of_image>" * 3, images=[A, B]), "2 images are given, but .* 3 times"),
        (lambda m: m.generate([[2], [2, *ONE]], images=[A]), "images must be a list of 2 lists"),
        (lambda m: m.generate([[2], [2, *ONE]], images=[A, [B]]), "images must be a list of 2 lists"),
        (lambda m: m.generate([2, *ONE], images=A), "images is a ndarray; give a list"),
        (lambda m: m.generate([2, *ONE], images=[3]), "an image is of type int"),
        (lambda m: m.generate([2, *ONE], images=["no.png"]), "the image 'no.png' is no file"),
        (lambda m: m.generate([2], videos=[A]), "the gemma3 family reads text and images only"),
        (
            lambda m: m.chat([{"role": "user", "content": "x"}], images=[A]),
            "chat takes images and videos in its",
        ),
        (lambda m: m.chat([{"role": "user", "content": [{"type": "image"}]}]), "images are {'type': 'image', 'image'"),
        (lambda m: m.chat([{"role": "system", "content": [{"type": "image", "image": A}]}]), "only a user's message"),
    ],
)
def test_what_does_not_fit_is_refused(model, call, message):
    with pytest.raises(InputError, match=message):
        call(model)


def test_videos_and_text_models_in_chat(model):
    with pytest.raises(UnsupportedError, match="this model takes text and images only"):
        model.chat([{"role": "user", "content": [{"type": "video", "video": A}]}])
    config = tiny_gemma3_config(vocab_size=503)
    text_model = pop.Model(random_model(config), config, model.tokenizer, compile=False)
    with pytest.raises(UnsupportedError, match="this model takes text only"):
        text_model.chat([{"role": "user", "content": [{"type": "image", "image": A}]}])
    with pytest.raises(InputError, match="the gemma3 family reads text only"):
        text_model.generate([2], images=[A])


# ---- loading ----

OLD, NEW = "language_model.model.", "model.language_model."
SAVED_AS = {
    "published": lambda name: name,
    "prefixed": lambda name: name.replace(OLD, NEW) if name.startswith("language_model") else f"model.{name}",
    "bare": lambda name: name.replace(OLD, "language_model.").replace("vision_model.", ""),
}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint, its weights by their published names."""
    vision = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3}
    text = {"vocab_size": 67, "hidden_size": 30, "intermediate_size": 44, "num_hidden_layers": 3, "sliding_window": 5}
    config = {
        "model_type": "gemma3",
        "text_config": {**text, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
        "vision_config": {**vision, "image_size": 28, "patch_size": 7},
        "mm_tokens_per_image": 4,
        **{"boi_token_index": 64, "eoi_token_index": 65, "image_token_index": 66},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_weights(tmp_path, pop.checkpoints.config_json.read_config(tmp_path), seed=3)
    return tmp_path


def logits(folder):
    return pop.load(folder, prune=None).logits([[2, 64, 66, 66, 66, 66, 65, 9]], images=[A])


@pytest.mark.parametrize("saved_as", SAVED_AS)
@pytest.mark.parametrize("head", [None, "lm_head.weight", "language_model.lm_head.weight"])
def test_loads_under_any_saved_name(folder, saved_as, head):
    expected = logits(folder)
    weights = load_file(folder / "model.safetensors")
    saved = {SAVED_AS[saved_as](name): weight for name, weight in weights.items()}
    assert saved_as == "published" or not saved.keys() & weights.keys() & {"language_model.model.norm.weight"}
    if head:
        saved[head] = weights[f"{OLD}embed_tokens.weight"].clone()
    save_file(saved, folder / "model.safetensors")
    assert torch.equal(logits(folder), expected)


def test_wrong_weights_are_refused_by_name(folder):
    weights = load_file(folder / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if ".layers.2." not in name or "vision" in name}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="num_hidden_layers is 3 but 2 layers are stored; missing: language_mod"):
        pop.load(folder)


def test_a_head_that_is_not_the_embedding_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": torch.zeros(67, 30)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight should repeat language_model.model.embed_tokens.weight"):
        pop.load(folder)


def test_arrays_are_read_without_pillow(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert model.logits([[2, *ONE, 4]], images=[np.zeros((9, 9, 3), np.uint8)]).isfinite().all()
