"""Requests and answers: OpenAI's image-edit convention with diffusers' names, and our own JSON."""

from typing import Annotated, Literal

from fastapi import UploadFile
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from ip2p.recipe import Solver

MAX_IMAGE_BYTES = 20 * 2**20
MAX_BODY_BYTES = 64 * 2**20
MAX_STEPS = 100
MAX_SCALE = 30
MAX_PROMPT = 2000
MAX_EDITS = 64  # per request
MAX_IMAGES = 16
MAX_SIDE = 4096  # of `size`
LONGEST_DEADLINE = 600  # seconds

Instruction = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_PROMPT)]
NegativePrompt = Annotated[str, StringConstraints(strip_whitespace=True, max_length=MAX_PROMPT)]
Scale = Annotated[float, Field(ge=0, le=MAX_SCALE, allow_inf_nan=False)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Deadline = Annotated[float, Field(gt=0, le=LONGEST_DEADLINE, allow_inf_nan=False)]
OutputFormat = Literal["png", "jpeg", "webp"]
# A PNG of one pixel.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4AWNgYGAAAAAEAAHklIQGAAAAAElFTkSuQmCC"
AskedFormat = Literal["auto", "png", "jpeg", "webp"]
FORMAT = "auto: png for a transparent image and for a PNG of at most 1 megapixel, else jpeg; png and webp are lossless"


def _only(value: str | float, way_out: str) -> AfterValidator:
    """Return a validator that accepts nothing but `value`."""

    def check(given: str | float) -> str | float:
        if given != value:
            raise ValueError(f"{str(given)[:80]!r} is not supported: {way_out}")
        return given

    return AfterValidator(check)


class Settings(BaseModel):
    """Settings of an edit. The recipe has the value of a missing one."""

    guidance_scale: Scale | None = Field(default=None, description="s_T: how strictly to follow the instruction")
    image_guidance_scale: Scale | None = Field(default=None, description="s_I: how closely to keep to the image")
    num_inference_steps: Steps | None = Field(default=None, description="denoising steps")
    negative_prompt: NegativePrompt = Field(default="", description="what to steer the result away from")
    seed: Seed | None = Field(default=None, description="the same seed gives the same image; random if missing")
    solver: Solver | None = Field(default=None, description="the solver of the denoising steps")


class EditForm(Settings):
    """The multipart form of POST /v1/images/edits."""

    model_config = ConfigDict(extra="forbid")

    image: Annotated[list[UploadFile], Field(min_length=1, max_length=MAX_IMAGES)] = Field(
        description="PNG, JPEG or WebP; each of several is edited; also as image[], image[0], …"
    )
    mask: UploadFile | None = Field(default=None, description="not supported; describe the change in the prompt")
    prompt: Instruction = Field(description="the instruction, e.g. 'make it night'; a model reads about 77 tokens")
    n: Annotated[int, Field(ge=1, le=10)] = Field(default=1, description="edits per image; seeds count up")
    size: str = Field(
        default="auto",
        max_length=50,
        description="auto: the size of the image; WxH: the largest of its aspect that fits into it",
    )
    response_format: Literal["b64_json", "png"] = Field(
        default="b64_json", description="b64_json: JSON with the image in base64; png: the PNG itself"
    )
    output_format: AskedFormat = Field(default="auto", description=FORMAT)
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        default=None, description="quality of a jpeg or webp, which is then lossy"
    )
    background: Literal["auto", "opaque"] = Field(
        default="auto", description="auto: transparent where the image is; opaque: white there"
    )
    model: str | None = Field(default=None, max_length=200, description="one of /v1/models")
    deadline_s: Deadline | None = Field(default=None, description="seconds after which the edit is given up")
    # OpenAI's clients may send these. A value that would have no effect is refused.
    quality: Annotated[str, _only("auto", "choose num_inference_steps")] = "auto"
    input_fidelity: Annotated[str, _only("", "choose image_guidance_scale")] = ""
    moderation: Annotated[str, _only("auto", "leave it out")] = "auto"
    stream: Annotated[bool, _only(False, "POST /v1/edits streams")] = False
    partial_images: Annotated[int, _only(0, "see preview_every of POST /v1/edits")] = 0
    user: str = Field(default="", max_length=200, description="accepted from OpenAI's clients, and not used")


class Edit(Settings):
    """One edit of POST /v1/edits."""

    model_config = ConfigDict(extra="forbid")

    instruction: Instruction = Field(description="e.g. 'make it night'")


class EditsRequest(BaseModel):
    """One image and its edits: the body of POST /v1/edits."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "image": "data:image/png;base64," + PIXEL,
                    "edits": [
                        {"instruction": "make it night", "seed": 7},
                        {"instruction": "make it night", "seed": 7, "image_guidance_scale": 2.0},
                    ],
                    "stream": True,
                    "preview_every": 5,
                }
            ]
        },
    )

    image: Annotated[str, Field(min_length=1)] = Field(description="PNG, JPEG or WebP in base64, or as a data: URL")
    edits: Annotated[list[Edit], Field(min_length=1, max_length=MAX_EDITS)] = Field(description="the edits to make")
    output_format: AskedFormat = Field(default="auto", description=FORMAT)
    model: str | None = Field(default=None, max_length=200, description="one of /v1/models")
    stream: bool = Field(default=False, description="answer with server-sent events")
    preview_every: Annotated[int, Field(ge=0, le=MAX_STEPS)] = Field(
        default=0, description="with stream: steps between previews; 0: no previews"
    )
    deadline_s: Deadline | None = Field(default=None, description="seconds after which the edits are given up")


class EditedImage(BaseModel):
    b64_json: str = Field(description="the image in base64")
    output_format: OutputFormat = Field(description="the format of the image")
    seed: int
    edit_id: str = Field(description="for POST /v1/feedback")


class EditResponse(BaseModel):
    """The edited images, and the settings that reproduce them.

    `seed` and `output_format` are the first image's.
    """

    created: int = Field(description="Unix time")
    data: list[EditedImage]
    model: str
    output_format: OutputFormat
    seed: int
    guidance_scale: float
    image_guidance_scale: float
    num_inference_steps: int


class Edited(BaseModel):
    """One edited image of POST /v1/edits, and the settings that reproduce it."""

    edit_id: str = Field(description="for POST /v1/feedback")
    index: int
    instruction: str
    guidance_scale: float
    image_guidance_scale: float
    num_inference_steps: int
    negative_prompt: str
    seed: int
    solver: str
    model: str
    output_format: OutputFormat = Field(description="the format of the image")
    image: str = Field(description="the image in base64")


class EditsResponse(BaseModel):
    created: int = Field(description="Unix time")
    model: str
    edits: list[Edited]


class Feedback(BaseModel):
    """A person's opinion of an edit."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"edit_id": "eNp…", "choice": "up", "comment": "as I meant it"}]},
    )

    edit_id: Annotated[str, Field(min_length=1, max_length=8000)] = Field(
        description="from the answer that holds the edit"
    )
    choice: Literal["up", "down"]
    comment: Annotated[str, StringConstraints(strip_whitespace=True, max_length=MAX_PROMPT)] = ""


class Problem(BaseModel):
    message: str = Field(description="the problem, and what to send instead")
    type: str = "invalid_request_error"
    param: str | None = Field(default=None, description="the field with the problem")


class ErrorResponse(BaseModel):
    error: Problem


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    model: str = Field(description="version of the editor")


class Limits(BaseModel):
    """Limits of a request, beyond which the answer is 400 or 413."""

    max_image_bytes: int = MAX_IMAGE_BYTES
    max_body_bytes: int = MAX_BODY_BYTES
    max_pixels: int
    max_steps: int = MAX_STEPS
    max_scale: float = MAX_SCALE
    max_prompt: int = MAX_PROMPT
    max_edits: int = MAX_EDITS
    max_images: int = MAX_IMAGES


class Defaults(BaseModel):
    """Values of the fields that a request leaves out, and the limits. The page starts with them."""

    model: str
    guidance_scale: float
    image_guidance_scale: float
    num_inference_steps: int
    solver: str
    limits: Limits


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ip2p"
    share: float = Field(description="share of the requests that name no model")


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
