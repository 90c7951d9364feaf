"""lm-evaluation-harness, `local-completions`: log-likelihoods and generation over a task of our own."""

import json
import os
import tempfile
from pathlib import Path

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": os.environ["ONEBASE_KEY"]}

import lm_eval
from lm_eval.tasks import TaskManager

TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "The capital of {{country}} is",
    "target_delimiter": " ",
}
CHOICE = {"output_type": "multiple_choice", "doc_to_choice": ["Paris", "Rome"], "doc_to_target": "{{answer}}"}
TEXT = {
    "output_type": "generate_until",
    "doc_to_target": "x",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
}

with tempfile.TemporaryDirectory() as folder:
    data = Path(folder) / "data.jsonl"
    data.write_text('{"country": "France", "answer": 0}\n{"country": "Italy", "answer": 1}\n')
    files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    for name, kind, metric in (("choice", CHOICE, "acc"), ("text", TEXT, "exact_match")):
        task = {"task": name, **TASK, **kind, **files, "metric_list": [{"metric": metric}]}
        (Path(folder) / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    for tokenized in (True, False):
        arguments = {
            "model": "plain",
            "base_url": f"{os.environ['ONEBASE_URL']}/v1/completions",
            "tokenizer": os.environ["ONEBASE_TOKENIZER"],
            "tokenized_requests": tokenized,
            "max_length": 512,
        }
        found = lm_eval.simple_evaluate(
            model="local-completions",
            model_args=arguments,
            tasks=["choice", "text"],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
        )
        samples = found["samples"]["choice"]
        # The stand-in gives every token the same log-probability, so the sum tells how many were scored.
        scores = [response[0][0] for sample in samples for response in sample["resps"]]
        assert len(scores) == 4
        assert all(score < 0 for score in scores)
        assert len(found["samples"]["text"]) == 2
print("lm-eval: well")
