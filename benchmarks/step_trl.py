"""TRL's side of `step.py`: a script that imports nothing of megafork. It takes a step for each line of its input, and answers each with the
step's seconds and sampled tokens."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class InTurn(TrainerCallback):
    """Makes `updates` of TRL's steps, which share one generation, a step of ours."""

    def __init__(self, updates: int, responses: int) -> None:
        self.updates = updates
        self.responses = responses
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever else is printed

    def on_step_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if state.global_step % self.updates == 0:
            sys.stdin.readline()
            self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if state.global_step % self.updates == 0:
            seconds = time.perf_counter() - self.start
            length = self.trainer._metrics["train"]["completions/mean_length"][-1]
            self.answers.write(json.dumps([seconds, length * self.responses]) + "\n")
            self.answers.flush()


def main(task: dict[str, Any], model: str, folder: str, steps: int) -> None:
    torch.set_num_threads(2)
    responses, updates = task["prompts"] * task["samples"], task["minibatches"]
    turns = InTurn(updates, responses)
    turns.trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **row: [float(len(text) % 2) for text in completions],
        train_dataset=Dataset.from_list([{"prompt": text} for text in task["texts"]]),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        callbacks=[turns],
        args=GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=responses // updates,
            steps_per_generation=updates,
            num_generations=task["samples"],
            max_steps=steps * updates,
            max_completion_length=task["tokens"],
            learning_rate=1e-6,
            loss_type="dapo",
            epsilon_high=0.28,
            beta=0.0,
            top_entropy_quantile=0.2,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            model_init_kwargs={"dtype": "float32"},
        ),
    )
    turns.trainer.train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
