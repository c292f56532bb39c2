"""What the endpoints take and give: OpenAI's images-edit convention with diffusers' names, and our own JSON."""

from typing import Annotated, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ip2p.recipe import Solver

MAX_IMAGE_BYTES = 20 * 2**20
MAX_BODY_BYTES = 64 * 2**20
MAX_STEPS = 100
MAX_SCALE = 30
MAX_PROMPT = 2000
MAX_EDITS = 64  # of one request
MAX_IMAGES = 16
MAX_SIDE = 4096  # of `size`
LONGEST_DEADLINE = 600

Instruction = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_PROMPT)]
NegativePrompt = Annotated[str, StringConstraints(strip_whitespace=True, max_length=MAX_PROMPT)]
Scale = Annotated[float, Field(ge=0, le=MAX_SCALE, allow_inf_nan=False)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Deadline = Annotated[float, Field(gt=0, le=LONGEST_DEADLINE, allow_inf_nan=False)]
OutputFormat = Literal["png", "jpeg", "webp"]


class Settings(BaseModel):
    """How an edit is made. What is left out has the recipe's value."""

    guidance_scale: Scale | None = Field(default=None, description="s_T: how strictly the instruction is followed")
    image_guidance_scale: Scale | None = Field(default=None, description="s_I: how closely the image is kept")
    num_inference_steps: Steps | None = Field(default=None, description="denoising steps")
    negative_prompt: NegativePrompt = Field(default="", description="what the result is led away from")
    seed: Seed | None = Field(default=None, description="the same seed gives the same image; left out: drawn")
    solver: Solver | None = Field(default=None, description="how a denoising step is taken")


class EditForm(Settings):
    """The multipart form of POST /v1/images/edits."""

    model_config = ConfigDict(extra="ignore")  # OpenAI's clients may send further fields

    image: list[UploadFile] = Field(default=[], description="PNG, JPEG or WebP; of several each is edited")
    images: list[UploadFile] = Field(default=[], alias="image[]", description="the same, as some clients name them")
    mask: UploadFile | None = Field(default=None, description="not supported: the instruction says what changes")
    prompt: Instruction = Field(description="the instruction, e.g. 'make it night'")
    n: Annotated[int, Field(ge=1, le=10)] = Field(default=1, description="edits of each image; seeds count up")
    size: str = Field(
        default="auto",
        max_length=50,
        description="auto: the image's own; WxH: the largest of its aspect that fits into it",
    )
    response_format: Literal["b64_json", "png"] = Field(
        default="b64_json", description="b64_json: JSON with the image in base64; png: the PNG itself"
    )
    output_format: OutputFormat = Field(default="png", description="of the image in base64")
    model: str | None = Field(default=None, max_length=200, description="one of /v1/models")
    deadline_s: Deadline | None = Field(default=None, description="seconds after which the edit is of no use")


class Edit(Settings):
    """One edit of POST /v1/edits."""

    model_config = ConfigDict(extra="forbid")

    instruction: Instruction = Field(description="e.g. 'make it night'")


class EditsRequest(BaseModel):
    """One image and what is to be made of it: the body of POST /v1/edits."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "image": "data:image/png;base64,iVBORw0KGgo…",
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
    edits: Annotated[list[Edit], Field(min_length=1, max_length=MAX_EDITS)] = Field(description="one or several")
    output_format: OutputFormat = Field(default="png", description="of the images in the answer")
    model: str | None = Field(default=None, max_length=200, description="one of /v1/models")
    stream: bool = Field(default=False, description="answer by server-sent events as the edits move on")
    preview_every: Annotated[int, Field(ge=0, le=MAX_STEPS)] = Field(
        default=0, description="with stream: steps between previews of what an edit will be; 0: none"
    )
    deadline_s: Deadline | None = Field(default=None, description="seconds after which the edits are of no use")


class EditedImage(BaseModel):
    b64_json: str = Field(description="the image in base64")
    seed: int
    edit_id: str = Field(description="for POST /v1/feedback")


class EditResponse(BaseModel):
    """The edited images, and what makes them again. `seed` is the first image's, the next ones' count up."""

    created: int = Field(description="Unix time")
    data: list[EditedImage]
    model: str
    output_format: OutputFormat
    seed: int
    guidance_scale: float
    image_guidance_scale: float
    num_inference_steps: int


class Edited(BaseModel):
    """One edited image of POST /v1/edits, and what makes it again."""

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
    image: str = Field(description="in base64")


class EditsResponse(BaseModel):
    created: int = Field(description="Unix time")
    model: str
    edits: list[Edited]


class Feedback(BaseModel):
    """What a person thinks of an edit."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"edit_id": "eNp…", "choice": "up", "comment": "as I meant it"}]},
    )

    edit_id: Annotated[str, Field(min_length=1, max_length=8000)] = Field(description="as the edit was answered with")
    choice: Literal["up", "down"]
    comment: Annotated[str, StringConstraints(strip_whitespace=True, max_length=MAX_PROMPT)] = ""


class Problem(BaseModel):
    message: str = Field(description="what is wrong, and what to send instead")
    type: str = "invalid_request_error"
    param: str | None = Field(default=None, description="the field that is wrong")


class ErrorResponse(BaseModel):
    error: Problem


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    model: str = Field(description="which editor is served")


class Limits(BaseModel):
    """What is answered with 400 or 413 beyond."""

    max_image_bytes: int = MAX_IMAGE_BYTES
    max_body_bytes: int = MAX_BODY_BYTES
    max_pixels: int
    max_steps: int = MAX_STEPS
    max_scale: float = MAX_SCALE
    max_prompt: int = MAX_PROMPT
    max_edits: int = MAX_EDITS
    max_images: int = MAX_IMAGES


class Defaults(BaseModel):
    """What the page starts with: the values of fields that a request leaves out, and the limits."""

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
    share: float = Field(description="of the requests that name no model")


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
