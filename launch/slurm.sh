#!/usr/bin/env bash
# Trains on the GPUs of several nodes by Slurm: writes a batch script and submits it.
#
#   launch/slurm.sh train CONFIG --name NAME --workdir DIR --nodes N --gpus-per-node G
#     [options] [-- SETTINGS]
#   launch/slurm.sh status|logs|stop|delete --name NAME --workdir DIR
#
# The job runs a copy of the commit, with one process a GPU. Five minutes before its time is up, and
# when Slurm preempts it with a grace time, it saves and goes back into the queue; it then goes on
# from its newest checkpoint. The same command goes on too, after the job has ended or was stopped.
#
#   --name NAME            of the job
#   --workdir DIR          of the run, on a file system that the nodes share; the batch script, the
#                          copy and the log lie beside it, in .launch/
#   --nodes, --gpus-per-node N    processes are their product
#   --time LIMIT           of one turn in the queue [24:00:00]
#   --setup COMMANDS       that make `python` the one with regionjax's packages, e.g.
#                          'module load cuda; . ~/venv/bin/activate'
#   --cpus-per-task N      cores of a process, which also decodes its rows' images; without it
#                          Slurm gives one
#   --partition, --account, --qos, --constraint, --reservation, --mem: as sbatch's
#   --commit REV           what runs [HEAD, if nothing is changed]
#   --grace SECONDS        before the time limit at which the run saves [300]
#   --xla-flags=FLAGS      instead of launch/lib.sh's
#   --dry-run              prints the commands, the batch script too; sbatch need not be there
#
# stop saves and ends the job (`scancel` by its name); delete also removes .launch/NAME.

set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

opt_name='' opt_workdir='' opt_nodes='' opt_gpus_per_node='' opt_time=24:00:00 opt_setup=''
opt_commit='' opt_grace=300 opt_xla_flags=''
# What sbatch takes as it is.
passed=(partition account qos constraint reservation cpus-per-task mem)
for option in "${passed[@]}"; do
  printf -v "opt_${option//-/_}" %s ''
done

main() {
  local verb=${1-}
  [ $# -eq 0 ] || shift
  parse "name workdir nodes gpus-per-node time setup commit grace xla-flags ${passed[*]}" '' "$@"
  case $verb in
    train | status | logs | stop | delete) ;;
    --help | -h) usage; exit 0 ;;
    *) die "expected train, status, logs, stop or delete, not '$verb'; --help explains" ;;
  esac
  need name 'a name of the job, e.g. --name stage2'
  [[ $opt_name =~ ^[A-Za-z0-9][A-Za-z0-9_.-]*$ ]] ||
    die "--name $opt_name: expected letters, digits, _, . and -, as it names a folder too"
  need workdir "the run's folder, on a shared file system, e.g. --workdir /shared/runs/stage2"
  [[ $opt_workdir == /* ]] || opt_workdir=$PWD/$opt_workdir
  folder=$(dirname "$opt_workdir")/.launch/$opt_name
  [ -n "$opt_dry_run" ] || command -v sbatch >/dev/null ||
    die 'sbatch is not installed here; run this on a login node of the cluster, or with --dry-run'
  "$verb"
}

train() {
  need nodes 'how many, e.g. --nodes 2'
  need gpus-per-node 'how many each has, e.g. --gpus-per-node 8'
  config_word
  whole nodes
  whole gpus-per-node
  whole grace
  stage
  local copy=$folder/$commit
  run mkdir -p "$copy"
  run tar -xzf "$archive" -C "$copy"
  step 'The batch script'
  if [ -n "$opt_dry_run" ]; then
    printf "cat >%s <<'END'\n%s\nEND\n" "$(quoted "$folder/job.sh")" "$(job "$copy")"
  else
    job "$copy" >"$folder/job.sh"
  fi
  run sbatch "$folder/job.sh"
}

# directives: the options of sbatch.
directives() {
  local name variable
  printf '#SBATCH --%s\n' "job-name=$opt_name" "nodes=$opt_nodes" \
    "ntasks-per-node=$opt_gpus_per_node" "gpus-per-node=$opt_gpus_per_node" "time=$opt_time" \
    "output=$folder/%j.log" open-mode=append requeue "signal=B:USR1@$opt_grace"
  for name in "${passed[@]}"; do
    variable=opt_${name//-/_}
    [ -z "${!variable}" ] || printf '#SBATCH --%s=%s\n' "$name" "${!variable}"
  done
}

# job COPY: prints the batch script.
job() {
  local cache starter=(srun --kill-on-bad-exit=1)
  cache=$(dirname "$opt_workdir")/.xla-cache
  # From Slurm 22.05 on a step doesn't take over what its job was given.
  [ -z "$opt_cpus_per_task" ] || starter+=("--cpus-per-task=$opt_cpus_per_task")
  train_words "$opt_workdir"
  cat <<END
#!/usr/bin/env bash
$(directives)

set -euo pipefail
export $(quoted "JAX_COMPILATION_CACHE_DIR=$cache" "XLA_FLAGS=${opt_xla_flags:-$GPU_FLAGS}")
export $(quoted "REGIONJAX_COMMIT=$commit" "PYTHONPATH=$1")
cd $(quoted "$1")
${opt_setup:-:}

# Slurm tells this shell that the time is nearly up; the processes of the run then save and end.
ending='' signalled=1
trap 'ending=1 signalled=1; scancel --signal=TERM "\$SLURM_JOB_ID" || :' USR1
$(quoted "${starter[@]}" python -u -m regionjax "${training[@]}" --stopped-exit-code 42) &
while [ -n "\$signalled" ]; do # a trap cuts \`wait\` short, with a code that isn't the run's
  signalled='' code=0
  wait \$! || code=\$?
done
# Of a preemption it tells the processes alone, and a job that ends in the grace time counts as done.
if scontrol show job "\$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'; then
  ending=1
fi
if [ -n "\$ending" ] && [ "\$code" -gt 2 ]; then # 0: the run is complete; 1, 2: an error of its own
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
END
}

status() { run squeue "--name=$opt_name" --me; }

logs() { run bash -c "tail -n 100 -F $(quoted "$folder")/*.log"; }

stop() {
  run scancel "--name=$opt_name" --me --signal=TERM
}

delete() {
  run scancel "--name=$opt_name" --me
  run rm -rf "$folder"
}

main "$@"
