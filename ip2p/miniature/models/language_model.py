"""The language model of the miniature family: a small Llama that writes (instruction, edited caption) for a caption.

A plain HF directory: vLLM and transformers load it unchanged. What it must learn is to copy the caption except for what
the edit touches. Copying comes last and suddenly; two things bring it early (steps to 80% of copied tokens, batch 32):
starting on random words, where nothing but copying helps, and Muon (250 steps; AdamW had none of it after 400). The
first half of training has fewer layers: cheaper steps while the language is learned.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ip2p.captions.parse import parse
from ip2p.captions.prompt import answer, tuned_prompt
from ip2p.miniature.language import vocabulary
from ip2p.miniature.models.language_model_data import Texts, draw_rows
from ip2p.miniature.triplets import consistent, draw_triplet, edit_kind

CONTEXT_LENGTH = 256
STEPS = 36_000
SHALLOW_LAYERS, LAYERS, DEEPEN_AT = 4, 6, 7400
# Loss of a token of the edited caption, beside 1 for the instruction's: first copying is learned, then what to ask for.
EDITED_WEIGHT, LATE_EDITED_WEIGHT, LATE_AT = 4, 1, 24_000
WARMUP_STEPS = 50
MUON_RATE, ADAM_RATE = 4e-3, 2e-3
CHECKPOINT_EVERY = 200
IGNORED = -100  # the label that cross-entropy leaves out
PAD, BEGIN, END = 0, 1, 2
Report = Callable[[dict[str, float]], None]


def build_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE in which each of `words` is one token, alone and after a space, as is JSON's punctuation.

    Any text encodes, byte by byte, and decodes to itself exactly. `<s>` begins every prompt, `</s>` ends every answer.
    """
    tokenizer = Tokenizer(models.BPE())
    # A word takes the space before it along; each mark stands alone, except for those that frame the JSON object.
    pattern = r'\{"|"\}|": "|", "| ?\w+|\s|[^\s]'
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
    )
    words = sorted(words)
    frame = answer("a", "a")
    tokenizer.train_from_iterator(
        [*words, *(f" {word}" for word in words), frame, "instruction edited_caption"], trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(vocab_size: int, hidden_size: int = 128, layers: int = LAYERS) -> LlamaForCausalLM:
    """Build a Llama with heads of 32 channels, the smallest that vLLM's CPU attention takes."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config)


def deepen(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return the same function with layers put in between, which add nothing until they are trained.

    Which thing an instruction means is a matter of several hops between words: more layers than copying needs.
    """
    places = [0, 1, 3, 5]  # of the layers that are there
    deep: Any = build_model(model.config.vocab_size, model.config.hidden_size, LAYERS)
    deep.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    deep.model.norm.load_state_dict(model.model.norm.state_dict())
    for index, layer in enumerate(deep.model.layers):
        if index in places:
            layer.load_state_dict(model.model.layers[places.index(index)].state_dict())
        else:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return deep.to(model.device)


def train(
    out_dir: str | Path,
    *,
    steps: int = STEPS,
    seed: int = 0,
    device: str = "cpu",
    log: Report = print,
    checkpoint: str | Path | None = None,
) -> None:
    """Train from scratch on triplets drawn afresh and save the model directory to `out_dir` (weights as fp16).

    Deterministic for a seed and a device. With `checkpoint`, a file, the state is kept there every CHECKPOINT_EVERY
    steps and training goes on from it; what is drawn at a step depends on the seed and the step alone. `steps` may
    differ on resume: the rate falls to zero over the last nine tenths.
    """
    torch.manual_seed(seed)
    words = vocabulary()
    tokenizer = build_tokenizer(words)
    marker = tokenizer.convert_tokens_to_ids("edited_caption")
    assert isinstance(marker, int)
    resumes = checkpoint is not None and Path(checkpoint).exists()
    state = torch.load(checkpoint, map_location=device, weights_only=True) if checkpoint and resumes else {"step": 0}
    model = build_model(len(tokenizer), layers=LAYERS if state["step"] > DEEPEN_AT else SHALLOW_LAYERS)
    model.to(torch.device(device))  # pyright: ignore
    optimizers = _optimizers(model)
    if resumes:
        _restore(state, model, optimizers)
    for step in range(state["step"], steps):
        if step == DEEPEN_AT:
            model = deepen(model)
            optimizers = _optimizers(model)
        rows = draw_rows(seed, step, words)
        edited_weight = EDITED_WEIGHT if step < LATE_AT else LATE_EDITED_WEIGHT
        batch = _collate(tokenizer, rows, device)
        facts = _train_step(model, optimizers, _rate(step, steps), edited_weight, marker, *batch)
        if (step + 1) % 20 == 0:
            log({"step": step + 1, "steps": steps, **{name: float(value) for name, value in facts.items()}})
        if checkpoint and ((step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps):
            _keep(checkpoint, model, optimizers, step + 1)
    save(model, tokenizer, out_dir)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, out_dir: str | Path) -> None:
    """Write the directory that vLLM and transformers load: config, generation config, tokenizer, fp16 safetensors."""
    model.generation_config.update(bos_token_id=BEGIN, eos_token_id=END, pad_token_id=PAD)
    model.half().save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for the embedding and the norms."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _rate(step: int, steps: int) -> float:
    """Factor of the learning rates: warm-up, constant, then linearly to zero over the last nine tenths."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (0.9 * steps))


def _collate(tokenizer: PreTrainedTokenizerBase, rows: list[Texts], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode rows as in generation: prompt, then answer and end token. Labels (B, L) leave out prompt and padding.

    Padded on the right: causal attention never sees it, so that no mask is needed.
    """
    prompts = tokenizer([tuned_prompt(caption) for caption, _, _ in rows])["input_ids"]
    answers = tokenizer([answer(*texts) for _, *texts in rows], add_special_tokens=False)["input_ids"]
    length = max(len(prompt) + len(text) + 1 for prompt, text in zip(prompts, answers, strict=True))
    ids = torch.full((len(rows), length), PAD)
    labels = torch.full((len(rows), length), IGNORED)
    for row, (prompt, text) in enumerate(zip(prompts, answers, strict=True)):
        whole = torch.tensor([*prompt, *text, END])
        ids[row, : len(whole)] = whole
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    return ids.to(device), labels.to(device)


def _train_step(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    rate: float,
    edited_weight: float,
    marker: int,
    ids_BL: torch.Tensor,
    labels_BL: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """One update; `marker` is the token from which on an answer is the edited caption."""
    for optimizer, base in zip(optimizers, (MUON_RATE, ADAM_RATE), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = base * rate
        optimizer.zero_grad()
    hidden_BLC = model.model(ids_BL[:, :-1]).last_hidden_state
    answered = labels_BL[:, 1:] != IGNORED
    targets_N = labels_BL[:, 1:][answered]
    logits_NV = model.lm_head(hidden_BLC[answered])
    is_edited_N = (labels_BL == marker).cumsum(1).bool()[:, 1:][answered]
    losses_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
    weights_N = 1 + (edited_weight - 1) * is_edited_N
    loss = (weights_N * losses_N).sum() / weights_N.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return {
        "instruction_loss": losses_N[~is_edited_N].detach().mean(),
        "edited_caption_loss": losses_N[is_edited_N].detach().mean(),
        "edited_caption_accuracy": (logits_NV.argmax(-1) == targets_N)[is_edited_N].float().mean(),
    }


def _keep(path: str | Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    # Renamed into place, so that a crash while writing leaves the last checkpoint whole.
    states = [optimizer.state_dict() for optimizer in optimizers]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "optimizers": states, "step": step}, f"{path}.part")
    Path(f"{path}.part").replace(path)


def _restore(state: dict[str, Any], model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> None:
    model.load_state_dict(state["model"])
    for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(values)


@torch.inference_mode()
def measure(
    model_dir: str | Path,
    count: int,
    seed: int = 0,
    *,
    temperature: float = 0.7,
    top_p: float = 0.9,
    unseen: bool = False,
    device: str = "cpu",
    batch_size: int = 50,
) -> dict[str, float]:
    """Let the model edit `count` captions of held-out scenes, sampled freely as the recipes do (no grammar).

    Returns `valid` (parsed, changed), `consistent` (the instruction turns the caption's scene into the edited one's, of
    all outputs), and per kind of edit that the model chose: `consistent.<kind>` (of its valid ones) and `share.<kind>`.
    The scenes allow all kinds in equal parts.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    model.to(device)
    captions = [draw_triplet(rng, unseen=unseen, held_out=True)[0] for _ in range(count)]
    texts = []
    for first in range(0, count, batch_size):
        prompts = [tuned_prompt(caption) for caption in captions[first : first + batch_size]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(device)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        ids = model.generate(**inputs, max_new_tokens=128, **sampling)
        texts += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return _rates(captions, texts)


def _rates(captions: list[str], texts: list[str]) -> dict[str, float]:
    valid, right = 0, 0
    kinds: dict[str, list[bool]] = defaultdict(list)
    for caption, text in zip(captions, texts, strict=True):
        parsed = parse(text, caption)
        if parsed.reason:
            continue
        valid += 1
        is_right = consistent(caption, parsed.instruction, parsed.edited_caption) is None
        right += is_right
        kinds[edit_kind(caption, parsed.instruction) or "unreadable"].append(is_right)
    rates = {"valid": valid / len(texts), "consistent": right / len(texts)}
    for kind, outcomes in sorted(kinds.items()):
        rates |= {f"consistent.{kind}": sum(outcomes) / len(outcomes), f"share.{kind}": len(outcomes) / len(texts)}
    return rates
