"""A recipe describes one experiment: which models, which data, how every stage runs.

One strict schema. A recipe file holds what differs from the defaults; any key can be overridden on the command line
by its dotted path (`--pairs.candidates 8`). Whatever is wrong is refused here, before Ray starts, naming the key, the
value and what is allowed.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from ip2p.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
LOCAL_CLIP = "local-dir:"


def _refuse(message: str) -> NoReturn:
    raise UserError(message)


def _read_flag(value: object) -> object:
    """On the command line everything is text: `true` and `0.9` are meant as in a file."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _rising(bounds: Any) -> Any:
    return bounds if bounds[0] <= bounds[1] else _refuse(f"a range is (low, high) with low <= high, not {bounds}")


Range = Annotated[tuple[float, float], AfterValidator(_rising)]
Pixels = Annotated[
    int,
    Field(gt=0),
    AfterValidator(
        lambda n: n if n % 8 == 0 else _refuse(f"image sides are multiples of 8, not {n}: e.g. {n // 8 * 8 or 8}")
    ),
]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Workers = Annotated[
    Positive | tuple[Positive, Positive],
    BeforeValidator(lambda v: v[0] if isinstance(v, list) and len(v) == 1 else v),  # the command line reads 2 as [2]
    AfterValidator(
        lambda v: v if isinstance(v, int) or v[0] <= v[1] else _refuse(f"workers: fewest,most, not {v[0]},{v[1]}")
    ),
]
Solver = Literal["euler_ancestral", "euler", "ddim", "dpmsolver++"]
Precision = Literal["float32", "float16", "bfloat16"]


# Every key of a recipe is declared by one of these three functions.


def what(default: Any = ..., **field: Any) -> Any:
    """Declare a key that decides what is made: a stage that was started with another value is refused."""
    return Field(default, json_schema_extra={"decides": "what"}, **field)


def how(default: Any = ..., **field: Any) -> Any:
    """Declare a key that decides how fast or where: a stage resumes with any value."""
    return Field(default, json_schema_extra={"decides": "how"}, **field)


def how_much(default: Any = ..., **field: Any) -> Any:
    """Declare a key that decides how much is made: a complete stage is extended when the value grows."""
    return Field(default, json_schema_extra={"decides": "how_much"}, **field)


SECRET_WORDS = {"token", "key", "secret", "password", "credential", "credentials"}  # not max_num_batched_tokens


def _no_userinfo(address: str) -> str:
    if "@" in urlsplit(address).netloc:
        raise UserError(
            "the address holds credentials, and recipes are printed and kept; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD instead"
        )
    return address


def _no_secrets(arguments: dict[str, Any]) -> dict[str, Any]:
    if secret := [name for name in arguments if SECRET_WORDS & set(name.lower().split("_"))]:
        raise UserError(
            f"{secret[0]}: recipes are printed and kept, so they may hold no secrets; set the library's environment "
            "variable instead, e.g. HF_TOKEN"
        )
    return arguments


EngineArguments = Annotated[
    dict[str, Annotated[int | float | str | bool, BeforeValidator(_read_flag)]], AfterValidator(_no_secrets)
]


class Section(BaseModel):
    """Strict: an unknown key is an error that names it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class ModelRef(Section):
    """Where a model comes from: a hub id with a revision, or a local directory."""

    path: str = what(description="hub id, or directory: absolute, or looked up here and then in the repository")
    revision: str | None = what(default=None, description="hub commit or tag; pin it, so that a rerun is the same run")
    dtype: Precision = what(default="float32", description="number format of the weights")


class ClipRef(Section):
    """An open_clip model: `name` as open_clip lists it with `pretrained`, or `local-dir:<directory>`."""

    name: str = what(description="open_clip architecture (ViT-L-14) or local-dir:<directory>")
    pretrained: str | None = what(default=None, description="open_clip weights tag, e.g. openai")
    dtype: Precision = what(default="float32", description="number format of the weights")

    @model_validator(mode="after")
    def _weights_are_named_once(self):
        if self.name.startswith(LOCAL_CLIP) and self.pretrained is not None:
            raise UserError(f"{self.name!r} brings its own weights: leave out pretrained ({self.pretrained!r})")
        if not self.name.startswith(LOCAL_CLIP) and self.pretrained is None:
            raise UserError(f"{self.name!r} needs pretrained, a weights tag, e.g. openai")
        return self


class Models(Section):
    """The models of all stages."""

    text_to_image: ModelRef = what(description="a diffusers StableDiffusionPipeline")
    vae: ModelRef | None = what(default=None, description="another AutoencoderKL than the pipeline's own")
    clip: ClipRef = what(description="judges the pairs")
    dino: ModelRef | None = what(
        default=None,
        description="a vision transformer (DINO) that transformers loads, for jobs.evaluate_benchmark; null: no such "
        "metric",
    )
    llm: ModelRef = what(description="a causal language model that vLLM loads")
    editor: ModelRef = what(description="the trained editor that is served when a workspace has none")


class GrammarCaptions(Section):
    """Captions drawn from the miniature world's scene grammar."""

    kind: Literal["grammar"] = what(default="grammar", description="grammar, files or hub; the recipe file says which")
    count: Positive = how_much(default=200, description="how many captions to draw")
    kinds: list[str] | None = what(default=None, description="edit kinds the scenes must allow; default: all, balanced")
    say_places: bool = what(default=True, description="false: no caption says where things are; attention sharing must")


NearDuplicate = Annotated[float, Field(gt=0, le=1)]
NEAR_DUPLICATES = "drop captions whose bigram Jaccard similarity to an earlier one is at least this; 1 disables"


class FileCaptions(Section):
    """Captions from a parquet, JSONL or CSV file, or a folder of one of these."""

    kind: Literal["files"] = what(default="files", description="grammar, files or hub; the recipe file says which")
    path: str = what(description="file or folder (.parquet, .jsonl, .csv), local, s3:// or gs://; or a hub dataset")
    column: str = what(default="caption", description="the column that holds the caption, e.g. TEXT")
    limit: Positive | None = how_much(default=None, description="read only the first so many rows")
    near_duplicates: NearDuplicate = what(default=0.9, description=NEAR_DUPLICATES)


class HubCaptions(Section):
    """Captions from a dataset of the hub, streamed."""

    kind: Literal["hub"] = what(default="hub", description="grammar, files or hub; the recipe file says which")
    path: str = what(description="owner/name of the dataset, or a directory that datasets.load_dataset reads")
    revision: str | None = what(default=None, description="hub commit or tag; pin it, so that a rerun is the same run")
    split: str = what(default="train", description="split of the dataset")
    column: str = what(default="caption", description="the column that holds the caption, e.g. TEXT")
    limit: Positive | None = how_much(default=None, description="read only the first so many rows")
    near_duplicates: NearDuplicate = what(default=0.9, description=NEAR_DUPLICATES)


class Unsafe(Section):
    """Texts that must not become pictures."""

    score: Annotated[float, Field(gt=0, le=1)] = what(
        default=0.8,
        description="of alt-profanity-check's classifier, from which on a text is rejected; none of 567 of ours has it",
    )
    words: list[str] | None = what(
        default=None, description="whole words that are enough, in the plural too; null: those of captions/safety.py"
    )


class Instructions(Section):
    """Stage 1: the language model writes an instruction and an edited caption for each caption."""

    prompt: Literal["tuned", "few_shot"] = what(
        default="tuned",
        description="tuned: the model was trained on triplets; few_shot: an instruct model sees exemplars",
    )
    temperature: Annotated[float, Field(ge=0)] = what(default=0.7, description="0: the likeliest word; 1: as trained")
    top_p: Annotated[float, Field(gt=0, le=1)] = what(
        default=1.0, description="sample from the likeliest words of this mass; little of it leaves out rare wordings"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] = what(
        default=0.0,
        description="sample only words at least this share as likely as the likeliest: where the model is certain, "
        "nothing else; where it is not, rare wordings too (Nguyen et al., 2024)",
    )
    max_tokens: Positive = what(default=128, description="an answer that is longer is cut, and rejected")
    max_caption_words: Positive = what(
        default=60, description="longer captions are rejected before the model sees them"
    )
    attempts: Positive = what(
        default=1,
        description="times that a caption is asked, each with another seed, until an answer passes the checks",
    )
    quotas: dict[str, Annotated[float, Field(gt=0, le=1)]] = what(
        default_factory=dict,
        description="largest share of a batch's captions for an edit type, e.g. {time: 0.1}; the rest are asked again",
    )
    unsafe: Unsafe | None = what(
        default_factory=Unsafe, description="texts that must not become pictures; null: all may"
    )
    same_meaning: Annotated[float, Field(gt=0, le=1)] | None = what(
        default=None, description="CLIP similarity of the two captions from which on only the words differ; null: any"
    )
    batch_size: Positive = how(default=64, description="captions handed to an engine at a time")
    replicas: Positive = how(default=1, description="vLLM engines")
    max_model_len: Positive = how(default=512, description="tokens of prompt and answer together")
    engine: EngineArguments = how(
        default_factory=dict, description="further vLLM engine arguments, e.g. gpu_memory_utilization: 0.9"
    )

    @model_validator(mode="after")
    def _answers_fit(self):
        if self.max_tokens >= self.max_model_len:
            raise UserError(
                f"max_tokens {self.max_tokens} must be less than max_model_len {self.max_model_len}: prompts need room"
            )
        return self


class Tune(Section):
    """Teach `models.llm` to answer captions with edits by triplets (paper, 3.1.1); `language_model/` is the result."""

    triplets: str | None = how(
        default=None,
        description="JSONL of caption (or input), instruction (or edit), edited_caption (or output) and perhaps "
        "edit_type; null: ours, or drawn by the miniature's grammar with truth: oracle",
    )
    count: Positive = what(default=400, description="triplets that are drawn, of captions.kinds")
    lora_rank: Positive | None = what(
        default=16, description="rank of the adapter (LoRA) that learns; null: all weights"
    )
    epochs: Positive = what(default=3, description="times that each triplet is seen")
    batch_size: Positive = what(default=16, description="triplets in one step of each worker")
    learning_rate: Annotated[float, Field(gt=0)] = what(default=2e-4, description="falls to 0, linearly")
    validation_fraction: Fraction = what(default=0.1, description="share of the triplets that is held out")
    workers: Positive = how(default=1, description="training processes, one GPU each where there are GPUs")


SharingMode = Literal["self", "replace", "refine"]


class LocalBlend(Section):
    """Keep the source where the words that differ do not look (Prompt-to-Prompt's local editing); writes masks."""

    threshold: Fraction = what(
        default=0.3, description="share of the attention map's maximum from which on a place may change"
    )
    start: Fraction = what(default=0.2, description="share of the steps before the maps are trusted")


class Sharing(Section):
    """What the edited image takes over from the source's attention while step / (steps - 1) < multiplier * p.

    self: the maps of self-attention (upstream). replace: cross-attention too, each word that of the word in its place
    (Prompt-to-Prompt); for captions that differ word for word. refine: cross-attention too, for the words in common.
    """

    modes: Annotated[list[SharingMode], Field(min_length=1)] = what(
        default=["self"], description="tried in this order: the first that a caption pair allows"
    )
    self_attention: Annotated[float, Field(ge=0)] = what(
        default=1.0, description="multiplier for self-attention; 0: never"
    )
    cross_attention: Annotated[float, Field(ge=0)] = what(
        default=1.0, description="multiplier for cross-attention, in the modes replace and refine; 0: never"
    )
    emphasis: Annotated[float, Field(gt=0)] = what(
        default=1.0,
        description="factor on the cross-attention to words of the edited caption alone, while it is shared (reweight)",
    )
    blend: LocalBlend | None = what(
        default=None, description="change only what the words that differ look at, and write its mask; null: anything"
    )

    @model_validator(mode="after")
    def _some_mode_applies(self):
        if self.modes[-1] == "replace":
            raise UserError("modes must end with self or refine: replace does not apply to all caption pairs")
        if self.emphasis != 1 and "self" in self.modes:
            raise UserError("emphasis is for the modes replace and refine: self leaves cross-attention alone")
        return self


class Thresholds(Section):
    """CLIP filter (InstructPix2Pix, section 3.1.2 and upstream's code): cosines on normalised embeddings."""

    image: float = what(default=0.7, description="cos(I0, I1): the two images still resemble each other")
    image_max: float = what(default=1.0, description="cos(I0, I1) at most: above it nothing was changed")
    direction: float = what(default=0.2, description="cos(I1 - I0, T1 - T0): the images differ as the captions do")
    agreement: float = what(default=0.2, description="cos(Ii, Ti) for both images")

    @model_validator(mode="after")
    def _something_passes(self):
        if self.image > self.image_max:
            raise UserError(f"image {self.image:g} must be <= image_max {self.image_max:g}: nothing could pass")
        return self


class Quality(Section):
    """Accept and rank by the chance that a pair is right, sigmoid(intercept + weights . similarities).

    Which similarities tell right from wrong, and how well, belongs to a CLIP model: `python -m jobs.calibrate` finds
    the weights where truth is known.
    """

    intercept: float = what(description="of the logistic regression")
    image: float = what(description="weight of cos(I0, I1)")
    direction: float = what(description="weight of cos(I1 - I0, T1 - T0)")
    agreement_before: float = what(description="weight of cos(I0, T0)")
    agreement_after: float = what(description="weight of cos(I1, T1)")
    at_least: Fraction = what(description="the chance from which on a pair is accepted")


class Adaptive(Section):
    """Draw candidates in rounds; stop when max_pairs are accepted, or when the caption pair will hardly yield more."""

    round: Positive = what(default=2, description="candidates drawn at a time for a caption pair")
    give_up_below: Fraction = what(
        default=0.1, description="acceptance rate to be expected of further candidates below which they are not drawn"
    )
    follow_fraction: bool = what(
        default=True, description="draw p nearer to those that were accepted for the caption pair than to the others"
    )


class EarlyLook(Section):
    """Look at the predicted images part-way, and drop candidates that will hardly be accepted. Needs `quality`."""

    at: Annotated[float, Field(gt=0, lt=1)] = what(default=0.5, description="share of the steps after which to look")
    drop_below: Fraction = what(description="quality of the images predicted then below which a candidate is dropped")


class Pairs(Section):
    """Stage 2: Stable Diffusion with Prompt-to-Prompt draws candidate pairs; CLIP keeps the good ones."""

    candidates: Positive = what(default=100, description="candidates drawn for each caption pair, or at most")
    adaptive: Adaptive | None = what(
        default=None, description="draw no more candidates than are needed; null: always all, the paper's protocol"
    )
    early_look: EarlyLook | None = what(default=None, description="drop hopeless candidates part-way; null: never")
    max_pairs: Positive = what(default=4, description="accepted pairs kept for each caption pair, the best first")
    steps: Positive = what(default=100, description="denoising steps")
    solver: Solver = what(default="euler_ancestral", description="how a denoising step is taken")
    guidance_scale: Range = what(default=(7.5, 15.0), description="drawn uniformly for each candidate")
    shared_attention_fraction: Range = what(default=(0.1, 0.9), description="p, drawn uniformly for each candidate")
    sharing: Sharing = Sharing()
    thresholds: Thresholds = Thresholds()
    quality: Quality | None = what(
        default=None,
        description="judge by all similarities together; null: by the thresholds, best direction first, as upstream",
    )
    height: Pixels = what(default=512, description="of the images, in pixels")
    width: Pixels = what(default=512, description="of the images, in pixels")
    batch_size: Positive = how(default=4, description="candidates (pairs of trajectories) that share one UNet call")
    replicas: Positive = how(default=1, description="PairGenerator actors")
    rows_per_block: Positive = how(
        default=8, description="captions that a worker takes at a time: what the loss of a worker can cost"
    )
    keep_rejects: Fraction = how(
        default=0.01, description="share of captions of which rejected candidates are kept, up to max_pairs, to look at"
    )

    @model_validator(mode="after")
    def _early_look_has_a_measure(self):
        if self.early_look and not self.quality:
            raise UserError("early_look compares pairs.quality, and there is none: set it, or leave early_look out")
        return self


class Dataset(Section):
    """Stage 3: accepted pairs become a dataset with the published columns, split by caption id."""

    validation_fraction: Fraction = what(default=0.1, description="share of the captions whose pairs go to validation")
    test_fraction: Fraction = what(default=0.0, description="share of the captions whose pairs go to test")

    @model_validator(mode="after")
    def _something_is_left(self):
        if self.validation_fraction + self.test_fraction >= 1:
            raise UserError(
                f"validation_fraction {self.validation_fraction:g} + test_fraction {self.test_fraction:g} must be < 1: "
                "nothing is left to train on"
            )
        return self


class MLflow(Section):
    """Where MLflow keeps its runs."""

    tracking_uri: Annotated[str, AfterValidator(_no_userinfo)] = how(
        description="http(s)://… of a server; a folder that all machines see with MLFLOW_ALLOW_FILE_STORE=true"
    )
    experiment: str = how(default="ip2p", description="the experiment that the runs belong to; made if need be")


class Train(Section):
    """Stage 4: fine-tune the UNet to follow instructions."""

    base: ModelRef | None = what(default=None, description="what to start from; default: models.text_to_image")
    dataset: str | None = how(
        default=None,
        description="folder of parquet files with original_image, edit_prompt and edited_image, e.g. those of "
        "timbrooks/instructpix2pix-clip-filtered; default: the workspace's dataset/",
    )
    fraction: Annotated[float, Field(gt=0, le=1)] = what(
        default=1.0, description="share of the captions that is trained on, chosen by the seed; the paper tries .1, .01"
    )
    steps: Positive = how_much(default=1000, description="optimiser steps")
    batch_size: Positive = what(default=32, description="samples per step over all workers")
    learning_rate: Annotated[float, Field(gt=0)] = what(default=1e-4, description="of AdamW, after the warm-up")
    warmup_steps: Annotated[int, Field(ge=0)] = what(
        default=0, description="the learning rate rises linearly over so many steps"
    )
    cooldown_steps: Annotated[int, Field(ge=0)] = what(
        default=0, description="the learning rate falls linearly to 0 over the last so many steps"
    )
    weight_decay: Annotated[float, Field(ge=0)] = what(default=1e-2, description="of AdamW")
    max_grad_norm: Annotated[float, Field(gt=0)] = what(
        default=1.0, description="longer gradients are cut to this norm"
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = what(
        default=0.9999, description="of the averaged weights that are kept"
    )
    micro_batch: Positive | None = how(
        default=None,
        description="samples that a worker passes through the UNet at a time; gradients add up over its share of the "
        "step; null: all at once",
    )
    gradient_checkpointing: bool = how(
        default=False, description="compute activations again instead of keeping them: less memory, more time"
    )
    lora_rank: Positive | None = what(
        default=None,
        description="train an adapter of this rank (LoRA) on the attention layers, and the first convolution, instead "
        "of the whole UNet; the exported model has it merged",
    )
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = what(
        default=None, description="weigh timesteps by min(SNR, gamma) (Hang et al., 2023; 5 there); null: all alike"
    )
    one_per_caption: bool = what(
        default=False, description="an epoch has one pair of each caption, drawn anew, as upstream; false: all pairs"
    )
    resolution: Pixels = what(default=256, description="side of the training images, in pixels")
    random_resize: Range | None = what(
        default=None,
        description="shorter side of the resized images, drawn uniformly, of which a square of `resolution` is cut at "
        "a random place (256,288 upstream); null: resized to `resolution`, the centre",
    )
    crops: Positive = what(default=1, description="squares of each pair that are encoded, with `random_resize`")
    drop_text: Fraction = what(default=0.05, description="share of samples that lose the instruction alone")
    drop_image: Fraction = what(default=0.05, description="share of samples that lose the image alone")
    drop_both: Fraction = what(default=0.05, description="share of samples that lose both")
    flip: bool = what(default=True, description="mirror pairs, half of the time, whose texts name no side")
    precision: Precision = what(
        default="float32", description="number format of the forward pass; the weights stay float32"
    )
    workers: Workers = how(
        default=1,
        description="training processes, one GPU each where there are GPUs; 2,8: as many of 2 to 8 as fit, now "
        "and whenever a machine is lost or comes",
    )
    parallel: Literal["ddp", "fsdp"] = how(
        default="ddp",
        description="ddp: each worker holds the UNet; fsdp: its share of weights, gradients and AdamW's state (FSDP2)",
    )
    compile: bool = how(default=False, description="torch.compile the UNet's step; on GPUs alone")
    checkpoint_every: Positive = how(default=500, description="steps between checkpoints: what a crash can cost")
    keep: Positive = how(
        default=2, description="checkpoints that are kept: the last one, and the best by the loss on held-out pairs"
    )
    export: Literal["last", "best"] = what(default="last", description="which checkpoint becomes the model")
    pictures: Annotated[int, Field(ge=0)] = how(
        default=4, description="held-out pairs that are edited at every checkpoint, to be looked at"
    )
    mlflow: MLflow | None = how(
        default=None, description="report to MLflow as well: metrics, pictures, and the recipe as parameters"
    )
    encode_replicas: Positive = how(default=1, description="actors that encode latents and texts ahead of training")

    @model_validator(mode="after")
    def _dropout_is_a_partition(self):
        total = self.drop_text + self.drop_image + self.drop_both
        if total > 1:
            raise UserError(
                f"drop_text + drop_image + drop_both must be <= 1, not {total:g}: one draw picks one of them"
            )
        return self

    @model_validator(mode="after")
    def _every_worker_has_samples(self):
        fewest, most = self.worker_range
        if self.batch_size < most:
            raise UserError(f"batch_size {self.batch_size} must be at least workers {most}: one sample each")
        if self.parallel == "fsdp" and any(self.batch_size % n for n in range(fewest, most + 1)):
            raise UserError(
                f"batch_size {self.batch_size} must be a multiple of workers {self.workers} with parallel: fsdp, whose "
                "workers take every step together"
            )
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)

    @model_validator(mode="after")
    def _crops_fit(self):
        if self.random_resize and self.random_resize[0] < self.resolution:
            raise UserError(
                f"random_resize begins at {self.random_resize[0]:g}, below resolution {self.resolution}: squares of "
                "that side could not be cut"
            )
        if self.crops > 1 and not self.random_resize:
            raise UserError(f"crops {self.crops} would all be the same without random_resize")
        return self


class Sampling(Section):
    """How the editor turns noise into an image."""

    steps: Positive = what(default=20, description="denoising steps")
    solver: Solver = what(default="euler_ancestral", description="how a denoising step is taken")
    guidance_scale: float = what(default=7.5, description="s_T of the paper: follow the instruction")
    image_guidance_scale: float = what(default=1.5, description="s_I of the paper: stay close to the image")
    max_side: Pixels = what(default=512, description="the longer side of what the model sees, in pixels")


class OtherEditor(Section):
    """An editor to evaluate beside those of the run and the recipe: a model, or what another run has trained."""

    path: str | None = what(default=None, description="hub id, or directory as diffusers saves an editor")
    workspace: str | None = what(default=None, description="folder of a run that has trained one, local or s3://...")
    revision: str | None = what(default=None, description="hub commit or tag; pin it, so that a rerun is the same run")
    dtype: Precision = what(default="float32", description="number format of the weights")

    @model_validator(mode="after")
    def _is_one(self):
        if (self.path is None) == (self.workspace is None):
            raise UserError("give path or workspace, one of them")
        return self


class ChosenImage(Section):
    """An image of yours, edited at every pair of the two scales (the paper's figure of Michelangelo's David)."""

    image: str = what(description="PNG, JPEG, WebP, ...: local or s3://...")
    instruction: str = what(description="what to do, e.g. turn him into a cyborg")


class Judge(Section):
    """A vision-language model that looks at every edit of the sweep and gives marks from 1 to 5, and says why."""

    model: ModelRef = what(description="a vision-language model that vLLM loads, with a chat template")
    max_tokens: Positive = what(default=512, description="a longer answer is cut, and the edit has no marks")
    max_model_len: Positive = how(default=8192, description="tokens of two images, the question and the answer")
    batch_size: Positive = how(default=32, description="edits handed to an engine at a time")
    replicas: Positive = how(default=1, description="vLLM engines")
    engine: EngineArguments = how(
        default_factory=dict, description="further vLLM engine arguments, e.g. gpu_memory_utilization: 0.9"
    )


class Evaluate(Section):
    """Stage 5: the two guidance scales swept over a held-out set; CLIP similarities, and truth where there is any."""

    images: Positive = what(default=64, description="test pairs")
    kinds: list[str] | None = what(
        default=None, description="with truth: oracle, kinds of edit to test, in turn; null: all there are"
    )
    seeds: Positive = what(default=1, description="edits per test pair and setting")
    guidance_scale: Annotated[list[float], Field(min_length=1)] = what(
        default=[2.0, 4.0, 7.5, 10.0], description="s_T swept"
    )
    image_guidance_scale: Annotated[list[float], Field(min_length=1)] = what(
        default=[1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2], description="s_I swept"
    )
    fixed_guidance_scale: float = what(default=7.5, description="s_T while s_I is swept")
    fixed_image_guidance_scale: float = what(default=1.5, description="s_I while s_T is swept")
    sdedit_strengths: list[Annotated[float, Field(gt=0, le=1)]] = what(
        default=[0.3, 0.5, 0.7, 0.9], description="of the SDEdit baseline: 0 keeps the image, 1 starts from noise"
    )
    grid_images: Positive = what(default=3, description="test images that are edited at every pair of the two scales")
    chosen: ChosenImage | None = what(
        default=None, description="an image of yours to show at every pair of the two scales as well; null: none"
    )
    shipped: bool = what(default=True, description="evaluate models.editor beside the editor of this run")
    models: dict[str, OtherEditor] = what(
        default_factory=dict, description="further editors by name, e.g. {ten_percent: {workspace: s3://bucket/ten}}"
    )
    judge: Judge | None = what(
        default=None, description="a vision-language model that marks every edit of the sweep; null: none"
    )
    pair_captions: Positive = what(
        default=40, description="captions whose pairs are made again and judged, where truth is known"
    )
    pair_candidates: Positive = what(
        default=6, description="candidates of each of them, with and without attention sharing"
    )
    batch_size: Positive = how(default=16, description="edits that share one UNet call")
    replicas: Positive = how(default=1, description="Editor actors")


# A folder below versions/, and nothing outside of it.
Version = Annotated[str, StringConstraints(pattern=r"^[\w-][\w.-]*$")]


class Canary(Section):
    """A second editor that gets a share of the edits, to be watched before it is served to all."""

    version: Version = how(description="as serve.version")
    share: Fraction = how(default=0.1, description="of the edits that name no model")


class Serve(Section):
    """The endpoint. Limits hold for each ingress."""

    version: Version | None = how(
        default=None,
        description="which editor: workspace (its model/), shipped, or a folder of the workspace's versions/; null: "
        "the workspace's where it has been trained, else the shipped one",
    )
    canary: Canary | None = how(default=None, description="a second version; also chosen by x-model-version")
    replicas: Annotated[tuple[Annotated[int, Field(ge=0)], Positive], AfterValidator(_rising)] = how(
        default=(1, 1), description="fewest and most engines; fewest 0: none while nobody asks"
    )
    ingresses: Positive = how(default=2, description="processes that read requests and ask the engines")
    batch_size: Positive = how(default=8, description="edits in one UNet call")
    queue: Positive = how(
        default=128,
        description="work that waits or is on its way, in edits of 20 steps at full size; more is answered with 429",
    )
    max_pixels: Positive = how(default=25_000_000, description="larger images are refused before they are decoded")
    upload_s: Annotated[float, Field(gt=0)] = how(default=30, description="seconds that a request may take to arrive")


class Recipe(Section):
    """One experiment."""

    name: str = how(description="of the experiment")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = what(default=0, description="all seeds derive from it")
    device: Literal["auto", "cpu", "cuda"] = how(default="auto", description="auto: cuda where there is one")
    truth: Literal["oracle", "none"] = what(
        default="none", description="oracle: the images are miniature scenes and can be read back exactly"
    )
    max_failed: Fraction = how(
        default=0.1, description="share of a stage's rows that may fail; with more it ends without success"
    )
    models: Models
    captions: Annotated[GrammarCaptions | FileCaptions | HubCaptions, Field(discriminator="kind")]
    tune: Tune = Tune()
    instructions: Instructions = Instructions()
    pairs: Pairs = Pairs()
    dataset: Dataset = Dataset()
    train: Train = Train()
    sampling: Sampling = Sampling()
    evaluate: Evaluate = Evaluate()
    serve: Serve = Serve()


def locate(path: str, key: str = "path") -> str:
    """The directory that `path` names, absolute; or `path` itself when it is a hub id.

    A relative path is looked up in the current directory and then in the repository, so that a recipe means the same
    on a cluster. Raises `UserError`, naming `key`, when `path` is neither.
    """
    try:
        given = Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}: {path!r}: there is no such user; write the whole path") from error
    for folder in (Path.cwd(), REPOSITORY):
        if path.strip() and (folder / given).is_dir():
            return str((folder / given).resolve())
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        return path
    raise UserError(
        f"{key}: there is no directory {path!r} here or in the repository, and it is no hub id (owner/name)"
    )
