#!/usr/bin/env bash
# Draw a small data set, train a tiny InternVL-X on two ranks (CPU, or one GPU each), answer held-out questions,
# export the model to Hugging Face's format and let transformers answer them again.
# Further arguments are passed to pretrain_vlm.py:  bash examples/demo/run.sh --train-iters 100
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
out=${DEMO_OUT:-runs/demo}

"$python" tools/make_demo_data.py --out "$out/data"
rm -rf "$out/checkpoints" "$out/hf" "$out/evaluation"
# NCCL does not support two ranks on one GPU: with one GPU, train without a pipeline.
ranks=2
if [ "$("$python" -c 'import torch; print(torch.cuda.device_count())')" = 1 ]; then ranks=1; fi
# One thread per rank: two ranks share two cores.
OMP_NUM_THREADS=1 "$python" -m megatron_internvlx.launch --standalone --nproc-per-node $ranks pretrain_vlm.py \
  --recipe examples/demo/demo.yaml --pipeline-model-parallel-size $ranks \
  --data "$out/data/meta.json" --valid-data "$out/data/meta_val.json" \
  --tokenizer-model "$out/data/tokenizer" \
  --save "$out/checkpoints" \
  --predictions-file "$out/predictions.jsonl" --report-file "$out/report.png" "$@"
# Other arguments may be a shorter training, from which less is to be expected.
if [ $# = 0 ]; then "$python" tools/demo_goals.py "$out/predictions.jsonl"; fi
# The answers of the exported model, generated token by token: the same as those above.
"$python" tools/convert_checkpoint.py export --load "$out/checkpoints" --hf "$out/hf" --quiet
"$python" tools/evaluate.py --hf "$out/hf" --data "$out/data/meta_val.json" --out "$out/evaluation" \
  --batch-size 64 --max-new-tokens 4
echo "checkpoint: $out/checkpoints   exported: $out/hf   page: $out/evaluation/page.html"
