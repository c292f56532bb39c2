"""The load of a request, by which it is admitted, charged and scheduled."""

from dataclasses import dataclass

USUAL_STEPS = 20  # an edit of so many steps at the model's full size is the unit of work


@dataclass(frozen=True)
class Load:
    """The load of a request.

    work: in usual edits. memory: bytes held for its pictures and their results.
    """

    work: float
    memory: int


def work_of(steps: int, previews: int, pixels: int, full: int) -> float:
    """Return the work of an edit in usual edits, at least 1.

    A preview is one decoding, which costs about as much as a step: for SD 1.5 at 512 px, 2.5 TFLOP
    by the VAE's decoder and 2.4 by three samples of the UNet. pixels: of the picture that the model
    sees; full: of the largest that it sees.
    """
    return max(1.0, (steps + previews) / USUAL_STEPS * pixels / full)


def memory_of(file_bytes: int, pixels: int, result_pixels: int, lossless: bool) -> int:
    """Return the bytes that a request holds until it is answered, roughly and at most.

    An upload is held as the body, as text and as a file. A decoded pixel takes three bytes of color
    and one of opacity. A result is held as a file and in base64: a PNG takes about 2 bytes a pixel,
    a JPEG less than half a byte.
    """
    return 4 * file_bytes + 4 * pixels + (4 if lossless else 1) * result_pixels
