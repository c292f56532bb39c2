"""What a run will cost: GPU-hours, storage and money of each stage, from operations and measured rates.

An estimate is as good as its assumptions, so every one of them has its source and can be replaced.
"""

from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ip2p.edit.names import EDITORS
from ip2p.errors import UserError
from ip2p.evaluate.sweep import SDEDITS, curve_scales, grid_scales
from ip2p.recipe import Evaluate, Pairs, Recipe

SECONDS_PER_HOUR = 3600
BYTES_PER_GB = 1e9
TEXT_BYTES = 500  # of a row of instructions/: beside images nothing
PAPER_GUIDANCE = (7.5, 15.0)  # upstream's code

PEAK_TFLOPS = {"l4": 121.0, "l40s": 362.0, "a100": 312.0, "h100": 989.0, "h200": 989.0}
PRICES = {"l4": 0.80, "l40s": 1.90, "a100": 2.70, "h100": 4.00, "h200": 5.00}

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class Assumptions(BaseModel):
    """Everything the estimate takes for granted; a description is what it is, and where its default is from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    unet_tflop: Positive = Field(
        0.803, description="TFLOP of one UNet sample at 64x64 latents (SD 1.5); grows here as the pixels do"
    )
    vae_decode_tflop: Positive = Field(2.515, description="TFLOP to decode 512x512 pixels (SD's VAE, its layers added)")
    vae_encode_tflop: Positive = Field(1.117, description="TFLOP to encode 512x512 pixels (SD's VAE, its layers added)")
    clip_tflop: Positive = Field(0.162, description="TFLOP of CLIP for an image (ViT-L/14 at 224, its layers added)")
    unet_parameters: Positive = Field(860e6, description="of SD 1.5's UNet (model card)")
    llm_parameters: Positive = Field(7.61e9, description="of the language model (Qwen2.5-7B's model card)")
    prompt_tokens: Positive = Field(900, description="of a caption's question with its exemplars; a guess")
    prompt_cached: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.943, description="share of them that the prefix cache answers (benchmarks/RESULTS.md, 2026-11-23, captions)"
    )
    answer_tokens: Positive = Field(60, description="of an instruction and an edited caption; a guess")
    asked: Annotated[float, Field(ge=1)] = Field(1.1, description="times that a caption is asked on average; a guess")
    instruction_share: Share = Field(
        0.981, description="of captions with a usable answer (2,071 of 2,112; benchmarks/RESULTS.md, captions)"
    )
    fixed_pairs: Positive = Field(
        2.64,
        description="pairs of a caption by 100 candidates (132 of 50, miniature; benchmarks/RESULTS.md, 2026-11-23)",
    )
    adaptive_pairs: Positive = Field(
        3.26,
        description="pairs of a caption by adaptive rounds, quality and early look (163 of 50; benchmarks/RESULTS.md, "
        "same run)",
    )
    adaptive_candidates: Positive = Field(
        7.74,
        description="whole candidates' worth of UNet samples that they spend on a caption (76 x 163 / 50 samples, 32 a "
        "candidate; benchmarks/RESULTS.md, same run)",
    )
    views: Annotated[float, Field(ge=1, le=2)] = Field(
        1.9, description="encodings of a pair where train.flip is true: 2 but for texts that name a side; a guess"
    )
    png_bytes: Positive = Field(1.8, description="bytes of a pixel in a lossless PNG of a photograph; a guess")
    candidate_bytes: Positive = Field(60, description="bytes of a candidate's scores in pairs/ (their columns added)")
    llm_utilization: Share = Field(0.15, description="share of the GPU's peak that vLLM reaches; a guess: measure it")
    unet_utilization: Share = Field(0.35, description="share of the peak that sampling reaches; a guess: measure it")
    train_utilization: Share = Field(
        0.25, description="share of the peak that training reaches; a guess (the paper's 8 A100 in 25.5 hours: 0.03)"
    )
    peak_tflops: Annotated[dict[str, Positive], AfterValidator(lambda peaks: PEAK_TFLOPS | peaks)] = Field(
        PEAK_TFLOPS, description="TFLOP/s, float16 without sparsity (NVIDIA's data sheets)"
    )
    prices: Annotated[dict[str, Positive], AfterValidator(lambda prices: PRICES | prices)] = Field(
        PRICES, description="$ an hour of one GPU: on-demand list price of a large cloud, 2026, rounded; check yours"
    )
    storage_price: Positive = Field(
        0.023, description="$ a GB and month in object storage: list price of a large cloud, 2026; check yours"
    )
    months: Positive = Field(1, description="that everything is kept")


@dataclass(frozen=True)
class Protocol:
    """How pairs are drawn. candidates: whole ones' worth of UNet samples spent on a caption pair."""

    name: str
    candidates: float
    steps: int
    samples_per_step: int  # UNet samples of one candidate at one step: two images, with and without guidance
    pairs_per_caption: float

    @property
    def unet_samples_per_pair(self) -> float:
        return self.candidates * self.steps * self.samples_per_step / self.pairs_per_caption


@dataclass(frozen=True)
class Stage:
    """What one stage needs. tflop: 10^12 operations on a GPU at `utilization` of its peak; 0 for none."""

    name: str
    tflop: float
    utilization: float
    gigabytes: float

    def gpu_hours(self, peak_tflops: float) -> float:
        return self.tflop / (peak_tflops * self.utilization) / SECONDS_PER_HOUR


def protocols(recipe: Recipe, assumed: Assumptions) -> list[Protocol]:
    """The paper's protocol, the recipe's and, where the recipe draws a fixed number, the same with `pairs.adaptive`."""
    settings = recipe.pairs
    at_most = f"{settings.candidates} candidates, {settings.steps} steps"
    per_step = samples_per_step(settings.guidance_scale)
    fixed_pairs = min(assumed.fixed_pairs, settings.max_pairs)
    paper = Protocol("paper: 100 candidates, 100 steps", 100, 100, samples_per_step(PAPER_GUIDANCE), fixed_pairs)
    fixed = Protocol(f"{recipe.name}: {at_most}", settings.candidates, settings.steps, per_step, fixed_pairs)
    adaptive = Protocol(
        f"{recipe.name}, adaptive: at most {at_most}",
        min(assumed.adaptive_candidates, settings.candidates),
        settings.steps,
        per_step,
        min(assumed.adaptive_pairs, settings.max_pairs),
    )
    if settings.adaptive:
        return [paper, adaptive]
    if replace(fixed, name=paper.name) == paper:
        return [replace(paper, name=f"paper, and {fixed.name}"), adaptive]
    return [paper, fixed, adaptive]


def samples_per_step(guidance_scale: tuple[float, float]) -> int:
    """UNet samples of a candidate's two images at one step: a guidance scale of 1 needs no unconditional half."""
    return 2 if guidance_scale == (1.0, 1.0) else 4


def stages(recipe: Recipe, protocol: Protocol, pairs: int, assumed: Assumptions) -> list[Stage]:
    """The five stages that make `pairs` pairs by `protocol`, train on them and evaluate."""
    instructed = pairs / protocol.pairs_per_caption
    captions = instructed / assumed.instruction_share
    texts_gb = captions * TEXT_BYTES / BYTES_PER_GB
    image_gb = recipe.pairs.height * recipe.pairs.width * assumed.png_bytes / BYTES_PER_GB
    return [
        Stage("edit_captions", captions * caption_tflop(assumed), assumed.llm_utilization, texts_gb),
        Stage(
            "generate_pairs",
            instructed * pair_tflop(recipe.pairs, protocol, assumed),
            assumed.unet_utilization,
            pairs * 2 * image_gb + instructed * protocol.candidates * assumed.candidate_bytes / BYTES_PER_GB,
        ),
        Stage("export_dataset", 0.0, 1.0, pairs * 2 * image_gb),
        Stage(
            "train", train_tflop(recipe, pairs, assumed), assumed.train_utilization, train_gb(recipe, pairs, assumed)
        ),
        Stage(
            "evaluate",
            evaluate_tflop(recipe, assumed),
            assumed.unet_utilization,
            sum(edits(recipe)) * recipe.sampling.max_side**2 * assumed.png_bytes / BYTES_PER_GB,
        ),
    ]


def caption_tflop(assumed: Assumptions) -> float:
    """TFLOP to ask for one caption: 2 operations for each parameter and token (Kaplan et al., 2020)."""
    tokens = assumed.prompt_tokens * (1 - assumed.prompt_cached) + assumed.answer_tokens
    return assumed.asked * tokens * 2 * assumed.llm_parameters / 1e12


def pair_tflop(settings: Pairs, protocol: Protocol, assumed: Assumptions) -> float:
    """TFLOP to draw and judge the candidates of one caption pair."""
    area = relative_area(settings.height, settings.width)
    samples = protocol.steps * protocol.samples_per_step
    judged = 2 * (area * assumed.vae_decode_tflop + assumed.clip_tflop)
    return protocol.candidates * (samples * area * assumed.unet_tflop + judged)


def train_tflop(recipe: Recipe, pairs: int, assumed: Assumptions) -> float:
    """TFLOP to encode the pairs once and to train; a step costs three forward passes (backward is two)."""
    area = relative_area(recipe.train.resolution, recipe.train.resolution)
    encoding = pairs * views(recipe, assumed) * 2 * area * assumed.vae_encode_tflop
    return encoding + recipe.train.steps * recipe.train.batch_size * 3 * area * assumed.unet_tflop


def train_gb(recipe: Recipe, pairs: int, assumed: Assumptions) -> float:
    """GB of latents (two of float16 for each view), two checkpoints and the model (float32)."""
    latents = pairs * views(recipe, assumed) * 2 * 4 * (recipe.train.resolution // 8) ** 2 * 2
    weights = assumed.unet_parameters * 4
    checkpoint = 4 * weights  # the weights, their average and AdamW's two moments
    return (latents + 2 * checkpoint + weights) / BYTES_PER_GB


def evaluate_tflop(recipe: Recipe, assumed: Assumptions) -> float:
    """TFLOP to make and judge all edits of the sweep; three conditionings for an editor, two for SDEdit."""
    area = relative_area(recipe.sampling.max_side, recipe.sampling.max_side)
    by_editor, by_sdedit = edits(recipe)
    strengths = recipe.evaluate.sdedit_strengths
    mean_strength = sum(strengths) / len(strengths) if strengths else 0.0
    samples = recipe.sampling.steps * (3 * by_editor + 2 * mean_strength * by_sdedit)
    around = area * (assumed.vae_encode_tflop + assumed.vae_decode_tflop) + assumed.clip_tflop
    return samples * area * assumed.unet_tflop + (by_editor + by_sdedit) * around


def edits(recipe: Recipe) -> tuple[int, int]:
    """How many edits `sweep.plan_edits` plans: by editors, by SDEdit."""
    sweep: Evaluate = recipe.evaluate
    models = (len(EDITORS) if sweep.shipped else 1) + len(sweep.models)
    curves = set(curve_scales(recipe))
    extra = len(curves | set(grid_scales(recipe))) - len(curves)
    by_editor = models * sweep.seeds * (sweep.images * len(curves) + min(sweep.grid_images, sweep.images) * extra)
    return by_editor, len(SDEDITS) * sweep.seeds * sweep.images * len(sweep.sdedit_strengths)


def views(recipe: Recipe, assumed: Assumptions) -> float:
    """Encodings of a pair: its crops, and most of them mirrored as well."""
    return recipe.train.crops * (assumed.views if recipe.train.flip else 1.0)


def relative_area(height: int, width: int) -> float:
    """Pixels as a multiple of 512 x 512."""
    return height * width / 512**2


def gpu_types(assumed: Assumptions) -> dict[str, tuple[float, float]]:
    """(peak TFLOP/s, $ an hour) by type. Raises `UserError` for one of which only one of the two is known."""
    for name in assumed.peak_tflops.keys() ^ assumed.prices.keys():
        missing = "prices" if name in assumed.peak_tflops else "peak_tflops"
        raise UserError(f"{missing}: nothing is said of {name!r}; give it too, e.g. --{missing} '{{\"{name}\": 2.5}}'")
    return {name: (assumed.peak_tflops[name], assumed.prices[name]) for name in assumed.prices}
