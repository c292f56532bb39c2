"""Supervised tuning of a language model on triplets (section 3.1.1 of the paper), by trl's SFTTrainer."""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ip2p.captions.prompt import answer, tuned_prompt
from ip2p.captions.triplets import Triplet, problems
from ip2p.errors import UserError
from ip2p.models import load_language_model
from ip2p.recipe import Recipe, Tune
from ip2p.records import digest


def usable(triplets: Sequence[Triplet], names_type: bool) -> list[Triplet]:
    """Those that can be trained on, each once.

    Raises `UserError`, with the first three faults, when a tenth of them or more can't: then the file is the fault.
    """
    good: list[Triplet] = []
    bad: list[str] = []
    for triplet in triplets:
        faults = problems(triplet)
        if names_type and triplet.edit_type is None:
            faults.append("edit_type is missing, and answers are to name it")
        if faults:
            bad.append(f"{triplet.caption!r}: {faults[0]}")
        else:
            good.append(triplet)
    if 10 * len(bad) >= len(triplets):
        said = "; ".join(bad[:3]) or "the file is empty"
        raise UserError(f"tune.triplets: {len(bad)} of {len(triplets)} can't be trained on ({said})")
    return list(dict.fromkeys(good))


def split(triplets: Sequence[Triplet], settings: Tune) -> tuple[list[Triplet], list[Triplet]]:
    """(to train on, held out), by caption: all triplets of a caption fall on one side. One at least is held out."""
    order = sorted({triplet.caption for triplet in triplets}, key=lambda caption: digest("tune", caption))
    held_out = set(order[: max(1, round(settings.validation_fraction * len(order)))])
    if len(held_out) == len(order):
        raise UserError("tune.triplets: they are all of one caption; none is left to train on when it is held out")
    return (
        [triplet for triplet in triplets if triplet.caption not in held_out],
        [triplet for triplet in triplets if triplet.caption in held_out],
    )


def make_trainer(
    recipe: Recipe,
    triplets: Sequence[Triplet],
    held_out: Sequence[Triplet],
    folder: str | Path,
    callbacks: Sequence[TrainerCallback] = (),
    on_gpu: bool = False,
) -> SFTTrainer:
    """A trainer of `models.llm` whose loss is that of the answers alone, with a checkpoint in `folder` an epoch.

    `.train()` tunes; `.train(resume_from_checkpoint=...)` goes on with one of the checkpoints.
    """
    settings = recipe.tune
    model, tokenizer = load_language_model(recipe.models.llm)
    lora = None
    if settings.lora_rank is not None:
        lora = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    arguments = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        completion_only_loss=True,
        max_length=recipe.instructions.max_model_len,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=1,
        seed=recipe.seed,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=on_gpu,
        dataloader_pin_memory=on_gpu,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=as_dataset(triplets),
        eval_dataset=as_dataset(held_out),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)  # of every metric there is; the caller's callbacks say what matters
    return trainer


def as_dataset(triplets: Sequence[Triplet]) -> Dataset:
    """prompt and completion, as the job that asks the model writes the one and reads the other."""
    return Dataset.from_list(
        [{"prompt": tuned_prompt(triplet.caption), "completion": answer(*triplet[1:])} for triplet in triplets]
    )


def export(recipe: Recipe, checkpoint: str | Path, folder: str | Path) -> None:
    """Write the tuned model of a trainer's checkpoint, adapter merged, with its tokenizer: what vLLM loads."""
    if (Path(checkpoint) / "adapter_config.json").exists():
        model, tokenizer = load_language_model(recipe.models.llm, adapter=str(checkpoint))
    else:
        tuned = recipe.models.llm.model_copy(update={"path": str(checkpoint), "revision": None})
        model, tokenizer = load_language_model(tuned)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
