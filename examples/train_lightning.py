"""Train a Sigmoid Head on a frozen language model with Lightning."""

import argparse

import lightning
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import pyqe
from pyqe.demo import language_model, training_texts
from pyqe.training import RowAdam, TextDataset, TrainingModule, collate, parameter_groups

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a folder or hub id; default SmolLM2-135M")
parser.add_argument("--output", default="head", help="folder of the head")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()


class HeadModule(lightning.LightningModule):
    def __init__(self, lm, head, loss):
        super().__init__()
        self.module = TrainingModule(lm, head, loss)  # its parameters are the head's: checkpoints hold no LM

    def training_step(self, batch, _):
        return self.module(**batch)["loss"]

    def on_validation_epoch_start(self):
        self.module.restart_evaluation()

    def validation_step(self, batch, _):
        self.log("held_out_loss", self.module(**batch)["loss"])

    def configure_optimizers(self):
        optimizer = RowAdam(parameter_groups(self.module.head), lr=3e-4)
        return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, options.steps), "interval": "step"}]


name = options.model or language_model()
trainer = lightning.Trainer(max_steps=options.steps, default_root_dir=options.output, log_every_n_steps=5)
model = AutoModelForCausalLM.from_pretrained(name).to(trainer.strategy.root_device)
tokenizer, texts = AutoTokenizer.from_pretrained(name), training_texts()
train, held_out = (TextDataset(tokenizer, part, block_size=128) for part in (texts[:80], texts[80:100]))

head = pyqe.SigmoidHead.from_lm_head(model, tokenizer, kind="low_rank")
module = HeadModule(model, head, pyqe.SigmoidHeadLoss(pyqe.NegativeSampler(("uniform", "softmax"))))
batches = {"batch_size": 4, "collate_fn": collate}
trainer.validate(module, DataLoader(held_out, **batches))
trainer.fit(module, DataLoader(train, shuffle=True, **batches))
trainer.validate(module, DataLoader(held_out, **batches))
head.save_pretrained(options.output)
