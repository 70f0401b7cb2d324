"""Temperatures of Llama-2 chat models without labels: where they agree best with their base models.

PYQE_DATA=/path/to/data python benchmarks/reproduce/aligned.py [-o aligned.json]

10,000 multiple-choice questions each, the logits of the choices A to D of both models. The temperature minimises the
mean KL divergence from the base model's distribution, over all questions (He et al. 2023, arXiv 2310.11732) or over
those for which both models prefer the same choice (DACA, arXiv 2505.16690).
"""

from __future__ import annotations

import sys

import numpy as np
from data import Reproduction, data_path, main
from scipy.special import softmax

from pyqe.calibration import DistilledTemperature

# On all questions, and on those where the two agree; the others are not known from elsewhere
EXPECTED = {
    ("llama2-7b", "mmlu"): ("5.53", "4.71"),
    ("llama2-13b", "mmlu"): ("3.02", "2.61"),
    ("llama2-70b", "mmlu"): ("2.00", "1.61"),
    ("llama2-7b", "hellaswag"): None,
    ("llama2-13b", "hellaswag"): None,
    ("llama2-70b", "hellaswag"): ("1.87", "1.64"),
}
CHOICES = 4  # of A-F, E being "I don't know" and F "none of the above"


def reproduce() -> Reproduction:
    result = Reproduction(
        "Temperatures of aligned models from their base models", {"choices": "A-D", "model": "Llama-2 chat"}
    )
    with np.load(data_path("option_logits/llama2_base_chat.npz")) as data:
        logits = {name: data[name][:, :CHOICES] for name in data.files}
    for (model, task), expected in EXPECTED.items():
        aligned, base = logits[f"{model}|{task}|chat"], logits[f"{model}|{task}|base"]
        fits = [
            DistilledTemperature(inputs="logits", teacher_inputs="logits", agreement_only=only).fit(aligned, base)
            for only in (False, True)
        ]
        for index, (name, fit) in enumerate(zip(("all", "agreement only"), fits, strict=True)):
            if expected is None:
                result.note(f"{model} {task}: T, {name}", f"{fit.temperature_:.2f}")
            else:
                result.printed(f"{model} {task}: T, {name}", expected[index], fit.temperature_)
            result.note(f"{model} {task}: KL before and after, {name}", f"{fit.kl_before_:.4f} {fit.kl_:.4f}")
        result.note(f"{model} {task}: share of agreement", f"{fits[0].agreement_:.4f}")
        confidence = [fits[0].transform(aligned), fits[1].transform(aligned)]
        means = [table.max(1).mean() for table in (softmax(base, axis=1), softmax(aligned, axis=1), *confidence)]
        result.note(
            f"{model} {task}: mean confidence of base, chat, chat at both T", " ".join(f"{mean:.3f}" for mean in means)
        )
    return result


if __name__ == "__main__":
    sys.exit(main(reproduce, "Temperatures of aligned models from their base models."))
