"""Train a Sigmoid Head on a frozen language model with transformers' Trainer."""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import pyqe
from pyqe.demo import language_model, training_texts
from pyqe.training import HiddenStateDataset, SigmoidHeadTrainer, SigmoidHeadTrainingArguments, TextDataset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a folder or hub id; default SmolLM2-135M")
parser.add_argument("--output", default="head", help="folder of the head")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

name = options.model or language_model()
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
data = TextDataset(tokenizer, training_texts()[:100], block_size=128)
train, held_out = HiddenStateDataset.compute(model, data, rows=128).split(0.2)  # the model runs over the text once

head = pyqe.SigmoidHead.from_lm_head(model, tokenizer, kind="low_rank")
counts = pyqe.NegativeSampler.count_tokens(train.targets, head.config.vocab_size)
trainer = SigmoidHeadTrainer(
    model,
    head,
    SigmoidHeadTrainingArguments(options.output, max_steps=options.steps, learning_rate=3e-4),
    loss=pyqe.SigmoidHeadLoss(pyqe.NegativeSampler(unigram_counts=counts)),
    tokenizer=tokenizer,
    train_dataset=train,
    eval_dataset=held_out,
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"held-out loss {before:.4f} before, {trainer.evaluate()['eval_loss']:.4f} after")
head.save_pretrained(options.output)
