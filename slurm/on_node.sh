#!/usr/bin/env bash
# on_node.sh preflight|training PORT PYTHON... PROGRAM...: what srun starts for each task, from its SLURM variables.
#
#   preflight   a process a node
#   training    with a task a node: the DeepSpeed launcher, which starts the node's ranks; with a task a GPU: a rank
set -euo pipefail
what=$1 MASTER_PORT=$2
shift 2
export MASTER_PORT

if [ "$what" = training ] && [ "$SLURM_STEP_NUM_TASKS" -eq "$SLURM_STEP_NUM_NODES" ]; then
  python=()
  while [ "$1" != src/train.py ]; do python+=("$1"); shift; done
  # The launcher numbers a node's GPUs from 0; which ones SLURM gave this job is in CUDA_VISIBLE_DEVICES, and all nodes
  # must be named, though each reads its own devices alone.
  hostfile=$GFRNN_CONTROL/hostfile include=()
  if [[ ${CUDA_VISIBLE_DEVICES:-} =~ ^[0-9]+(,[0-9]+)*$ ]]; then
    mapfile -t -d , devices <<< "$CUDA_VISIBLE_DEVICES,"
    devices=("${devices[@]:0:$GFRNN_PER_NODE}")
    hostfile=$GFRNN_CONTROL/hostfile-$SLURM_NODEID
    ids=$(IFS=,; echo "${devices[*]}")
    for node in $GFRNN_NODES; do echo "$node slots=$((${devices[-1]} + 1))"; done > "$hostfile"
    include=(--include "$(for node in $GFRNN_NODES; do echo "$node:$ids"; done | paste -sd @)")
  fi
  exec "${python[@]}" -m deepspeed.launcher.runner --log_level critical --hostfile "$hostfile" "${include[@]}" --no_ssh \
    --node_rank "$SLURM_NODEID" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"
fi

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$GFRNN_PER_NODE
[ "$what" = preflight ] || [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
case ${CUDA_VISIBLE_DEVICES:-} in
  *,* | "") ;;
  *) LOCAL_RANK=0;;   # --gpus-per-task=1: each task sees its own GPU alone
esac
exec "$@"
