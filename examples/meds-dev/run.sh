#!/bin/sh
# Runs the entry by the helpers of MEDS-DEV: labels of a task, training, predictions, evaluation.
# usage: run.sh MEDS_FOLDER OUTPUT [TASK] [option=value of meds-dev-model ...]
set -eu
data=$(realpath "$1") output=$(realpath -m "$2") task=${3:-mortality/in_icu/first_24h}
shift $(($# < 3 ? $# : 3))
here=$(dirname "$(realpath "$0")")
models=$(python -c 'import MEDS_DEV; print(MEDS_DEV.__path__[0] + "/models")')
mkdir -p "$models/clinattn"
cp "$here/model.yaml" "$here/requirements.txt" "$here/to_double.py" "$models/clinattn"

meds-dev-task task="$task" dataset=MIMIC-IV dataset_dir="$data" output_dir="$output/labels"
meds-dev-model model=clinattn mode=full dataset_type=full dataset_name=MIMIC-IV task_name="$task" \
  dataset_dir="$data" labels_dir="$output/labels" output_dir="$output/model" "$@"
meds-dev-evaluation predictions_dir="$output/model/MIMIC-IV/$task/predict" output_dir="$output/evaluation"
cat "$output/evaluation/results.json"
