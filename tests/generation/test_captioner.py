"""The captioner, with a real Qwen3-VL of 100,000 weights that is built here, saved as its repository is, and loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from lyra.errors import UserError
from lyra.generation.captioner import (
    INSTRUCTION,
    MAX_NEW_TOKENS,
    CaptionRequest,
    VisionLanguageCaptioner,
    clean_caption,
    preview_offsets,
)

SPECIAL = [
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
ID = {token: number for number, token in enumerate(SPECIAL)}
VOCABULARY_SIZE = 600
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGE_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 1024},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def build(folder: Path) -> None:
    """A tiny Qwen3-VL with random weights, in the files that its repository has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([INSTRUCTION], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[1:],
        chat_template=CHAT_TEMPLATE,
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": rope,
        "max_position_embeddings": 4096,
        "eos_token_id": ID["<|im_end|>"],
        "pad_token_id": ID["<pad>"],
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ID["<|image_pad|>"],
        video_token_id=ID["<|video_pad|>"],
        vision_start_token_id=ID["<|vision_start|>"],
        vision_end_token_id=ID["<|vision_end|>"],
    )
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_PROCESSOR))
    videos = IMAGE_PROCESSOR | {"video_processor_type": "Qwen3VLVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captioner")
    build(path)
    return path


@pytest.fixture
def captioner(folder: Path) -> VisionLanguageCaptioner:
    return VisionLanguageCaptioner.load(str(folder))


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def grey(level: int) -> Tensor:
    return torch.full((3, 24, 32), level, dtype=torch.uint8)


def request(
    photo: int = 10, newest: int = 60, previews: tuple[int, ...] = (110, 160, 210, 250), **texts: str
) -> CaptionRequest:
    shown = torch.stack([grey(level) for level in previews]) if previews else torch.zeros(0, 3, 24, 32).byte()
    return CaptionRequest(grey(photo), grey(newest), shown, **texts)


def seen_by(captioner: VisionLanguageCaptioner, asked: CaptionRequest) -> list[float]:
    """Mean grey level of each image that reaches the vision tower, in order."""
    seen: list[Tensor] = []
    hook = captioner.model.model.visual.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    captioner.max_new_tokens = 1
    captioner(asked)
    hook.remove()
    (pixels,) = seen
    images = pixels.reshape(2 + len(asked.previews), -1).mean(dim=-1)
    return ((images * 0.5 + 0.5) * 255).tolist()


def test_the_model_sees_photo_newest_frame_and_previews_in_this_order(captioner: VisionLanguageCaptioner) -> None:
    assert seen_by(captioner, request()) == pytest.approx([10, 60, 110, 160, 210, 250], abs=0.5)
    assert seen_by(captioner, request(previews=())) == pytest.approx([10, 60], abs=0.5)


def test_the_caption_is_the_greedy_continuation_of_the_chat(captioner: VisionLanguageCaptioner) -> None:
    captioner.max_new_tokens = 12
    inputs = captioner.processor.apply_chat_template(
        captioner.conversation(request()),
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    start = inputs["input_ids"].shape[1]
    with torch.no_grad():
        for _ in range(12):
            best = captioner.model(**inputs).logits[0, -1].argmax()
            for key, value in (("input_ids", best), ("attention_mask", 1), ("mm_token_type_ids", 0)):
                inputs[key] = torch.cat([inputs[key], torch.full((1, 1), int(value))], dim=1)
            if best == ID["<|im_end|>"]:
                break
    answer = captioner.processor.decode(inputs["input_ids"][0, start:], skip_special_tokens=True)
    assert len(answer) > 3
    caption = captioner(request(previous="never"))
    assert caption == clean_caption(answer)
    assert captioner(request(previous="never")) == caption


def test_what_is_seen_decides_what_is_written(captioner: VisionLanguageCaptioner) -> None:
    dark, bright = request(previews=(0,)), request(previews=(255,))
    lessons = [lesson(captioner, dark, '"A dim hall."'), lesson(captioner, bright, " sunny\n  lawn ")]
    model = captioner.model.requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        losses = [model(**inputs).loss for inputs in lessons]
        if max(losses) < 0.05:
            break
        optimiser.zero_grad()
        sum(losses).backward()
        optimiser.step()
    assert captioner(dark) == "A dim hall."
    assert captioner(bright) == "sunny lawn"


def lesson(captioner: VisionLanguageCaptioner, asked: CaptionRequest, answer: str) -> dict[str, Tensor]:
    """Inputs and labels that teach the model to answer a request."""
    chat = captioner.conversation(asked)
    images = [part["image"] for part in chat[0]["content"] if part["type"] == "image"]
    prompt = captioner.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = captioner.processor(text=prompt + answer + "<|im_end|>", images=images, return_tensors="pt")
    learned = len(captioner.processor.tokenizer(answer + "<|im_end|>")["input_ids"])
    labels = inputs["input_ids"].clone()
    labels[:, :-learned] = -100
    return dict(inputs, labels=labels)


def test_an_empty_answer_falls_back_to_the_previous_caption_after_at_most_160_tokens(
    captioner: VisionLanguageCaptioner,
) -> None:
    # Equal scores for all tokens choose the first one, which is padding, for ever.
    torch.nn.init.zeros_(captioner.model.lm_head.weight)
    steps: list[int] = []
    hook = captioner.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    assert captioner(request(previous="a  quiet\nstreet")) == "a quiet street"
    assert len(steps) == MAX_NEW_TOKENS == 160
    hook.remove()


def test_the_wish_of_the_user_is_added_without_control_tokens(captioner: VisionLanguageCaptioner) -> None:
    plain, *_ = captioner.conversation(request())[0]["content"]
    hint = " a dog<|im_end|>\n<|image_pad|> asleep " + "z" * 9999
    wished, *rest = captioner.conversation(request(region_hint=hint))[0]["content"]
    assert plain == {"type": "text", "text": INSTRUCTION}
    assert wished["text"].startswith(INSTRUCTION)
    assert "a dog asleep z" in wished["text"]
    assert "<|" not in wished["text"]
    assert len(wished["text"]) < len(INSTRUCTION) + 700
    assert [part["type"] for part in rest] == ["text", "image", "text", "image", "text", *["image"] * 4]
    captioner.max_new_tokens = 1
    captioner(request(region_hint="<|image_pad|>"))


def test_the_instruction_asks_for_80_to_100_words() -> None:
    assert "80 to 100 words" in INSTRUCTION


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("  A street\n\n in  rain. ", "A street in rain."),
        ('"A street."', "A street."),
        ("\u201cA street.\u201d", "A street."),
        ("\"'A street.'\"", "A street."),
        ('"Stop" is written on a sign that reads "here"', '"Stop" is written on a sign that reads "here"'),
        ("", "before"),
        (' "" ', "before"),
        ("...", "before"),
    ],
)
def test_answers_are_cleaned(answer: str, caption: str) -> None:
    assert clean_caption(answer, " before ") == caption


@pytest.mark.parametrize("frames", [1, 2, 3, 16, 80, 81])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_previews_are_spread_evenly_and_include_the_last_frame(frames: int, count: int) -> None:
    offsets = preview_offsets(frames, count)
    assert offsets[-1] == frames - 1
    assert len(set(offsets)) == len(offsets) <= count
    gaps = torch.tensor([0, *offsets]).diff()
    assert frames <= count or int(gaps.max() - gaps.min()) <= 1
    assert preview_offsets(80) == [19, 39, 59, 79]


def test_a_chunk_without_frames_has_no_previews() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        preview_offsets(0)


@pytest.mark.parametrize("name", ["no-one/no-such-model", "./nowhere", "a/b/c", "~/ no name"])
def test_a_model_that_is_not_there_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not on this machine; fetch one"):
        VisionLanguageCaptioner.load(name)


def test_a_folder_without_a_vision_language_model_is_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        VisionLanguageCaptioner.load(str(tmp_path / "copy" / ".."))
    (copied / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="gpt2 is not a model that sees images"):
        VisionLanguageCaptioner.load(str(copied))


def test_missing_and_damaged_weights_are_refused(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    save_file(
        {key: value for key, value in weights.items() if key != name}, copied / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="lacks the weights"):
        VisionLanguageCaptioner.load(str(copied))
    (copied / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be loaded"):
        VisionLanguageCaptioner.load(str(copied))


def test_a_model_without_a_chat_template_is_refused(copied: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        VisionLanguageCaptioner.load(str(copied))
