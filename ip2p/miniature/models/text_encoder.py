"""The miniature CLIP text encoder, taught to be *readable*: captions and instructions, word by word.

One attention layer (as the UNet's cross-attention will be) must be able to read from its token states everything that
a caption says about every place, and everything that an instruction asks for. That takes minutes and spares the UNet
the hardest part, which word belongs to which thing; trained from nothing together, shapes stay at chance for long. It
stays frozen afterwards, as Stable Diffusion's does: text-to-image reads captions with it and the editor instructions.
"""

# transformers annotates less than it takes and gives.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import random
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ip2p.miniature.instructions import read_slots
from ip2p.miniature.language import INSTRUCTIONS, Description, describe, draw_unsaid, read_caption
from ip2p.miniature.models.autoencoder import draw_scenes
from ip2p.miniature.models.fit import Run, fit, generators
from ip2p.miniature.models.tokenizer import CONTEXT_LENGTH, tokenize
from ip2p.miniature.scene import (
    BACKGROUNDS,
    COLOURS,
    LOOKS,
    MAX_THINGS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    thing_at,
)
from ip2p.miniature.triplets import draw_triplet

WIDTH = 96
NOT_ASKED = -100  # the answer that cross-entropy leaves out

# What can be asked, as subject -> question -> possible answers; each subject is one query of the attention.
Questions = dict[str, dict[str, tuple]]
Told = dict[str, dict[str, str]]  # subject -> question -> answer
THING = {"shape": SHAPES, "colour": tuple(COLOURS), "size": SIZES}
CAPTION_QUESTIONS: Questions = {
    **{place: {"holds": ("nothing", "a thing", "unsaid"), **THING} for place in PLACES},
    # Things without places are told apart by the order in which they are mentioned.
    **{f"mention {n}": {"holds": ("nothing", "a thing"), **THING} for n in range(MAX_THINGS)},
    "setting": {"background": ("unsaid", *BACKGROUNDS), "look": LOOKS},
}
_REFERENCE = {name: ("unsaid", *values) for name, values in {**THING, "place": PLACES}.items()}
INSTRUCTION_QUESTIONS: Questions = {
    "edit": {"wording": tuple(INSTRUCTIONS)},
    "thing": _REFERENCE,
    "other": _REFERENCE,
    "new": {**_REFERENCE, "background": ("unsaid", *BACKGROUNDS), "count": ("unsaid", "1", "2", "3")},
}


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def draw_captions(rng: random.Random, scenes: Sequence[Scene]) -> list[str]:
    """A caption of each scene, leaving now and then places or background unsaid."""
    return [describe(scene, rng.getrandbits(32), unsaid=draw_unsaid(rng)) for scene in scenes]


class Reader(nn.Module):
    """Answers questions from token states (B, L, WIDTH) with one attention layer and a linear map for each subject."""

    def __init__(self, questions: Questions) -> None:
        super().__init__()
        self.questions = questions
        self.queries = nn.Parameter(torch.randn(len(questions), WIDTH) * 0.1)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.answers = nn.ModuleList(
            nn.Linear(WIDTH, sum(len(answers) for answers in asked.values())) for asked in questions.values()
        )

    def forward(self, states: Tensor) -> dict[tuple[str, str], Tensor]:
        """Logits (B, answers) for every (subject, question)."""
        read = self.attention(self.queries.expand(len(states), -1, -1), states, states, need_weights=False)[0]
        logits: dict[tuple[str, str], Tensor] = {}
        for index, (subject, asked) in enumerate(self.questions.items()):
            parts = self.answers[index](read[:, index]).split([len(answers) for answers in asked.values()], -1)
            logits |= {(subject, question): part for question, part in zip(asked, parts, strict=True)}
        return logits


def indices(questions: Questions, told: Sequence[Told]) -> dict[tuple[str, str], Tensor]:
    """Answers as class indices (B,); what a text is not asked is NOT_ASKED."""
    return {
        (subject, question): torch.tensor(
            [
                answers.index(said[subject][question]) if question in said.get(subject, {}) else NOT_ASKED
                for said in told
            ]
        )
        for subject, asked in questions.items()
        for question, answers in asked.items()
    }


def told_by_caption(description: Description) -> Told:
    """What a reader of the caption should answer."""
    scene, unsaid = description.scene, description.unsaid

    def tell(thing: Thing | None) -> dict[str, str]:
        look = {name: getattr(thing, name) for name in THING} if thing else {}
        return {"holds": "a thing" if thing else "nothing", **look}

    if "places" in unsaid:
        things = {place: {"holds": "unsaid"} for place in PLACES}
        things |= {f"mention {n}": tell(thing_at(scene, PLACES[n])) for n in range(MAX_THINGS)}
    else:
        things = {place: tell(thing_at(scene, place)) for place in PLACES}
    background = "unsaid" if "background" in unsaid else scene.background
    return things | {"setting": {"background": background, "look": scene.look}}


def told_by_instruction(text: str) -> Told:
    """What a reader of the instruction should answer: only what its words say, whatever the scene."""
    slots = read_slots(text)
    said: dict[str, dict[str, str]] = defaultdict(dict)
    for subject, asked in INSTRUCTION_QUESTIONS.items():
        for question, answers in asked.items():
            value = slots.get(subject, {}).get(question, "unsaid")
            assert value in answers, (text, subject, question, value)
            said[subject][question] = value
    return said


def train_text_encoder(run: Run, tokenizer: CLIPTokenizer, *, steps: int, batch_size: int = 64) -> CLIPTextModel:
    """Train a text encoder from whose states two `Reader`s, trained with it and then dropped, read what texts say.

    Each batch is `batch_size` captions and as many instructions.
    """
    torch.manual_seed(run.seed)
    encoder = new_text_encoder(tokenizer)
    readers = nn.ModuleDict({"caption": Reader(CAPTION_QUESTIONS), "instruction": Reader(INSTRUCTION_QUESTIONS)})
    both = nn.ModuleDict({"encoder": encoder, "readers": readers}).to(run.device)

    def read(rng: random.Random, kept_out: bool, count: int) -> list[tuple[str, Tensor, Tensor]]:
        """(question, logits (count, answers), answers (count,)) for all questions about `count` texts of each sort."""
        captions = draw_captions(rng, draw_scenes(rng, count, kept_out))
        instructions = [draw_triplet(rng, held_out=kept_out).instruction for _ in range(count)]
        told = {
            "caption": indices(CAPTION_QUESTIONS, [told_by_caption(read_caption(text)) for text in captions]),
            "instruction": indices(INSTRUCTION_QUESTIONS, [told_by_instruction(text) for text in instructions]),
        }
        states = encoder(tokenize(tokenizer, captions + instructions).to(run.device)).last_hidden_state
        return [
            (f"{sort}.{question}", logits, told[sort][subject, question].to(run.device))
            for sort, part in zip(told, states.split(count), strict=True)
            for (subject, question), logits in readers[sort](part).items()
        ]

    def step_loss(step: int) -> Tensor:
        said = read(generators(run.seed, step)[0], False, batch_size)
        # The sum over texts, so that a question that few are asked does not weigh more for it.
        losses = [
            F.cross_entropy(logits, wanted, ignore_index=NOT_ASKED, reduction="sum") / batch_size
            for _, logits, wanted in said
        ]
        return torch.stack(losses).sum()

    @torch.inference_mode()
    def measure(_: nn.Module) -> dict[str, float]:
        right: dict[str, list[Tensor]] = defaultdict(list)
        for name, logits, wanted in read(random.Random(1), True, 256):
            right[name].append((logits.argmax(-1) == wanted)[wanted != NOT_ASKED])
        return {name: torch.cat(hits).float().mean().item() for name, hits in right.items()}

    trained = fit(both, step_loss, run, "text_encoder", steps=steps, peak=2e-3, measure=measure)
    assert isinstance(trained, nn.ModuleDict)
    averaged = trained["encoder"]
    assert isinstance(averaged, CLIPTextModel)
    return averaged
