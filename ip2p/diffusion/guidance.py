"""Classifier-free guidance in its general form: a sample has n conditionings c_i and weights w_i that sum to 1, and

prediction = sum_i w_i model(z, c_i)
"""

from torch import Tensor


# e(0) + s (e(T) - e(0))
def text_weights(guidance_scale: float) -> tuple[float, float]:
    """Weights of (no text, text)."""
    return 1 - guidance_scale, guidance_scale


# e(0,0) + s_I (e(I,0) - e(0,0)) + s_T (e(I,T) - e(I,0)), InstructPix2Pix eq. 3
def edit_weights(guidance_scale: float, image_guidance_scale: float) -> tuple[float, float, float]:
    """Weights of (neither, image, image and text), from s_T and s_I."""
    return 1 - image_guidance_scale, image_guidance_scale - guidance_scale, guidance_scale


def combine(outputs: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """outputs (R, C, H, W); rows (n, S), the rows of each sample; weights (n, S) -> (n, C, H, W).

    A sample with fewer than S rows repeats one of its own with weight 0: a broken row spoils no other sample.
    """
    return (outputs[rows] * weights[:, :, None, None, None]).sum(dim=1)
