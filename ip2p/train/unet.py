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
    channels = unet.config.out_channels
    if unet.config.in_channels == 2 * channels:
        return unet
    if unet.config.in_channels != channels:
        raise ValueError(
            f"cannot train an editor from a UNet with {unet.config.in_channels} input and {channels} output channels: "
            f"expected {channels} (text-to-image) or {2 * channels} (editor) input channels"
        )
    narrow = unet.conv_in
    wide = nn.Conv2d(
        2 * channels,
        narrow.out_channels,
        narrow.kernel_size,
        stride=narrow.stride,
        padding=narrow.padding,
        device=narrow.weight.device,
        dtype=narrow.weight.dtype,
    )
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, :channels] = narrow.weight
        wide.bias.copy_(narrow.bias)
    unet.conv_in = wide
    unet.register_to_config(in_channels=2 * channels)
    return unet
