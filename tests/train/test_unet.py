import pytest
import torch

from ip2p.models import load_text_to_image
from ip2p.recipe import ModelRef
from ip2p.train.unet import widen_conv_in


def predict(unet, latents):
    text = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return unet(latents, torch.tensor([3, 900]), text).sample


def test_zero_initialised_conv_in_ignores_the_image(tiny_sd):
    unet = load_text_to_image(ModelRef(path=str(tiny_sd)), device="cpu").unet
    latents, image = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = predict(unet, latents)
    widen_conv_in(unet)
    assert unet.config.in_channels == 8 and unet.conv_in.in_channels == 8
    for other in (image, 100 * image, torch.zeros_like(image)):
        assert torch.allclose(predict(unet, torch.cat([latents, other], 1)), before, atol=1e-6)


def test_a_wide_unet_passes_through(tiny_editor):
    unet = load_text_to_image(ModelRef(path=str(tiny_editor)), device="cpu").unet
    weight = unet.conv_in.weight
    assert widen_conv_in(unet).conv_in.weight is weight


def test_other_channel_counts_are_refused(tiny_sd):
    unet = load_text_to_image(ModelRef(path=str(tiny_sd)), device="cpu").unet
    unet.register_to_config(in_channels=9)  # an inpainting model
    with pytest.raises(ValueError, match="9 input and 4 output"):
        widen_conv_in(unet)
