"""Edit one image as an instruction says: python -m jobs.edit --image in.png --instruction "make it night"

Without --model or --workspace the recipe's shipped editor is used. The result has the size of the image, is upright as
viewers show it, and keeps its transparency.
"""

import os
import secrets
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, StringConstraints
from pydantic_settings import BaseSettings, SettingsConfigDict
from tqdm import tqdm

from ip2p import images
from ip2p.cli import parse_flags, read_recipe
from ip2p.edit.editor import Editor, EditRequest
from ip2p.edit.editors import load_editor
from ip2p.edit.grid import scale_grid
from ip2p.edit.names import available
from ip2p.errors import UserError
from ip2p.models import load_text_to_image
from ip2p.recipe import ModelRef, Recipe
from ip2p.workspace import Workspace
from runtime.exit import exit_statuses

FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
BATCH_SIZE = 8


Instruction = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Edit(BaseSettings):
    __doc__ = __doc__
    model_config = SettingsConfigDict(
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        protected_namespaces=(),
    )

    image: Path = Field(description="the image to edit: PNG, JPEG, WebP, ...")
    instruction: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)] = Field(
        description='what to do, e.g. "make it night"'
    )
    output: Path | None = Field(default=None, description=".png, .webp or .jpg; default: <image>-edited.png")
    guidance_scale: float | None = Field(default=None, description="s_T, follow the instruction; default: the recipe's")
    image_guidance_scale: float | None = Field(default=None, description="s_I, keep the image; default: the recipe's")
    steps: int | None = Field(default=None, gt=0, description="denoising steps; default: the recipe's")
    seed: int | None = Field(
        default=None, ge=0, lt=2**63, description="the same seed gives the same image; default: drawn"
    )
    grid: bool = Field(
        default=False, description="edit with every pair of the recipe's evaluate scales, in one picture"
    )
    model: str | None = Field(default=None, description="an editor: a diffusers directory or a hub id")
    workspace: str | None = Field(default=None, description="the run whose editor to use: a path, s3://... or gs://...")
    recipe: Path = Field(default=Path("recipes/miniature.yaml"), description="recipe file, for defaults and the editor")


def run(settings: Edit) -> Path:
    """Edit the image, write the result and return its path. Raises `UserError`."""
    output = settings.output or settings.image.with_name(f"{settings.image.stem}-edited.png")
    if output.suffix.lower() not in FORMATS:
        raise UserError(f"--output {output}: choose a name that ends in {', '.join(FORMATS)}")
    check_writable(output)
    try:
        data = settings.image.read_bytes()
    except OSError as error:
        raise UserError(f"--image {settings.image}: {error.strerror}") from error
    image, alpha = images.decode(data), images.decode_alpha(data)
    if alpha is not None and FORMATS[output.suffix.lower()] == "jpeg":
        raise UserError(
            f"--output {output}: {settings.image} has transparency and JPEG can't hold it; use .png or .webp"
        )
    recipe = read_recipe(settings.recipe)
    editor = load(settings, recipe)
    seed = secrets.randbelow(2**32) if settings.seed is None else settings.seed
    s_T = recipe.sampling.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
    s_I = (
        recipe.sampling.image_guidance_scale if settings.image_guidance_scale is None else settings.image_guidance_scale
    )
    scales = (recipe.evaluate.guidance_scale, recipe.evaluate.image_guidance_scale) if settings.grid else ([s_T], [s_I])
    requests = [
        EditRequest(
            image,
            settings.instruction,
            guidance_scale=text_scale,
            image_guidance_scale=image_scale,
            steps=settings.steps or recipe.sampling.steps,
            seed=seed,
            solver=recipe.sampling.solver,
        )
        for image_scale in scales[1]
        for text_scale in scales[0]
    ]
    results = edit_with_progress(editor, requests)
    if settings.grid:
        rows = [results[n : n + len(scales[0])] for n in range(0, len(results), len(scales[0]))]
        picture, alpha = scale_grid(image, rows, s_I=scales[1], s_T=scales[0]), None
    else:
        picture = results[0]
    try:
        output.write_bytes(images.encode(picture, FORMATS[output.suffix.lower()], alpha))
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from error
    told = "every pair of scales" if settings.grid else f"guidance scale {s_T:g}, image guidance scale {s_I:g}"
    print(f"{output}: {told}, {requests[0].steps} steps of {requests[0].solver}, seed {seed}")
    return output


def check_writable(output: Path) -> None:
    """Raises `UserError` before an edit is made that could not be kept."""
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; add the name of a file")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}; make it, or choose another")
    if not os.access(output if output.exists() else output.parent, os.W_OK):
        raise UserError(f"--output {output}: may not be written; choose another folder")


def load(settings: Edit, recipe: Recipe) -> Editor:
    """The editor of --model, of --workspace or of the recipe."""
    if settings.model is not None and settings.workspace is not None:
        raise UserError("--model and --workspace: give one of them")
    if settings.model is not None:
        ref = ModelRef(path=settings.model, dtype=recipe.models.editor.dtype)
        return Editor(load_text_to_image(ref, None, recipe.device, "--model"), BATCH_SIZE)
    workspace = Workspace(settings.workspace) if settings.workspace is not None else None
    if workspace is not None and not workspace.done("model"):
        raise UserError(
            f"--workspace {settings.workspace}: it has no trained model; run jobs.train on it, or leave it out"
        )
    model = load_editor(recipe, workspace, available(workspace)[0])
    return Editor(model, BATCH_SIZE, recipe.sampling.max_side)


def edit_with_progress(editor: Editor, requests: list[EditRequest]) -> list[np.ndarray]:
    """`Editor.edit` with a bar over all denoising steps, on standard error."""
    with tqdm(total=sum(request.steps for request in requests), unit="step", desc="edit", delay=2) as bar:
        return editor.edit(requests, progress=bar.update)


def main(argv: list[str] | None = None) -> None:
    with exit_statuses():
        run(parse_flags(Edit, argv))


if __name__ == "__main__":
    main()
