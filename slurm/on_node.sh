#!/usr/bin/env bash
# on_node.sh preflight|training|measure PORT PYTHON... PROGRAM...: what srun starts for each task, from its SLURM variables.
#
#   preflight   a process a node; with a GPU of its own for each task, a process for each of these
#   measure     a process a task
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
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    IFS=, read -r -a devices <<< "$CUDA_VISIBLE_DEVICES"
    devices=("${devices[@]:0:$GFRNN_PER_NODE}") slots=0
    for device in "${devices[@]}"; do
      if [[ ! $device =~ ^[0-9]+$ ]]; then
        echo "error: GPU $device of $SLURMD_NODENAME has no number, which DeepSpeed's launcher needs: give a task a GPU, --ntasks-per-node" >&2
        exit 2
      fi
      [ "$device" -lt "$slots" ] || slots=$((device + 1))
    done
    hostfile=$GFRNN_CONTROL/hostfile-$SLURM_NODEID
    ids=$(IFS=,; echo "${devices[*]}")
    for node in $GFRNN_NODES; do echo "$node slots=$slots"; done > "$hostfile"
    include=(--include "$(for node in $GFRNN_NODES; do echo "$node:$ids"; done | paste -sd @)")
  fi
  exec "${python[@]}" -m deepspeed.launcher.runner --log_level critical --hostfile "$hostfile" "${include[@]}" --no_ssh \
    --node_rank "$SLURM_NODEID" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"
fi

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$((SLURM_STEP_NUM_TASKS / SLURM_STEP_NUM_NODES))
[ "$what" = preflight ] || [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
case ${CUDA_VISIBLE_DEVICES:-} in
  *,* | "") ;;
  *) LOCAL_RANK=0;;   # --gpus-per-task=1: each task sees its own GPU alone
esac
exec "$@"
