"""Randomly initialised models in the standard layouts, small enough for a test: nothing real runs first at a user's."""

import json
from pathlib import Path

import open_clip
import torch
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

TEXT_WIDTH = 32
LATENT_CHANNELS = 4


def make_tokenizer(model_max_length: int = 77) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: every text becomes its letters. The end token is the highest id."""
    letters = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], model_max_length=model_max_length
    )


def make_parts(in_channels: int = LATENT_CHANNELS, seed: int = 0) -> dict:
    """Components of a pipeline with SD 1.5's layout: 4 levels, /8, epsilon prediction, the same block types."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.18215,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=2,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=4,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "vae": vae,
        "unet": unet,
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def make_sd(directory: Path, seed: int = 0) -> Path:
    """Save a StableDiffusionPipeline."""
    StableDiffusionPipeline(**make_parts(seed=seed)).save_pretrained(directory)
    return directory


def make_editor(directory: Path, seed: int = 0) -> Path:
    """Save a StableDiffusionInstructPix2PixPipeline: 8 channels at the UNet's entrance."""
    parts = make_parts(in_channels=2 * LATENT_CHANNELS, seed=seed)
    StableDiffusionInstructPix2PixPipeline(**parts).save_pretrained(directory)
    return directory


def make_clip(directory: Path, seed: int = 0) -> Path:
    """Save an open_clip model with its tokenizer, to be loaded as `local-dir:<directory>`."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(model_max_length=48)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {
            "context_length": 48,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": "local",
            "width": 16,
            "heads": 2,
            "layers": 2,
        },
    }
    model = open_clip.CLIP(**config_for_model(config))
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    preprocess = {"size": 32, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")
    return directory


def make_dino(directory: Path, seed: int = 0) -> Path:
    """Save a vision transformer as facebook/dino-vits16 is laid out, with its image processor."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(directory)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(directory)
    return directory


VLM_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
VLM_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_vlm(directory: Path, seed: int = 0) -> Path:
    """Save a Qwen2.5-VL, as the 7 B one is laid out, whose tokens are bytes. vLLM's CPU attention wants heads of 32."""
    torch.manual_seed(seed)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: n for n, token in enumerate([*VLM_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(VLM_TOKENS))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    text = sizes | {
        "vocab_size": len(ids),
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {"depth": 2, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 56}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=sizes | vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(directory)
    patches = {"patch_size": 14, "merge_size": 2, "size": {"shortest_edge": 28**2, "longest_edge": 16 * 28**2}}
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**patches), fast, Qwen2VLVideoProcessor(**patches), chat_template=VLM_CHAT
    ).save_pretrained(directory)
    return directory


def config_for_model(config: dict) -> dict:
    """open_clip.CLIP takes the text config without the tokenizer's name."""
    text = {key: value for key, value in config["text_cfg"].items() if key != "hf_tokenizer_name"}
    return {**config, "text_cfg": text}
