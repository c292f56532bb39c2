import torch

from ip2p.diffusion.guidance import combine, edit_weights, text_weights


def test_weights_are_the_papers_formulas():
    none, image, both = torch.randn(3, 5)
    s_t, s_i = 7.5, 1.5
    expected = none + s_i * (image - none) + s_t * (both - image)
    weights = torch.tensor(edit_weights(s_t, s_i))
    torch.testing.assert_close(weights @ torch.stack([none, image, both]), expected)
    torch.testing.assert_close(torch.tensor(text_weights(s_t)) @ torch.stack([none, both]), none + s_t * (both - none))


def test_scales_of_one_leave_the_full_prediction():
    assert edit_weights(1, 1) == (0, 0, 1)
    assert text_weights(1) == (0, 1)


def test_combine_keeps_samples_apart():
    outputs = torch.randn(5, 2, 3, 3)
    outputs[4] = torch.nan
    combined = combine(outputs, torch.tensor([[0, 1], [2, 3], [4, 4]]), torch.tensor([[0.5, 0.5], [-1.0, 2.0], [1, 0]]))
    torch.testing.assert_close(combined[0], (outputs[0] + outputs[1]) / 2)
    torch.testing.assert_close(combined[1], 2 * outputs[3] - outputs[2])
    assert combined[2].isnan().all()
