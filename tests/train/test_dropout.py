import torch

from ip2p.train.dropout import drop, dropout_masks


def test_fractions_of_one_draw():
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    text, image = dropout_masks(u, drop_text=0.05, drop_image=0.1, drop_both=0.2)
    found = [float(mask.float().mean()) for mask in (text & ~image, image & ~text, text & image, ~text & ~image)]
    assert torch.allclose(torch.tensor(found), torch.tensor([0.05, 0.1, 0.2, 0.65]), atol=3e-3)


def test_all_or_nothing():
    u = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert not torch.stack(dropout_masks(u, 0, 0, 0)).any()
    assert torch.stack(dropout_masks(u, 0, 0, 1)).all()


def test_only_the_dropped_samples_change():
    conditioning = torch.randn(3, 4, 5, 5)
    dropped = drop(conditioning, torch.tensor([False, True, False]), 0.0)
    assert torch.equal(dropped[[0, 2]], conditioning[[0, 2]]) and not dropped[1].any()
    null = torch.randn(4, 5, 5)
    assert torch.equal(drop(conditioning, torch.tensor([True, False, False]), null)[0], null)
