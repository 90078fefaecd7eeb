# shellcheck shell=bash
# What the batch scripts share; they source it. From SLURM's variables to programs that run on the job's nodes:
#
#   python_here PROGRAM...     one process, on the first node
#   train_here FLAGS...        train.py on all nodes, watched by supervise.py, which takes the batch script's place
#
# No node is reached by ssh, nodes are told numbers, not names, and no cluster's habits are assumed: those are in site.sh.
set -euo pipefail

die() { echo "error: $*" >&2; exit 2; }

home=${GFRNN_HOME:-${SLURM_SUBMIT_DIR:-.}}
[ -f "$home/slurm/launch.sh" ] || die "$home is not a checkout of gfrnn; submit from its root, or export GFRNN_HOME"
cd "$home"
set +eu   # modules and conda are not written for these
# shellcheck source=slurm/site.sh
. "${GFRNN_SITE:-$home/slurm/site.sh}"
set -eu
# shellcheck source=slurm/address.sh
. "$home/slurm/address.sh"
[ -n "${SLURM_JOB_ID:-}" ] || die "this is a batch script: sbatch $0"

[ -n "${GFRNN_PYTHON:-}" ] || { GFRNN_PYTHON=python3; [ ! -x .venv/bin/python ] || GFRNN_PYTHON=$PWD/.venv/bin/python; }
read -r -a container <<< "${GFRNN_CONTAINER:-}"
python=("${container[@]}" "$GFRNN_PYTHON")
on_host=$GFRNN_PYTHON   # what needs SLURM's own programs
[ ${#container[@]} -eq 0 ] || on_host=${GFRNN_HOST_PYTHON:-python3}

GFRNN_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd ' ')
restart=${SLURM_RESTART_COUNT:-0}

# The first node's address, which is this one's: of the interface in site.sh, or as SLURM reaches it.
if [ -n "${GFRNN_INTERFACE:-}" ]; then
  MASTER_ADDR=$(ip -o addr show dev "$GFRNN_INTERFACE" | awk '$3 ~ /^inet/ {sub("/.*", "", $4); print $4; exit}' || true)
  [ -n "$MASTER_ADDR" ] || die "$(hostname) has no network interface $GFRNN_INTERFACE; GFRNN_INTERFACE is another here"
  export GLOO_SOCKET_IFNAME=$GFRNN_INTERFACE NCCL_SOCKET_IFNAME="=$GFRNN_INTERFACE"
else
  MASTER_ADDR=$(number_of "$(scontrol show node "${GFRNN_NODES%% *}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')" "${GFRNN_NODES##* }")
fi
# Two ports of a job and restart, below those that systems hand out by themselves: jobs on one node do not meet, nor does
# a restart meet what a lost node's processes still hold.
port=$((20000 + 2 * ((SLURM_JOB_ID + 1009 * restart) % 6000)))
MASTER_PORT=$((port + 1))
GFRNN_RESTART=$SLURM_JOB_ID.$restart
# SLURM_EXPORT_ENV: after `sbatch --export=NONE` srun would hand on nothing of this
export GFRNN_NODES GFRNN_RESTART MASTER_ADDR MASTER_PORT PYTHONUNBUFFERED=1 SLURM_EXPORT_ENV=ALL

# What srun takes from sbatch only where this says so, since SLURM 22.05
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# python_here PROGRAM...: becomes `python PROGRAM...` on the first node
python_here() { exec srun --nodes=1 --ntasks=1 "${python[@]}" "$@"; }

# tasks_per_node: that sbatch was asked for; 1 if for none
tasks_per_node() {
  local tasks=${SLURM_NTASKS_PER_NODE:-} all=${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}
  if [ -z "$tasks" ]; then
    [ $((all % SLURM_JOB_NUM_NODES)) -eq 0 ] || die "$all tasks are not as many on each of $SLURM_JOB_NUM_NODES nodes: give --ntasks-per-node"
    tasks=$((all / SLURM_JOB_NUM_NODES))
  fi
  echo "$tasks"
}

# processes_per_node TASKS: the tasks of a node, else from site.sh, else its GPUs; 1 where there are none of these
processes_per_node() {
  local tasks=$1 gpus=${SLURM_GPUS_ON_NODE:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}
  if [ "$tasks" -gt 1 ]; then echo "$tasks"
  elif [ -n "${GFRNN_PROCESSES_PER_NODE:-}" ]; then echo "$GFRNN_PROCESSES_PER_NODE"
  elif [ "${gpus:-0}" -gt 0 ]; then echo "$gpus"
  else echo 1; fi
}

# value_of FLAG ARGUMENTS...: what the last FLAG is given, as `FLAG VALUE` or `FLAG=VALUE`
value_of() {
  local flag=$1 found=; shift
  while [ $# -gt 0 ]; do
    case $1 in "$flag") found=${2:-};; "$flag="*) found=${1#*=};; esac
    shift
  done
  echo "$found"
}

# train_here FLAGS...: becomes the supervisor of `train.py FLAGS` on all nodes of the job
train_here() {
  local run tasks per_node node step cores=${SLURM_CPUS_PER_TASK:-} gpus=${SLURM_GPUS_PER_TASK:-0}
  run=$(value_of --output-dir "$@")
  if [ -z "$run" ]; then
    run=runs/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}
    set -- "$@" --output-dir "$run"
  fi
  [ -n "$(value_of --deepspeed "$@")" ] || set -- "$@" --deepspeed ds_configs/z2.json
  tasks=$(tasks_per_node)
  per_node=$(processes_per_node "$tasks")
  # GPUs that were asked for must work: without this a node with a broken driver would train on its cores
  [ "${SLURM_GPUS_ON_NODE:-0}" = 0 ] || export DS_ACCELERATOR=${DS_ACCELERATOR:-cuda}
  GFRNN_CONTROL=$(realpath -m "$run")/.job-$SLURM_JOB_ID/$restart
  export GFRNN_CONTROL GFRNN_PER_NODE=$per_node
  mkdir -p "$GFRNN_CONTROL"
  for node in $GFRNN_NODES; do echo "$node slots=$per_node"; done > "$GFRNN_CONTROL/hostfile"
  echo "$(date +%T) job $SLURM_JOB_ID, restart $restart: $per_node a node on $GFRNN_NODES; $MASTER_ADDR:$MASTER_PORT; $run"
  # --wait, --kill-on-bad-exit: who has failed, and when to give up, is the supervisor's to say
  step=(srun --nodes="$SLURM_JOB_NUM_NODES" --wait=0 --kill-on-bad-exit=0)
  local a_task_a_node=(--ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
  local a_task_a_rank=(--ntasks=$((tasks * SLURM_JOB_NUM_NODES)) --ntasks-per-node="$tasks" --distribution=block)
  # one task a node has all of the job's cores there; where each task has its own GPUs, each looks at them in preflight
  [ -z "$cores" ] || a_task_a_node+=(--cpus-per-task=$((cores * tasks)))
  local preflight=("${step[@]}" "${a_task_a_node[@]}") training=("${step[@]}" "${a_task_a_node[@]}")
  if [ "$tasks" -gt 1 ]; then
    training=("${step[@]}" "${a_task_a_rank[@]}")
    [ "$gpus" = 0 ] || preflight=("${training[@]}")
  fi
  exec "$on_host" slurm/supervise.py --output-dir "$run" \
    --preflight "${preflight[@]}" bash slurm/on_node.sh preflight "$port" "${python[@]}" -m gfrnn.training.preflight \
    --output-dir "$run" --per-node "$per_node" --timeout "${GFRNN_START_SECONDS:-300}" \
    --training "${training[@]}" bash slurm/on_node.sh training "$MASTER_PORT" "${python[@]}" src/train.py "$@"
}
