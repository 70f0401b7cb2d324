"""Fine-tune a language model with TRL's SFTTrainer, and train a Sigmoid Head beside it on the same hidden states."""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import pyqe
from pyqe.demo import language_model, training_texts
from pyqe.training import SigmoidHeadCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a folder or hub id; default SmolLM2-135M")
parser.add_argument("--output", default="sft", help="folder of the model; the head goes to its subfolder head")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

name = options.model or language_model()
model, tokenizer = AutoModelForCausalLM.from_pretrained(name, dtype="float32"), AutoTokenizer.from_pretrained(name)
rows = Dataset.from_list([{"text": text} for text in training_texts()[:100]]).train_test_split(0.2, seed=0)

head = pyqe.SigmoidHead.from_lm_head(model, tokenizer, kind="low_rank")
loss = pyqe.SigmoidHeadLoss(pyqe.NegativeSampler(("uniform", "softmax")))
settings = {"max_steps": options.steps, "max_length": 128, "per_device_train_batch_size": 4, "report_to": "none"}
trainer = SFTTrainer(
    model,
    SFTConfig(options.output, eval_strategy="steps", eval_on_start=True, logging_steps=5, bf16=False, **settings),
    train_dataset=rows["train"],
    eval_dataset=rows["test"],
    processing_class=tokenizer,
    callbacks=[SigmoidHeadCallback(head, loss)],  # all there is to it
)
trainer.train()
losses = [entry["eval_head_loss"] for entry in trainer.state.log_history if "eval_head_loss" in entry]
print(f"held-out loss {losses[0]:.4f} before, {losses[-1]:.4f} after")
trainer.save_model()
head.save_pretrained(f"{options.output}/head")
