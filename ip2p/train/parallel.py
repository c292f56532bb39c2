"""Several ranks train one UNet: each has its own samples, and all of the UNet (DDP) or a part of it (FSDP2)."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


def shard(unet: UNet2DConditionModel) -> list[nn.Parameter]:
    """Split the parameters of `unet` over all ranks, in place; its blocks are put together one after the other.

    Returns the parameters that are trained: those from before are no longer the UNet's.
    """
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        assert block is not None
        fully_shard(block)
    fully_shard(unet)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


@contextmanager
def synchronised(unet: nn.Module, now: bool) -> Iterator[None]:
    """Whether the ranks exchange the gradients of the backward pass inside, or each adds up its own until then."""
    if isinstance(unet, FSDPModule):
        unet.set_requires_gradient_sync(now)
        yield
    elif isinstance(unet, DistributedDataParallel) and not now:
        with unet.no_sync():
            yield
    else:
        yield


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be in parts. All ranks must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def scattered(whole: Tensor, like: Tensor) -> Tensor:
    """`whole` in parts, or in none, and on the device, as `like` is."""
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements) if isinstance(like, DTensor) else whole
