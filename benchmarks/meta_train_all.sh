#!/usr/bin/env bash
# Meta-trains the shipped weights, one process a GPU, then evaluates them on the held-out tasks.
#   benchmarks/meta_train_all.sh OUT SECONDS EVAL_SECONDS [CONFIG ...]
# OUT gets weights.tar.gz (weights, curves, settings and logs), records.json and speed_up.png.
# Both limits are wall-clock seconds; SECONDS 0: the outer steps of the configs, however long they
# take. EVAL_SECONDS 0: no evaluation. Trainings beyond the number of GPUs share them.
set -u
out=$1 seconds=$2 eval_seconds=$3
shift 3
configs=${*:-small_fc_lopt celo_small velo_small celo2_small small_fc_lopt_h4}
python=${PYTHON:-python3}
gpus=${GPUS:-$(nvidia-smi -L | wc -l)}
work=$(mktemp -d)
mkdir -p "$out"
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1

train() {
  local budget=""
  [ "$seconds" -gt 0 ] && budget="--seconds $seconds"
  CUDA_VISIBLE_DEVICES=$(($1 % gpus)) timeout $((seconds > 0 ? seconds + 60 : 0)) \
    $python -m lopt_jax.meta.cli meta-train "$2" --out "$work/$2" $budget ${EXTRA:-} \
    >"$work/$2.log" 2>&1
}
i=0
for config in $configs; do
  train $i "$config" &
  i=$((i + 1))
done
wait
for config in $configs; do
  echo "== $config"; tail -n 4 "$work/$config.log"
done
pack() {
  (cd "$work" && tar czf "$out/weights.tar.gz" --exclude=checkpoints ./*)
}
pack

if [ "$eval_seconds" -gt 0 ]; then
  weights=""
  for config in $configs; do
    [ -d "$work/$config/weights" ] && weights="$weights $config=$work/$config/weights"
  done
  # One process a group of tasks; the wide and the deep ones on different GPUs.
  groups="${GROUPS_OF_TASKS:-digits_mlp_512x2,cancer_mlp_32x2 bytes_transformer_64,digits_mlp_128 \
    bytes_transformer_32,cancer_mlp_norm_64x3 digits_transformer digits_conv_32,flower_autoencoder}"
  j=0
  for group in $groups; do
    CUDA_VISIBLE_DEVICES=$((j % gpus)) timeout "$eval_seconds" $python -m lopt_jax.meta.cli \
      meta-eval $weights --tasks "$group" --horizons "${HORIZONS:-200,1000}" \
      --baselines "${BASELINES:-all}" --seeds "${SEEDS:-5}" \
      --json "$work/eval_$j.json" >"$work/eval_$j.log" 2>&1 &
    j=$((j + 1))
  done
  wait
  $python -m lopt_jax.meta.cli meta-eval --merge "$work"/eval_*.json \
    --json "$out/records.json" --plot "$out/speed_up.png"
  tail -n 2 "$work"/eval_*.log
  pack
fi
rm -rf "$work"
