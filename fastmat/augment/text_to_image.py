"""Text-to-image: new images of a caption, by a pipeline of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn

from fastmat.augment.huggingface import named_model
from fastmat.augment.offline import Request
from fastmat.errors import UserError


class TextToImage:
    """An image painted after a caption. It joins the group of the image that the caption is of.

    model: folder or hub id of a text-to-image pipeline of diffusers (pip install fastmat-vlm[augment]).
    steps: of denoising. guidance: scale of the classifier-free guidance. size: pixels per side; null: the pipeline's.
    device: the run's by default.
    """

    name = "text_to_image"
    per: Literal["caption", "image"] = "caption"
    copies = None

    def __init__(
        self, *, model: str, steps: int = 30, guidance: float = 7.5, size: int | None = None, device: str = "cpu"
    ) -> None:
        if steps < 1:
            raise UserError(f"steps must be at least 1, got {steps}")
        self.pipeline = load_pipeline(model).to(torch.device(device))
        self.pipeline.set_progress_bar_config(disable=True)
        modules = [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]
        self.model = named_model(model, nn.ModuleList(modules))
        self.options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
        if size is not None:
            self.options |= {"height": size, "width": size}

    def __call__(self, requests: Sequence[Request]) -> list[Image.Image | None]:
        # On the CPU, so that an image depends on its own seed and on no device.
        noise = [torch.Generator().manual_seed(request.seed) for request in requests]
        captions = [request.caption for request in requests]
        made = self.pipeline(captions, generator=noise, output_type="pil", **self.options)
        refused = getattr(made, "nsfw_content_detected", None) or [False] * len(captions)
        return [None if bad else image for image, bad in zip(made.images, refused, strict=True)]


def load_pipeline(path: str) -> Any:
    """Raises UserError when diffusers is missing or cannot load what is there."""
    try:
        from diffusers import AutoPipelineForText2Image
    except ImportError as error:
        raise UserError("text_to_image needs diffusers: pip install fastmat-vlm[augment]") from error
    try:
        return AutoPipelineForText2Image.from_pretrained(path)
    except Exception as error:  # diffusers, safetensors and the hub each raise their own
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"{path!r} could not be loaded as a text-to-image pipeline ({line}); give a folder in "
            "diffusers' layout, or a hub id"
        ) from error
