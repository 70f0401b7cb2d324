"""Train a Sigmoid Head on a frozen language model in a loop of one's own."""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pyqe
from pyqe.demo import language_model, training_texts
from pyqe.lm_head import LMHead
from pyqe.training import HiddenStateDataset, RowAdam, TextDataset, parameter_groups

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a folder or hub id; default SmolLM2-135M")
parser.add_argument("--output", default="head", help="folder of the head")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

name = options.model or language_model()
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
data = TextDataset(tokenizer, training_texts()[:100], block_size=128)
train, held_out = HiddenStateDataset.compute(model, data, rows=128).split(0.2)  # the model runs over the text once

lm_head = LMHead.from_model(model)
head = pyqe.SigmoidHead.from_lm_head(model, tokenizer, kind="low_rank")
counts = pyqe.NegativeSampler.count_tokens(train.targets, lm_head.vocab_size)
loss = pyqe.SigmoidHeadLoss(pyqe.NegativeSampler(unigram_counts=counts))
optimizer = RowAdam(parameter_groups(head), lr=3e-4)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)


def loss_of(states, rows=slice(None), **options):
    return loss(head, states.hidden[rows], states.labels[rows], lm_head, logsumexp=states.logsumexp[rows], **options)


for step in range(options.steps):
    value = loss_of(train, torch.randint(len(train.labels), (512,)))
    value.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        with torch.no_grad():
            print(f"step {step}: held-out loss {loss_of(held_out, generator=torch.Generator().manual_seed(0)):.4f}")
head.save_pretrained(options.output)
