"""A text-to-image UNet becomes an image-editing UNet: its first convolution also reads the image to edit."""

import torch
from diffusers import UNet2DConditionModel
from torch import nn


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
        raise ValueError(
            f"cannot train an editor from a UNet with {reads} input and {channels} output channels: "
            f"expected {channels} (text-to-image) or {2 * channels} (editor) input channels"
        )
    weight = unet.conv_in.weight
    wide = torch.cat([weight.detach(), torch.zeros_like(weight)], dim=1)
    unet.conv_in.weight = nn.Parameter(wide, requires_grad=weight.requires_grad)
    unet.conv_in.in_channels = 2 * channels
    unet.register_to_config(in_channels=2 * channels)
    return unet
