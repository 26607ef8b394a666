#!/bin/bash
# AGRO on a Slurm allocation: one Ray node a Slurm node, the job submitted to it, gone on with where the allocation was taken.
#
#   sbatch --nodes=2 deploy/slurm.sh configs/llama3_8b_math.yaml learner.ranks=8 actors.count=8
#
# The repository with its .venv, the run directory, model and data lie on a file system that all nodes see. Submit from the
# repository. AGRO_RUN_DIR names the run (else runs/slurm-<job id>): the same name again goes on with it.
#SBATCH --job-name=agro
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?submit with sbatch}"
export PATH="$PWD/.venv/bin:$PATH"
run_dir="${AGRO_RUN_DIR:-$PWD/runs/slurm-$SLURM_JOB_ID}"
port="${AGRO_RAY_PORT:-6379}"
# Ray's sockets have short paths, and no job sees another's.
session="/tmp/agro-$SLURM_JOB_ID"

# One token for all nodes of this job: a file that only this user reads. It is the same after a requeue.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$run_dir.token"
mkdir -p "$(dirname "$run_dir")"
if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
  (umask 077; python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH")
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}"
# Not `hostname --ip-address`: where /etc/hosts has the own name at 127.0.1.1, as Debian makes it, it says that.
head_address="$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --all-ip-addresses \
  | tr ' ' '\n' | awk -F. 'NF == 4 && $1 != 127 && !found++')"
if [ -z "$head_address" ]; then
  echo "$head has no IPv4 address that other nodes could reach: see \`hostname -I\` there" >&2
  exit 1
fi
export RAY_ADDRESS="$head_address:$port"

steps=()
start_node() {  # start_node NODE OPTIONS...: a Ray node that lives as long as its step
  local node="$1"; shift
  srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap --export=ALL,RAY_ADDRESS= \
    ray start --block --temp-dir="$session" "$@" &
  steps+=("$!")
}

stop_nodes() {
  kill "${steps[@]}" 2>/dev/null || true
  wait "${steps[@]}" 2>/dev/null || true
}

# Before the time is over, or where the nodes are wanted back: the driver writes a checkpoint, then the same job waits again.
# SIGTERM is also what `scancel` sends: then the driver is told the same, and that is all.
training=""
is_requeued=0
num_signals=0
is_asked=0
save() {  # It asks once: a second signal would interrupt the driver.
  if [ -n "$training" ] && [ "$is_asked" = 0 ]; then is_asked=1; kill -TERM "$training" 2>/dev/null || true; fi
}
warned() { num_signals=$((num_signals + 1)) is_requeued=1; save; }
terminated() {
  local job
  num_signals=$((num_signals + 1))
  job="$(scontrol show job --oneliner "$SLURM_JOB_ID" 2>/dev/null || true)"
  if [[ "$job" =~ JobState=PREEMPTED|PreemptTime=[0-9] ]]; then is_requeued=1; fi
  if [[ "$job" =~ JobState=CANCELLED ]]; then is_requeued=0; fi
  save
}
trap warned USR1
trap terminated TERM
trap stop_nodes EXIT

start_node "$head" --head --node-ip-address="$head_address" --port="$port" --disable-usage-stats
for _ in $(seq 120); do
  if ray status >/dev/null 2>&1; then break; fi
  sleep 1
done
ray status >/dev/null  # Says what is wrong where the head does not answer.
for node in "${nodes[@]:1}"; do start_node "$node" --address="$RAY_ADDRESS"; done

# A start looks at what the cluster has: it comes when all nodes are there, ten minutes at most.
python -c '
import sys, time, ray
ray.init(logging_level="error")
deadline_s = time.monotonic() + 600
while (there := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[1]):
    if time.monotonic() > deadline_s:
        sys.exit(f"{there} of {sys.argv[1]} nodes have joined Ray; see this log for what the others say")
    time.sleep(1)
' "${#nodes[@]}"

# The driver runs here, on the first node, beside the head.
status=143
if [ "$num_signals" = 0 ]; then
  python launch.py train "$@" run.dir="$run_dir" &
  training="$!"
  # A signal ends the wait, the driver ends with its checkpoint; one that came before it had a number is passed on.
  if [ "$num_signals" != 0 ]; then save; fi
  seen=-1
  while [ "$seen" != "$num_signals" ]; do
    seen="$num_signals" status=0
    wait "$training" || status="$?"
  done
fi
if [ "$is_requeued" = 1 ]; then
  stop_nodes
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
