"""What the endpoint takes and gives: OpenAI's images-edit convention, with diffusers' names for the two scales."""

from typing import Annotated, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_IMAGE_BYTES = 20 * 2**20
MAX_STEPS = 100
MAX_SCALE = 30

Instruction = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]
Scale = Annotated[float, Field(ge=0, le=MAX_SCALE, allow_inf_nan=False)]


class EditForm(BaseModel):
    """The multipart form of POST /v1/images/edits. Fields that are left out have the recipe's values."""

    model_config = ConfigDict(extra="ignore")  # OpenAI's clients may send further fields

    image: UploadFile = Field(description="PNG, JPEG, WebP, GIF, BMP or TIFF; the result has its size")
    prompt: Instruction = Field(description="the instruction, e.g. 'make it night'")
    guidance_scale: Scale | None = Field(default=None, description="s_T: how strictly the instruction is followed")
    image_guidance_scale: Scale | None = Field(default=None, description="s_I: how closely the image is kept")
    num_inference_steps: int | None = Field(default=None, ge=1, le=MAX_STEPS, description="denoising steps")
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="the same seed gives the same image")
    response_format: Literal["b64_json", "png"] = Field(
        default="b64_json", description="b64_json: JSON with the PNG in base64; png: the PNG itself"
    )


class EditedImage(BaseModel):
    b64_json: str = Field(description="PNG in base64")


class EditResponse(BaseModel):
    """The edited image, and what makes it again."""

    created: int = Field(description="Unix time")
    data: list[EditedImage]
    seed: int
    guidance_scale: float
    image_guidance_scale: float
    num_inference_steps: int


class Problem(BaseModel):
    message: str = Field(description="what is wrong, and what to send instead")
    type: str = "invalid_request_error"
    param: str | None = Field(default=None, description="the field that is wrong")


class ErrorResponse(BaseModel):
    error: Problem


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    model: str = Field(description="which editor is served")


class Defaults(BaseModel):
    """What the page starts with."""

    model: str
    guidance_scale: float
    image_guidance_scale: float
    num_inference_steps: int
