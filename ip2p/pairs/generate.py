"""From (caption, instruction, edited caption) to pairs of images: draw, generate, score, judge."""

import heapq
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from ip2p.clip_similarity import ClipSimilarity, similarities
from ip2p.diffusion.attention import UNALIGNED, align_tokens
from ip2p.diffusion.blend import Blend
from ip2p.diffusion.engine import Conditioning, Engine, Link, Trajectory
from ip2p.diffusion.guidance import text_weights
from ip2p.diffusion.schedule import NoiseSchedule
from ip2p.errors import DeviceError
from ip2p.images import encode, to_uint8
from ip2p.models import is_device_error, load_clip, load_text_to_image, resolve_device
from ip2p.pairs.adaptive import next_round
from ip2p.pairs.candidates import Candidate, draw_candidate
from ip2p.pairs.filter import ACCEPTED, NOT_FINITE, SURPLUS, best, quality, tally, verdict
from ip2p.recipe import Recipe, SharingMode
from ip2p.records import INSTRUCTIONS, PAIRS, digest

logger = logging.getLogger(__name__)
TEXTS_AT_ONCE = 64
NOTHING: dict[str, Any] = {"candidates": [], "pairs": [], "rejects": [], "unet_samples": 0, "seconds": 0.0}

Images = tuple[np.ndarray, np.ndarray, Tensor | None]  # before, after (H, W, 3); mask (h, w) of the latents


@dataclass(frozen=True)
class _Sharing:
    """How a caption pair shares attention: the mode that it allows, alignment (L,), emphasis (L,) and blend, if any."""

    mode: SharingMode
    alignment: Tensor
    emphasis: Tensor | None
    blend: Blend | None


@dataclass(eq=False)
class _Row:
    """A caption pair at work. `images` holds those of the best accepted candidates so far, at most max_pairs."""

    row: dict[str, Any]
    position: int  # in its batch
    conditionings: tuple[list[Conditioning], list[Conditioning]]  # (no text, text), before and after
    sharing: "_Sharing"
    clip_texts: Tensor  # (2, D)
    drawn: int = 0
    scores: dict[int, dict[str, Any]] = field(default_factory=dict)
    images: dict[int, Images] = field(default_factory=dict)
    rejects: dict[int, Images] = field(default_factory=dict)
    unet_samples: int = 0


class _Task(NamedTuple):
    """A candidate to draw; compared by the row's position and its own number, which no two share."""

    position: int
    k: int
    work: _Row
    candidate: Candidate


@dataclass(eq=False)
class _Draw:
    """A candidate of a row on its way through the engine."""

    work: _Row
    k: int
    candidate: Candidate
    source: Trajectory
    edited: Trajectory


class _Stopwatch:
    """Shares the seconds of a batch among its rows, which are done one after the other."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._charged_seconds, self._charged_samples = 0.0, 0

    def charge(self, samples: int, all_samples: int) -> float:
        """Return a row's seconds: those not charged yet, in the proportion of its UNet samples.

        `all_samples` are those of all rows so far. The charges of a whole batch add up to its time.
        """
        seconds = time.perf_counter() - self._started - self._charged_seconds
        seconds *= samples / (all_samples - self._charged_samples)
        self._charged_seconds += seconds
        self._charged_samples += samples
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the time does not count."""
        before = time.perf_counter()
        yield
        self._started += time.perf_counter() - before


class PairGenerator:
    """Loads the models once; maps batches of rows of `instructions/` to rows of `pairs/`, one for one.

    Raises `UserError` for models that can't be loaded and for an image size that they don't have,
    `DeviceError` for a GPU that does not work.
    """

    def __init__(self, recipe: Recipe):
        device = resolve_device(recipe.device)
        self.recipe = recipe
        self.settings = recipe.pairs
        self.batch_size = recipe.pairs.batch_size
        try:
            self.model = load_text_to_image(recipe.models.text_to_image, recipe.models.vae, device)
            self.clip = ClipSimilarity(load_clip(recipe.models.clip, device))
        except RuntimeError as error:
            _raise_broken_device(error)
            raise
        self.schedule = NoiseSchedule.from_config(self.model.schedule.alphas_cumprod, self.model.schedule.config)
        self.eos: int = self.model.tokenizer.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]
        self.shape = self.model.latent_shape(self.settings.height, self.settings.width)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Yield one table of PAIRS, of one row, for each row of INSTRUCTIONS as soon as it is done.

        The order is that of the input: Ray runs a batch again when its process dies, and takes what
        follows the tables that it has by their number. Rows that are not `ok` pass through.

        A row that can't be done becomes `failed` with the reason and leaves its neighbours alone.

        Raises:
            DeviceError: The GPU has failed, so that no call of this process can succeed.
            Exception: No row of several can be done, so the rows are not the cause.
        """
        rows = batch.select(INSTRUCTIONS.names).to_pylist()
        results = self._each([row for row in rows if row["status"] == "ok"])
        for row in rows:
            result = next(results) if row["status"] == "ok" else {}
            yield pa.Table.from_pylist([row | NOTHING | result], schema=PAIRS)

    def _each(self, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield a result for each row: from one batch, and if that fails, each row by itself."""
        done = 0
        try:
            for result in self._within_memory(rows):
                yield result
                done += 1
            return
        except Exception as error:
            _raise_broken_device(error)
            if len(rows) == 1:
                logger.error("caption %s failed", rows[0]["caption_id"], exc_info=error)
                yield failure(f"{type(error).__name__}: {error}")
                return
            logger.exception("a batch of %d captions failed, trying each for itself", len(rows))
            cause = error
        healthy, failures = done > 0, []
        for row in rows[done:]:
            [result] = self._each([row])
            if result["status"] == "failed" and not healthy:
                failures.append(result)
                continue
            # Some row can be done, so those that could not are the cause themselves.
            healthy = True
            yield from failures
            yield result
            failures = []
        if failures:
            raise cause

    def _within_memory(self, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Call `generate` with as many candidates at a time as the GPU has memory for.

        A batch size that fits is kept for later calls.
        """
        if not rows:
            return
        left = rows
        while True:
            try:
                for result in self.generate(left):
                    left = left[1:]
                    yield result
                return
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
                logger.warning("out of GPU memory: pairs.batch_size is now %d", self.batch_size)
            torch.cuda.empty_cache()  # not inside `except`: the traceback holds what is to be freed

    @torch.inference_mode()
    def generate(self, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield what PAIRS has beyond INSTRUCTIONS, with the new `status` and `reason`, row by row.

        A row is yielded when it and all rows before it are done. Candidates of earlier rows are
        started first, so that rows finish in about the order of the input.
        """
        watch = _Stopwatch()
        works = self._prepare(rows)
        engine = Engine(self.model.unet, self.schedule, 2 * self.batch_size)
        waiting: list[_Task] = []  # a heap: rows in the order of the input, their candidates in turn
        for work in works:
            self._add_round(waiting, work)
        underway: dict[int, _Draw] = {}
        ready: list[_Draw] = []
        unfinished = list(works)

        while waiting or underway or ready:
            while waiting and len(engine) < engine.batch_size:
                _, k, work, candidate = heapq.heappop(waiting)
                draw = self._start(work, k, candidate)
                underway[id(draw.edited)] = draw
                engine.add(draw.source, draw.edited)
            ready += [underway.pop(id(t)) for t in engine.step() if t.link is not None]
            ended = self._drop_hopeless(engine, underway)
            # What is judged may call for more, so it does not wait while the engine has room.
            if len(ready) >= self.batch_size or not waiting:
                self._judge(ready)
                ended, ready = ended + ready, []
            for work in dict.fromkeys(draw.work for draw in ended):
                self._add_round(waiting, work)
            while unfinished and len(unfinished[0].scores) == unfinished[0].drawn:
                work = unfinished.pop(0)
                seconds = watch.charge(work.unet_samples, engine.unet_samples)
                result = self._result(work, seconds)
                with watch.paused():
                    yield result

    def _prepare(self, rows: Sequence[dict[str, Any]]) -> list[_Row]:
        """Every distinct text is embedded once."""
        prompts = list(dict.fromkeys(row[key] for row in rows for key in ("original_prompt", "edited_prompt")))
        tokenizer = self.model.tokenizer
        ids = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True).input_ids
        tokens = dict(zip(prompts, ids, strict=True))
        texts = _embed(["", *prompts], self.model.encode_text)
        clip_texts = _embed(prompts, self.clip.embed_texts)
        works = []
        for row in rows:
            before, after = row["original_prompt"], row["edited_prompt"]
            sharing = self._sharing(tokens[before], tokens[after])
            none = Conditioning(texts[""])
            conditionings = ([none, Conditioning(texts[before])], [none, Conditioning(texts[after])])
            clip_pair = torch.stack([clip_texts[before], clip_texts[after]])
            works.append(_Row(row, len(works), conditionings, sharing, clip_pair))
        return works

    def _sharing(self, source: list[int], edited: list[int]) -> _Sharing:
        """Token ids of the two captions -> the first of the recipe's modes that applies to them."""
        settings = self.settings.sharing
        alignment = None
        mode: SharingMode = settings.modes[0]
        for mode in settings.modes:
            alignment = align_tokens(source, edited, self.eos, mode)
            if alignment is not None:
                break
        assert alignment is not None, "the last mode always applies"
        old, new = (changed_tokens(*pair, self.eos) for pair in ((edited, source), (source, edited)))
        emphasis = None if settings.emphasis == 1 else torch.where(new, settings.emphasis, 1.0)
        blend = None
        if settings.blend and (old.any() or new.any()):
            blend = Blend(old, new, settings.blend.threshold, settings.blend.start)
        return _Sharing(mode, torch.tensor(alignment), emphasis, blend)

    def _add_round(self, waiting: "list[_Task]", work: _Row) -> None:
        """Add the candidates to draw now to the heap `waiting`.

        There are none while some are underway, so that a round depends on its own caption alone.
        """
        if len(work.scores) < work.drawn:
            return
        tried = [(s["shared_attention_fraction"], s["verdict"] == ACCEPTED) for s in work.scores.values()]
        first, accepted = work.drawn, sum(paid for _, paid in tried)
        work.drawn += next_round(self.settings, work.drawn, accepted)
        name = work.row["caption_id"]
        for k in range(first, work.drawn):
            candidate = draw_candidate(self.settings, self.recipe.seed, name, k, tried)
            heapq.heappush(waiting, _Task(work.position, k, work, candidate))

    def _start(self, work: _Row, k: int, candidate: Candidate) -> _Draw:
        """Candidate `k` as linked trajectories: source and edited image begin with the same noise."""
        settings = self.settings
        p = candidate.shared_attention_fraction
        generator = candidate.generator()
        noise = torch.randn(self.shape, generator=generator)
        source, edited = (
            Trajectory(
                latents=noise,
                conditionings=conditionings,
                weights=text_weights(candidate.guidance_scale),
                steps=settings.steps,
                solver=settings.solver,
                generator=generator,
            )
            for conditionings in work.conditionings
        )
        shared, cross = work.sharing, settings.sharing.cross_attention if work.sharing.mode != "self" else 0.0
        edited.link = Link(
            source,
            [None, shared.alignment],
            settings.sharing.self_attention * p,
            cross * p,
            shared.emphasis,
            shared.blend,
        )
        return _Draw(work, k, candidate, source, edited)

    def _drop_hopeless(self, engine: Engine, underway: dict[int, _Draw]) -> list[_Draw]:
        """Score what the candidates that are part-way are predicted to become, and end those that will hardly do."""
        look = self.settings.early_look
        if look is None:
            return []
        at = max(1, round(look.at * self.settings.steps))
        seen = [draw for draw in underway.values() if draw.edited.step == at]
        if not seen:
            return []
        predicted = [t.denoised for draw in seen for t in (draw.source, draw.edited)]
        _, scores = self._score(seen, torch.stack([x0 for x0 in predicted if x0 is not None]))
        dropped = [
            (draw, numbers) for draw, numbers in zip(seen, scores, strict=True) if numbers["quality"] < look.drop_below
        ]
        for draw, numbers in dropped:
            engine.remove(draw.edited)
            del underway[id(draw.edited)]
            self._record(draw, numbers, f"early quality < {look.drop_below:g}")
        return [draw for draw, _ in dropped]

    def _score(self, draws: list[_Draw], latents: Tensor) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """latents (2n, C, H, W), before and after in turn -> images (2n, H, W, 3) uint8, and scores of each pair."""
        images = to_uint8(self.model.decode_latents(latents))
        embedded = self.clip.embed_images(images)
        texts = torch.stack([draw.work.clip_texts for draw in draws])
        columns = similarities(embedded[0::2], embedded[1::2], texts[:, 0], texts[:, 1])
        rows = [
            dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)
        ]
        weights = self.settings.quality
        return images, [row | {"quality": weights and quality(row, weights)} for row in rows]

    def _record(self, draw: _Draw, scores: dict[str, Any], found: str) -> None:
        work, candidate = draw.work, draw.candidate
        work.unet_samples += draw.source.unet_samples + draw.edited.unet_samples
        work.scores[draw.k] = {
            "seed": candidate.seed,
            "shared_attention_fraction": candidate.shared_attention_fraction,
            "guidance_scale": candidate.guidance_scale,
            "sharing": work.sharing.mode,
            **scores,
            "verdict": found,
        }

    def _judge(self, draws: list[_Draw]) -> None:
        """Decode and score finished candidates; keep the images of the best."""
        if not draws:
            return
        latents = torch.stack([t.latents for draw in draws for t in (draw.source, draw.edited)])
        finite = latents.isfinite().flatten(1).all(dim=1).view(-1, 2).all(dim=1).tolist()
        images, scores = self._score(draws, latents)
        for n, draw in enumerate(draws):
            work = draw.work
            self._record(draw, scores[n], verdict(scores[n], self.settings) if finite[n] else NOT_FINITE)
            shown = (images[2 * n], images[2 * n + 1], draw.edited.mask)
            if work.scores[draw.k]["verdict"] == ACCEPTED:
                work.images[draw.k] = shown
                kept = best({k: work.scores[k] for k in work.images}, self.settings.max_pairs)
                work.images = {k: work.images[k] for k in kept}
            elif self._keeps_rejects(work) and len(work.rejects) < self.settings.max_pairs:
                work.rejects[draw.k] = shown

    def _keeps_rejects(self, work: _Row) -> bool:
        return digest("rejects", work.row["caption_id"]) < self.settings.keep_rejects * 2**63

    def _result(self, work: _Row, seconds: float) -> dict[str, Any]:
        for k, scores in work.scores.items():
            if scores["verdict"] == ACCEPTED and k not in work.images:
                scores["verdict"] = SURPLUS
        candidates = [work.scores[k] for k in sorted(work.scores)]
        pairs, rejects = (
            [
                {
                    **work.scores[k],
                    "original_image": encode(before),
                    "edited_image": encode(after),
                    "mask": None if mask is None else encode(mask_image(mask, *before.shape[:2])),
                }
                for k, (before, after, mask) in images.items()
            ]
            for images in (work.images, work.rejects)
        )
        return {
            "status": "ok" if pairs else "rejected",
            "reason": "" if pairs else tally(scores["verdict"] for scores in candidates),
            "candidates": candidates,
            "pairs": pairs,
            "rejects": rejects,
            "unet_samples": work.unet_samples,
            "seconds": seconds,
        }


def _embed(texts: list[str], encoder: Any) -> dict[str, Tensor]:
    chunks = [texts[i : i + TEXTS_AT_ONCE] for i in range(0, len(texts), TEXTS_AT_ONCE)]
    return {text: row for chunk in chunks for text, row in zip(chunk, encoder(chunk), strict=True)}


def changed_tokens(source: list[int], edited: list[int], eos: int) -> Tensor:
    """(L,) bool: the tokens of the edited caption that the source has not, without padding."""
    common = align_tokens(source, edited, eos, "refine")
    return torch.tensor(common) == UNALIGNED


def mask_image(mask: Tensor, height: int, width: int) -> np.ndarray:
    """(h, w) bool -> (height, width, 3) uint8, white where it is true."""
    large = F.interpolate(mask.float()[None, None], (height, width))[0, 0]
    return (255 * large[..., None].expand(-1, -1, 3)).byte().cpu().numpy()


def _raise_broken_device(error: Exception) -> None:
    """Raise `DeviceError` if that is what `error` says."""
    if is_device_error(error):
        raise DeviceError(str(error).splitlines()[0]) from error


def failure(reason: str) -> dict[str, Any]:
    """What becomes of a row that could not be done."""
    return {"status": "failed", "reason": reason[:500]}


def failed(rows: pa.Table, reason: str) -> pa.Table:
    """Columns of INSTRUCTIONS -> table of PAIRS, all rows failed."""
    results = [row | NOTHING | failure(reason) for row in rows.select(INSTRUCTIONS.names).to_pylist()]
    return pa.Table.from_pylist(results, schema=PAIRS)
