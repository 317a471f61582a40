"""Number of batches of an evaluation, and the files of its answers."""

import argparse
import json

import pytest

from megatron_internvlx.training.validation import evaluation_batches, settle_validation


@pytest.mark.parametrize("records", [1, 2, 7, 64, 77, 1000])
@pytest.mark.parametrize("batch", [4, 8, 64, 1024])
@pytest.mark.parametrize(("replicas", "group"), [(1, 1), (4, 1), (4, 2), (2, 4)])
def test_batches_hold_all_records_and_little_more(records, batch, replicas, group):
    count, size = evaluation_batches(records, batch=batch, replicas=replicas, group=group)
    assert size % (replicas * group) == 0
    assert count * size >= records
    assert (count - 1) * size < records  # no batch without a record
    assert size <= max(batch, replicas * group) + replicas * group
    if records < batch:
        assert size - records < replicas * group


BATCHES = {
    "seq_length": 64,
    "micro_batch_size": 1,
    "global_batch_size": 8,
    "eval_iters": 12,
    "eval_interval": 100,
    "eval_global_batch_size": 8,
    "eval_micro_batch_size": 2,
    "train_iters": 100,
    "seed": 1,
}
PARALLEL = {
    "rank": 0,
    "world_size": 2,
    "data_parallel_size": 2,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "pipeline_model_parallel_layout": None,
    "virtual_pipeline_model_parallel_size": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "sequence_parallel": False,
    "use_distributed_optimizer": False,
    "microbatch_group_size_per_vp_stage": None,
}
FILES = {
    "save": None,
    "load": None,
    "pretrained_checkpoint": None,
    "ckpt_step": None,
    "finetune": False,
}


def arguments(meta, **changes):
    given = {
        "valid_data": str(meta) if meta else None,
        "valid_records": None,
        "full_validation": True,
        "predictions_file": None,
        "report_file": None,
        **BATCHES,
        **PARALLEL,
        **FILES,
    }
    return argparse.Namespace(**given | changes)


@pytest.fixture
def meta(tmp_path):
    record = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    (tmp_path / "a.jsonl").write_text((json.dumps(record) + "\n") * 77)
    path = tmp_path / "meta.json"
    path.write_text(json.dumps({"a": {"root": "", "annotation": "a.jsonl", "repeat_time": 3}}))
    return path


@pytest.mark.parametrize("iterations", [0, 2, 1000])
def test_all_records_are_evaluated_whatever_eval_iters_is(meta, capsys, iterations):
    args = arguments(meta, eval_iters=iterations)
    assert len(settle_validation(args)) == 77
    assert (args.eval_iters, args.eval_global_batch_size) == (10, 8)  # 80 places, three of them for fillers
    assert args.full_validation is False  # Megatron's own would ask our iterator for its length
    assert "77 held-out records" in capsys.readouterr().out


@pytest.mark.parametrize(("group", "size"), [(None, 8), (4, 16), (8, 32)])
def test_virtual_stages_need_whole_groups_of_micro_batches(meta, group, size):
    stages = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    args = arguments(meta, valid_records=5, microbatch_group_size_per_vp_stage=group, **stages)
    settle_validation(args)
    assert args.eval_global_batch_size == size


def test_some_records_only(meta):
    args = arguments(meta, valid_records=5)
    settle_validation(args)
    assert (args.eval_iters, args.eval_global_batch_size) == (1, 8)


def test_no_validation_without_data(capsys):
    args = arguments(None)
    settle_validation(args)
    assert args.eval_iters == 0
    assert "not validated" in capsys.readouterr().out


def test_answers_are_written_beside_the_checkpoints(meta, tmp_path):
    args = arguments(meta, save=str(tmp_path / "run"))
    settle_validation(args)
    assert args.predictions_file == str(tmp_path / "run" / "predictions.jsonl")
