#!/usr/bin/env python
"""Block skipping in transformers' Trainer, and so in loops like it: records are data, ``compute_loss`` uses them."""

from __future__ import annotations

from dataclasses import fields

import torch
from flux_samples import load_pipeline, make_samples
from peft import LoraConfig
from transformers import Trainer, TrainingArguments

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer, SpanResiduals, lora_targets


RECORDED = tuple(field.name for field in fields(SpanResiduals))
SHARED = ("txt_ids", "img_ids")  # positions, the same for every sample and without a batch dimension


def make_records(model, samples):
    """Each sample's inputs, target and residuals in one flat dictionary, as datasets have them."""
    records = []
    for inputs, target in samples:
        tensors = {name: value for name, value in inputs.items() if value is not None}
        records.append({**tensors, "target": target, **model.capture_residuals(**inputs).tensors()})
    return records


def collate(records):
    """Join records to a batch."""
    return {
        name: records[0][name] if name in SHARED else torch.cat([record[name] for record in records])
        for name in records[0]
    }


class BlockSkipTrainer(Trainer):
    """A Trainer whose model is a :class:`DiTBlockSkipTransformer` and whose batches hold its residuals."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Squared error of the velocity, from the kept blocks and the batch's residuals."""
        batch = dict(inputs)
        target = batch.pop("target")
        residuals = SpanResiduals(**{name: batch.pop(name, None) for name in RECORDED})
        prediction = model(**batch, residuals=residuals, return_dict=False)[0]
        loss = (prediction - target).square().mean()
        return (loss, {"prediction": prediction}) if return_outputs else loss


def train(transformer, samples, config, output_dir, epochs=8):
    """Train LoRA in the kept blocks and return the loss of each epoch."""
    model = DiTBlockSkipTransformer(transformer, config)
    records = make_records(model, samples)
    transformer.requires_grad_(False)
    targets = lora_targets(model, ["to_q", "to_k", "to_v"])
    transformer.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=targets))
    arguments = TrainingArguments(
        output_dir=output_dir,
        num_train_epochs=epochs,
        per_device_train_batch_size=2,
        learning_rate=4e-3,
        lr_scheduler_type="constant",
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = BlockSkipTrainer(model=model, args=arguments, train_dataset=records, data_collator=collate)
    trainer.train()
    model.remove()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    """Personalise the embedded model a little, then leave it as it was."""
    pipeline = load_pipeline()
    losses = train(pipeline.transformer, make_samples(pipeline), BlockSkipConfig(leading=3, trailing=5), "trainer-out")
    print("loss of each epoch:", " ".join(f"{loss:.4f}" for loss in losses))
    pipeline.transformer.save_lora_adapter("trainer-loop-lora")
    pipeline.transformer.unload_lora()


if __name__ == "__main__":
    main()
