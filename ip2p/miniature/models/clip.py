"""The miniature CLIP: an open_clip model that knows the scenes, by contrast between each scene and an edit of it.

Contrast alone learns late what is where (after 1,600 steps its direction did not know a moved thing from one left where
it was). So both embeddings are also taught to be *readable*: one linear map, the same for both, tells from either what
is at every place. It is dropped after training.
"""

# diffusers, transformers and open_clip annotate less than they take and give.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false

import json
import random
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from ip2p.miniature.edits import apply_edit, draw_edit, possible_kinds
from ip2p.miniature.language import ALL_SAID, Description, describe, draw_unsaid, read_caption, vocabulary
from ip2p.miniature.models.autoencoder import SCALING_FACTOR, draw_scenes, patch_code, pixels
from ip2p.miniature.models.fit import Run, fit, generators, rank
from ip2p.miniature.models.text_encoder import CAPTION_QUESTIONS, NOT_ASKED, Questions, Told, indices, told_by_caption
from ip2p.miniature.models.tokenizer import CONTEXT_LENGTH, build_tokenizer, tokenize
from ip2p.miniature.scene import Scene

# The mean and deviation that its images are normalised with, as open_clip's `preprocess_cfg` states them.
MEAN, STD = 0.5, 0.5
# What can be read from an image: what is at every place, and the setting.
SEEN: Questions = {subject: asked for subject, asked in CAPTION_QUESTIONS.items() if not subject.startswith("mention")}
READING_WEIGHT = 0.2


def clip_config(vocabulary_size: int) -> dict:
    return {
        "embed_dim": 96,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 4},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocabulary_size,
            # open_clip takes the tokenizer from the model's own directory whatever is named here.
            "hf_tokenizer_name": "local",
            "width": 64,
            "heads": 4,
            "layers": 3,
        },
    }


def new_clip(config: dict) -> open_clip.CLIP:
    text = {key: value for key, value in config["text_cfg"].items() if key != "hf_tokenizer_name"}
    return open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text)


def draw_edited(
    rng: random.Random, count: int, kept_out: bool = False
) -> tuple[list[Scene], list[Scene], list[str], list[str]]:
    """Draw scenes and an edit of each: scenes, edited scenes, captions, edited captions.

    Captions of scenes that are not kept out leave now and then places or background unsaid; those that are, nothing:
    then there is one right caption.
    """
    scenes, edited, captions, edited_captions = draw_scenes(rng, count, kept_out), [], [], []
    for scene in scenes:
        unsaid = ALL_SAID if kept_out else draw_unsaid(rng)
        edit = draw_edit(scene, rng, rng.choice(possible_kinds(scene, unsaid)))
        edited.append(apply_edit(edit, scene))
        style = rng.getrandbits(32)
        captions.append(describe(scene, style, unsaid=unsaid))
        edited_captions.append(describe(edited[-1], style, unsaid=unsaid - {edit.kind}))
    return scenes, edited, captions, edited_captions


@torch.no_grad()
def roughen(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """Some of the images as a diffusion model would paint them: through the decoder, from a code with some noise."""
    count = len(images) // 8  # the decoder costs more than a step of CLIP
    chosen = torch.randperm(len(images), generator=generator)[:count].to(images.device)
    code = patch_code(images[chosen])
    level = torch.rand(count, 1, 1, 1, generator=generator).to(code) * 0.3 / SCALING_FACTOR
    noise = torch.randn(code.shape, generator=generator).to(code)
    return images.index_copy(0, chosen, vae.decode(code + level * noise).sample.clamp(-1, 1))


class Reader(nn.Module):
    """Answers `SEEN` from normalised embeddings (B, D) of images or captions, by one linear map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.answers = nn.Linear(width, sum(len(answers) for asked in SEEN.values() for answers in asked.values()))

    def loss(self, embeddings: Tensor, told: Sequence[Told]) -> Tensor:
        """Cross-entropy of what was asked, summed over the questions, averaged over the batch."""
        wanted = indices(SEEN, told)
        sizes = [len(answers) for asked in SEEN.values() for answers in asked.values()]
        # Cosines between embeddings are what counts; on their scale, 1 / sqrt(D), logits would hardly differ.
        logits = self.answers(embeddings * embeddings.shape[-1] ** 0.5).split(sizes, -1)
        losses = [
            F.cross_entropy(part, answer.to(part.device), ignore_index=NOT_ASKED, reduction="sum")
            for part, answer in zip(logits, wanted.values(), strict=True)
        ]
        return torch.stack(losses).sum() / len(embeddings)


def seen(scene: Scene) -> Told:
    """What its image shows."""
    return told_by_caption(Description(scene, ALL_SAID))


def said(caption: str) -> Told:
    """What a caption tells of `seen`: what it leaves unsaid it is not asked."""
    told = told_by_caption(read_caption(caption))
    return {
        subject: {question: answer for question, answer in answers.items() if answer != "unsaid"}
        for subject, answers in told.items()
    }


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of normalised embeddings (B, D), row i of one belonging to row i of the other."""
    logits = logit_scale * image @ text.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_clip(out: Path, run: Run, vae: AutoencoderKL, *, steps: int, batch_size: int = 32) -> None:
    """Train on `batch_size` scenes with an edit of each as hard negatives, on every worker; what ships had two.

    Writes an open_clip directory to `out`.
    """
    torch.manual_seed(run.seed)
    tokenizer = build_tokenizer(vocabulary())
    config = clip_config(len(tokenizer))
    model = new_clip(config).to(run.device)
    reader = Reader(config["embed_dim"]).to(run.device)
    both = nn.ModuleDict({"clip": model, "reader": reader})
    vae = vae.to(run.device, torch.float32).eval().requires_grad_(False)

    def step_loss(step: int) -> Tensor:
        rng, generator = generators(run.seed, step)
        scenes, edited, captions, edited_captions = draw_edited(rng, batch_size)
        images = roughen(vae, pixels(scenes + edited).to(run.device), generator)
        ids = tokenize(tokenizer, captions + edited_captions).to(run.device)
        image, text, logit_scale = model(images, ids)  # CLIP.forward normalises
        read = reader.loss(image, [seen(scene) for scene in scenes + edited])
        read = read + reader.loss(text, [said(caption) for caption in captions + edited_captions])
        return contrastive_loss(image, text, logit_scale) + READING_WEIGHT * read

    def measure(averaged: nn.Module) -> dict[str, float]:
        assert isinstance(averaged, nn.ModuleDict)
        return measure_clip(averaged["clip"], tokenizer, run.device)

    trained = fit(
        both,
        step_loss,
        run,
        "clip",
        steps=steps,
        peak=2e-3,
        measure=measure,
    )
    assert isinstance(trained, nn.ModuleDict)
    if rank() == 0:
        save_clip(out, trained["clip"], config, tokenizer)


def save_clip(out: Path, model: nn.Module, config: dict, tokenizer: CLIPTokenizer) -> None:
    """Write the directory that open_clip loads as `local-dir:<out>`."""
    preprocess = {"mean": [MEAN] * 3, "std": [STD] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (out / "open_clip_config.json").write_text(text + "\n")
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, out / "open_clip_model.safetensors")
    tokenizer.save_pretrained(out)


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """Probability that a positive scores above a negative (the Mann-Whitney statistic), ties counting half."""
    difference = positive[:, None] - negative[None, :]
    return ((difference > 0).float() + 0.5 * (difference == 0)).mean().item()


@torch.inference_mode()
def measure_clip(
    model: nn.Module, tokenizer: CLIPTokenizer, device: str, count: int = 256, seed: int = 1
) -> dict[str, float]:
    """On held-out scenes: the right caption first among `count`, and the AUC of directional similarity.

    The AUC is between a rendered right edit and a rendered other edit of the same scene, for the same captions.
    """
    assert isinstance(model, open_clip.CLIP)
    rng = random.Random(seed)
    scenes, edited, captions, edited_captions = draw_edited(rng, count, kept_out=True)
    others = [apply_edit(draw_edit(scene, rng), scene) for scene in scenes]
    differs = torch.tensor([other != right for other, right in zip(others, edited, strict=True)])

    def embed(images: list[Scene]) -> Tensor:
        return model.encode_image(pixels(images).to(device), normalize=True)

    i0, i1, wrong = embed(scenes), embed(edited), embed(others)
    t0, t1 = (
        model.encode_text(tokenize(tokenizer, texts).to(device), normalize=True)
        for texts in (captions, edited_captions)
    )
    right_direction = F.cosine_similarity(i1 - i0, t1 - t0)
    wrong_direction = F.cosine_similarity(wrong - i0, t1 - t0)[differs.to(device)]
    first = ((i0 @ t0.T).argmax(1) == torch.arange(count, device=device)).float().mean().item()
    return {"retrieval": first, "direction_auc": area_under_curve(right_direction, wrong_direction)}
