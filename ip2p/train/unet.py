"""A text-to-image UNet becomes an image-editing UNet: its first convolution also reads the image to edit."""

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from ip2p.errors import UserError

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def widen_conv_in(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Let `unet` read C more channels, the latents of the image to edit, after its own C; in place.

    The new weights are zero and everything else is kept, the bias included, so that at first the UNet predicts exactly
    what it did before, whatever the image (InstructPix2Pix, section 3.2). A UNet that is already wide passes through.

    Raises:
        ValueError: the UNet reads neither C nor 2C channels, where C is what it predicts.
    """
    channels = unet.config["out_channels"]
    reads = unet.config["in_channels"]
    if reads == 2 * channels:
        return unet
    if reads != channels:
        raise UserError(
            f"cannot train an editor from a UNet with {reads} input and {channels} output channels: "
            f"expected {channels} (text-to-image) or {2 * channels} (editor) input channels"
        )
    weight = unet.conv_in.weight
    wide = torch.cat([weight.detach(), torch.zeros_like(weight)], dim=1)
    unet.conv_in.weight = nn.Parameter(wide, requires_grad=weight.requires_grad)
    unet.conv_in.in_channels = 2 * channels
    unet.register_to_config(in_channels=2 * channels)
    return unet


def trainable(unet: UNet2DConditionModel, lora_rank: int | None) -> list[nn.Parameter]:
    """The parameters that are trained, the others frozen: all; or, with a rank, a new adapter that does nothing yet.

    The adapter (LoRA, Hu et al. 2021) is on the matrices of all attention layers. The first convolution is trained as a
    whole beside it: its new weights are zero, and nothing of small rank is to be kept there.
    """
    unet.requires_grad_(lora_rank is None)
    if lora_rank is not None:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same beginning on every rank and in every run
            unet.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=ATTENTION))
        unet.conv_in.requires_grad_(True)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def merge(unet: UNet2DConditionModel) -> None:
    """Add the adapter to the weights that it adapts: what is left is an ordinary UNet."""
    unet.fuse_lora()
    unet.unload_lora()
