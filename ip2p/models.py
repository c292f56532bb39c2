"""The only place that loads models: Stable Diffusion of diffusers, CLIP of open_clip, DINO and language models."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ip2p.errors import UserError
from ip2p.recipe import LOCAL_CLIP, ClipRef, ModelRef, locate

# Messages of CUDA and its libraries, and of drivers that have lost a GPU.
DEVICE_ERRORS = re.compile(r"CUDA error|cuDNN error|CUDNN_STATUS|CUBLAS_STATUS|\bECC\b|\bXid\b|NCCL error")


@dataclass(frozen=True)
class Schedule:
    """The noise that a UNet was trained with."""

    alphas_cumprod: Tensor  # (T,) float32 on the CPU
    prediction_type: str  # epsilon, v_prediction or sample
    config: dict[str, Any]  # the scheduler's own config: steps_offset, timestep_spacing, ...


@dataclass
class TextToImage:
    """The parts of a Stable Diffusion model, or of an editor: then `unet` has twice the VAE's channels at its entrance.

    Latents are (B, C, height / downsampling, width / downsampling).
    """

    tokenizer: PreTrainedTokenizerBase
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    schedule: Schedule
    device: str
    dtype: torch.dtype

    @property
    def downsampling(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def latent_channels(self) -> int:
        return self.vae.config["latent_channels"]

    @property
    def scaling_factor(self) -> float:
        """What latents are multiplied with, so that the UNet sees about unit variance."""
        return self.vae.config["scaling_factor"]

    @property
    def is_editor(self) -> bool:
        return self.unet.config["in_channels"] == 2 * self.latent_channels

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image. Raises `UserError` for sides that the VAE can't halve often enough."""
        if height % self.downsampling or width % self.downsampling or not height or not width:
            raise UserError(f"image size {height}x{width}: both sides must be multiples of {self.downsampling}")
        return self.latent_channels, height // self.downsampling, width // self.downsampling

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        """Prompts -> (B, L, D), the last hidden states of all L tokens; longer prompts are cut."""
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return self.text_encoder(tokens.input_ids.to(self.device))[0]

    @torch.no_grad()
    def encode_image(self, images: Tensor, scaled: bool) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents (B, C, h, w), the mode of the posterior.

        `scaled` for what is denoised; not for the image that an editor is conditioned on (InstructPix2Pix).
        """
        posterior = self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist  # pyright: ignore
        latents = posterior.mode().to(self.dtype)
        return latents * self.scaling_factor if scaled else latents

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, H, W) in [-1, 1]."""
        latents = latents.to(self.device, self.vae.dtype)
        return self.vae.decode(latents / self.scaling_factor).sample.clamp(-1, 1)  # pyright: ignore


@dataclass
class ClipModel:
    """An open_clip model with what its images must look like."""

    model: open_clip.CLIP | open_clip.CustomTextCLIP
    tokenizer: Any  # list[str] -> (B, L) token ids
    size: tuple[int, int]  # height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize_mode: str
    device: str
    dtype: torch.dtype


@dataclass
class DinoModel:
    """A vision transformer, and the processor that makes of an image what it was trained with."""

    model: PreTrainedModel
    processor: Any  # transformers' image processor
    device: str
    dtype: torch.dtype


def resolve_device(device: str) -> str:
    """`auto` -> `cuda` where there is one, else `cpu`. Raises `UserError` for a cuda that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for and this process sees none; use device: auto or cpu")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def is_device_error(error: Exception) -> bool:
    """Whether `error` says that the GPU, or this process's context on it, is broken.

    Running out of memory is not: the process works on with smaller batches.
    """
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.AcceleratorError) or bool(DEVICE_ERRORS.search(str(error)))


def load_text_to_image(
    ref: ModelRef, vae: ModelRef | None = None, device: str = "auto", key: str = "models.text_to_image"
) -> TextToImage:
    """Stable Diffusion or an editor from a diffusers directory or the hub, in eval mode, without gradients."""
    device, dtype = resolve_device(device), getattr(torch, ref.dtype)
    parts: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if vae is not None:
        parts["vae"] = _load(AutoencoderKL, vae, "models.vae", dtype=getattr(torch, vae.dtype))
    pipeline = _load(DiffusionPipeline, ref, key, dtype=dtype, **parts)
    missing = [
        part for part in ("tokenizer", "text_encoder", "vae", "unet", "scheduler") if not hasattr(pipeline, part)
    ]
    if missing:
        raise UserError(f"{key}: {ref.path!r} is a {type(pipeline).__name__} without {', '.join(missing)}")
    for module in (pipeline.text_encoder, pipeline.vae, pipeline.unet):
        module.to(device).eval().requires_grad_(False)
    config = dict(pipeline.scheduler.config)
    schedule = Schedule(pipeline.scheduler.alphas_cumprod.float().cpu(), config["prediction_type"], config)
    return TextToImage(pipeline.tokenizer, pipeline.text_encoder, pipeline.vae, pipeline.unet, schedule, device, dtype)


def load_tokenizer(ref: ModelRef, key: str = "models.text_to_image") -> PreTrainedTokenizerBase:
    """The tokenizer alone of a diffusers directory or of the hub."""
    return _load(AutoTokenizer, ref, key, subfolder="tokenizer")


def load_language_model(
    ref: ModelRef, adapter: str | None = None, key: str = "models.llm"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer; with the directory of a LoRA adapter, its weights are merged in."""
    model = _load(AutoModelForCausalLM, ref, key, dtype=getattr(torch, ref.dtype))
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model, _load(AutoTokenizer, ref, key)


def load_clip(ref: ClipRef, device: str = "auto", key: str = "models.clip") -> ClipModel:
    """An open_clip model in eval mode, without gradients."""
    device, dtype = resolve_device(device), getattr(torch, ref.dtype)
    name = ref.name
    if name.startswith(LOCAL_CLIP):
        name = LOCAL_CLIP + locate(name.removeprefix(LOCAL_CLIP), key + ".name")
    # OpenAI's weights want the quick GELU; open_clip only warns of the other one.
    tag = open_clip.get_pretrained_cfg(name, ref.pretrained) if ref.pretrained else {}
    try:
        model = open_clip.create_model(
            name,
            pretrained=ref.pretrained,
            device=device,
            force_quick_gelu=tag.get("quick_gelu", False),
            require_pretrained=True,  # or a directory without weights would judge at random
        )
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{key}: open_clip can't load {ref.name!r} ({ref.pretrained}): {error}") from error
    assert isinstance(model, open_clip.CLIP | open_clip.CustomTextCLIP)
    model.to(dtype=dtype).eval().requires_grad_(False)
    shape: dict[str, Any] = model.visual.preprocess_cfg  # pyright: ignore
    if shape["resize_mode"] == "longest":
        raise UserError(
            f"{key}: {ref.name!r} pads its images (resize_mode longest); use one that crops or squashes them"
        )
    height, width = (shape["size"],) * 2 if isinstance(shape["size"], int) else shape["size"]
    return ClipModel(
        model,
        tokenizer,
        (height, width),
        shape["mean"],
        shape["std"],
        shape["interpolation"],
        shape["resize_mode"],
        device,
        dtype,
    )


def load_dino(ref: ModelRef, device: str = "auto", key: str = "models.dino") -> DinoModel:
    """A vision transformer in eval mode, without gradients."""
    device, dtype = resolve_device(device), getattr(torch, ref.dtype)
    model = _load(AutoModel, ref, key, dtype=dtype)
    if not hasattr(model.config, "patch_size"):
        raise UserError(
            f"{key}.path: {ref.path!r} is a {type(model).__name__}, no vision transformer; use one such as "
            "facebook/dino-vits16"
        )
    model.to(device).eval().requires_grad_(False)
    return DinoModel(model, _load(AutoImageProcessor, ref, key), device, dtype)


def _load(loader: Any, ref: ModelRef, key: str, **arguments: Any) -> Any:
    path = locate(ref.path, key + ".path")
    try:
        return loader.from_pretrained(path, revision=None if Path(path).is_dir() else ref.revision, **arguments)
    except (OSError, ValueError) as error:
        way_out = (
            "check that it is a complete diffusers directory"
            if Path(path).is_dir()
            else "check the id and revision, or download it and give its directory as path"
        )
        raise UserError(f"{key}.path: can't load {ref.path!r} (revision {ref.revision}): {error}; {way_out}") from error
