# shellcheck shell=bash disable=SC2034
# What is peculiar to one cluster, in one place: submit.py and every batch script read it; before a bare sbatch, `. slurm/site.sh`.
# Everything may stay as it is; sbatch's own flags win over it.

# --- where jobs go: sbatch reads these itself (man sbatch, INPUT ENVIRONMENT VARIABLES)
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=myproject
# export SBATCH_QOS=normal
# export SBATCH_GPUS_PER_NODE=8
# export SBATCH_EXCLUSIVE=user        # all cores of a node; or give --cpus-per-task

# --- the software of a compute node
# module load cuda
# export GFRNN_PYTHON=/shared/gfrnn/.venv/bin/python     # default: .venv/bin/python of the checkout, else python3
# export GFRNN_CONTAINER="apptainer exec --nv /shared/gfrnn.sif"   # put before the Python of every task; words without quotes
# export GFRNN_HOST_PYTHON=python3.9   # with a container: what watches the job, outside it; 3.9 or newer

# --- the network: default is the interface that reaches the first node's address
# export GFRNN_INTERFACE=ib0

# --- processes a node: default is its GPUs, or 1 where it has none
# export GFRNN_PROCESSES_PER_NODE=4

# --- after how many seconds a process is given up (slurm/supervise.py --help)
# export GFRNN_SILENT_SECONDS=60 GFRNN_STALLED_SECONDS=900 GFRNN_START_SECONDS=300 GFRNN_STOP_SECONDS=240

# --- tracking, if not in a SQLite file beside the run
# export MLFLOW_TRACKING_URI=https://mlflow.example.org
