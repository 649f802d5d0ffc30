"""What does the next chunk show, in words? A hook that captions the coming views instead of a prompt, off by default.

The released server asks a vision-language model before it generates: it shows the model the photo, the newest frame and
previews of the coming path (what memory shows from a few of its poses, black where nothing is known), adds the user's
wish for newly revealed places, and uses the answer as the chunk's caption. Everything is optional here: a walkthrough
without a captioner uses its prompt.

Knows no loop and no memory: who calls it warps the previews (`preview_offsets` says for which frames).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import UInt8
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from lyra.errors import UserError

DEFAULT_CAPTIONER = "Qwen/Qwen3-VL-4B-Instruct"
"""The model of the released server."""
PREVIEWS = 4
"""Previews per request (released server)."""
MAX_NEW_TOKENS = 160
"""Longest answer (released server)."""
_MAX_HINT = 500
"""Characters of the user's wish that are passed on."""

INSTRUCTION = (
    "Write the caption of the next seconds of a video that walks through one continuous place. "
    "You see how the place looked at the start, how it looks now, and rough previews of the views to come, in order. "
    "Black parts of the previews are places that nobody has seen yet. "
    "Describe what the coming views show: the surroundings, the things in them and where they stand, their materials "
    "and colours, the light and the weather. "
    "Stay true to everything that is visible, and fill the unseen places with what would naturally belong there. "
    "Write 80 to 100 words of plain English in the present tense, as one paragraph. "
    "Do not speak of pictures, previews or black parts, use no film or camera terms, and answer with the caption alone."
)
"""What the model is asked for."""
_HINT = "The places not seen yet should show this, in keeping with the rest: {hint}"
_PHOTO_LABEL = "The place at the start:"
_NEWEST_LABEL = "The place now:"
_PREVIEWS_LABEL = "The views to come, in order:"

_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "\u00ab": "\u00bb", "`": "`"}


@dataclass(frozen=True)
class CaptionRequest:
    """What a captioner gets to see before a chunk is generated."""

    photo: UInt8[Tensor, "3 h w"]
    newest: UInt8[Tensor, "3 h2 w2"]
    """The last finished frame; before the first chunk the photo again."""
    previews: UInt8[Tensor, "n 3 h3 w3"]
    """What is known of the coming views, in the order of the path, black where nothing is; may be empty."""
    region_hint: str = ""
    """The user's wish for places that come into view."""
    previous: str = ""
    """The caption of the chunk before, or the prompt."""


class Captioner(Protocol):
    """Writes the caption of a chunk."""

    def __call__(self, request: CaptionRequest) -> str:
        """The caption, as one line."""
        ...


def preview_offsets(chunk_frames: int, count: int = PREVIEWS) -> list[int]:
    """Frames of a chunk to preview: `count` at equal distances, of which the last is the chunk's last (released code).

    >>> preview_offsets(80)
    [19, 39, 59, 79]

    Raises:
        ValueError: no frame, or no preview.
    """
    if chunk_frames < 1 or count < 1:
        raise ValueError(f"a chunk and its previews need at least one frame, not {chunk_frames} and {count}")
    return sorted({(chunk_frames - 1) * number // count for number in range(1, count + 1)})


def clean_caption(answer: str, previous: str = "") -> str:
    """An answer as one line without the quotation marks around it; `previous` if nothing is left of it."""
    text = " ".join(answer.split())
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text if re.search(r"\w", text) else " ".join(previous.split())


class VisionLanguageCaptioner:
    """A captioner of transformers' image-text-to-text models; greedy, so that the same request has the same caption.

    The weights stay on the CPU and move to the device only while a caption is written (released server), because the
    video network needs the memory.

    Args:
        model: an image-text-to-text model of transformers.
        processor: its processor, with a chat template.
        device: where captions are written.
        max_new_tokens: longest answer.
    """

    def __init__(
        self, model: Any, processor: Any, device: torch.device | str = "cpu", max_new_tokens: int = MAX_NEW_TOKENS
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.device = torch.device(device)
        self.max_new_tokens = max_new_tokens

    @classmethod
    def load(
        cls,
        name: str = DEFAULT_CAPTIONER,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> VisionLanguageCaptioner:
        """A captioner from a folder or from the local cache of the Hugging Face hub; nothing is downloaded.

        Args:
            name: a folder of weights, or a repository such as `Qwen/Qwen3-VL-4B-Instruct`.
            device: where captions are written.
            dtype: number format of the weights; bfloat16 for CUDA.
            max_new_tokens: longest answer.

        Raises:
            UserError: the model is not on this machine, or is not a complete vision-language model.
        """
        folder = _find_folder(name)
        from transformers import AutoModelForImageTextToText
        from transformers.utils import logging as transformers_logging

        # Its progress bars would run into the job's own progress.
        transformers_logging.disable_progress_bar()
        try:
            processor = _image_processor(folder)
            # transformers' types do not know that the second option makes this a pair.
            loader: Any = AutoModelForImageTextToText
            model, found = loader.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise UserError(
                f"The captioner in {folder} cannot be loaded ({_first_line(error)}); "
                "restore the folder or choose another vision-language model."
            ) from error
        missing = sorted(found["missing_keys"])
        if missing:
            # transformers would go on with random weights.
            raise UserError(f"The captioner in {folder} lacks the weights {missing[0]} and others; restore the folder.")
        if not processor.chat_template:
            raise UserError(
                f"The captioner in {folder} has no chat template; choose a model that follows instructions."
            )
        return cls(model, processor, device, max_new_tokens)

    @torch.no_grad()
    def __call__(self, request: CaptionRequest) -> str:
        """The model's answer as one line, or the request's previous caption if it has none."""
        inputs = self.processor.apply_chat_template(
            self.conversation(request),
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.device, self.model.dtype)
        with self._on_device():
            tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        answer = tokens[0, inputs["input_ids"].shape[1] :]
        return clean_caption(self.processor.decode(answer, skip_special_tokens=True), request.previous)

    def conversation(self, request: CaptionRequest) -> list[dict[str, Any]]:
        """The chat that the model answers: the instruction, then photo, newest frame and previews with their labels."""
        instruction, hint = INSTRUCTION, self._plain(request.region_hint)
        if hint:
            instruction = f"{instruction}\n{_HINT.format(hint=hint)}"
        content = [_text(instruction), _text(_PHOTO_LABEL), _image(request.photo)]
        content += [_text(_NEWEST_LABEL), _image(request.newest)]
        if len(request.previews):
            content += [_text(_PREVIEWS_LABEL), *(_image(preview) for preview in request.previews)]
        return [{"role": "user", "content": content}]

    def _plain(self, text: str) -> str:
        """A user's text on one line and without the model's control tokens, which would break the chat apart."""
        for token in self.processor.tokenizer.all_special_tokens:
            text = text.replace(token, " ")
        return " ".join(text.split())[:_MAX_HINT]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        self.model.to(self.device)
        try:
            yield
        finally:
            if self.device.type != "cpu":
                self.model.to("cpu")
                torch.cuda.empty_cache()


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image(pixels: UInt8[Tensor, "3 h w"]) -> dict[str, Any]:
    return {"type": "image", "image": Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _find_folder(name: str) -> Path:
    """The folder of a model on this machine."""
    from huggingface_hub import snapshot_download

    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(name, local_files_only=True))
    # Not cached, or not a name that a repository can have.
    except (OSError, ValueError) as error:
        raise UserError(
            f"The captioner {name} is not on this machine; fetch one, for example with "
            f"'hf download {DEFAULT_CAPTIONER}', or name the folder of a vision-language model."
        ) from error


def _image_processor(folder: Path) -> Any:
    """The processor of a model without its part for videos.

    `AutoProcessor` cannot load Qwen3-VL's without torchvision, because videos need it; images do not.
    """
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if type(config) not in PROCESSOR_MAPPING:
        raise ValueError(f"{config.model_type} is not a model that sees images")
    base: Any = PROCESSOR_MAPPING[type(config)]

    class ImagesOnly(base):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    return ImagesOnly.from_pretrained(folder, local_files_only=True)
