# shellcheck shell=bash
# Variables are set for, and by, the script that sources this.
# shellcheck disable=SC2034,SC2154
#
# Sourced by the launch scripts: their arguments, dry runs, and what they have in common.
#
# A script prints what it does as shell commands. With --dry-run that is all it does: nothing is
# run, and what a cloud would have answered is assumed, which the output says. The printed commands
# are the ones that run otherwise, quoted so that they can be pasted.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
opt_dry_run=''

# Flags that libtpu 0.0.42 does not set by itself: reductions overlap with computation (openxla.org,
# "XLA Flags Guidance"), and across slices those of the gradients are merged and pipelined (MaxText,
# benchmarks/xla_flags_library.py). `regionjax compile` sees them where the variable is set.
LIBTPU_FLAGS='--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true'
LIBTPU_SLICES_FLAGS='--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true'
# The one that NVIDIA's JAX images set: collectives overlap with computation.
GPU_FLAGS='--xla_gpu_enable_latency_hiding_scheduler=true'

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# What a script's head says about it is its help.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# parse "NAMES OF OPTIONS" "NAMES OF SWITCHES" WORDS...: fills opt_NAME, and `words` with the
# others; what follows `--` goes to `overrides`.
parse() {
  local known=" ${1//$'\n'/ } " switches=" $2 dry-run " name value
  shift 2
  words=() overrides=()
  while [ $# -gt 0 ]; do
    case $1 in
      --help | -h)
        usage
        exit 0
        ;;
      --)
        shift
        overrides=("$@")
        return
        ;;
      --*) ;;
      *)
        words+=("$1")
        shift
        continue
        ;;
    esac
    name=${1#--}
    name=${name%%=*}
    if [[ $switches == *" $name "* ]]; then
      [ "$1" = "--$name" ] || die "$1: --$name takes no value; write --$name alone"
      value=1
    elif [[ $known != *" $name "* ]]; then
      # shellcheck disable=SC2086
      die "unknown option $1; options are$(printf ' --%s' $known $switches). Settings of the" \
        'config go after --, e.g. -- --train.steps=1000'
    elif [[ $1 == *=* ]]; then
      value=${1#*=}
    else
      [[ $# -ge 2 && $2 != --* ]] || die "$1 needs a value; write $1=VALUE"
      value=$2
      shift
    fi
    printf -v "opt_${name//-/_}" %s "$value"
    shift
  done
}

# need OPTION WHAT-IT-IS: ends the script where the option is missing.
need() {
  local variable=opt_${1//-/_}
  [ -n "${!variable}" ] || die "missing --$1: $2"
}

# whole OPTION: ends the script where its value is no whole number from 1.
whole() {
  local variable=opt_${1//-/_}
  [[ ${!variable} =~ ^[1-9][0-9]*$ ]] || die "--$1 ${!variable}: expected a whole number from 1"
}

# The config, checked: one word, a file of this checkout.
config_word() {
  [ "${#words[@]}" -eq 1 ] ||
    die "expected one config, e.g. configs/gpt4roi_7b.py:stage2, not '${words[*]-}'"
  [[ ${words[0]%%:*} != /* && -f $root/${words[0]%%:*} ]] ||
    die "config ${words[0]%%:*}: no such file under $root; name it from there, as in configs/tiny.py"
}

# quoted WORDS...: prints them as a shell reads them, on one line.
quoted() {
  local word name gap=''
  for word in "$@"; do
    name=''
    if [[ $word =~ ^(--[a-z-]+=|[A-Z_]+=)(.*)$ ]]; then # --name='some value' reads better
      name=${BASH_REMATCH[1]} word=${BASH_REMATCH[2]}
    fi
    if [[ -n $name && -z $word ]] || [[ $word =~ ^[A-Za-z0-9_./:=@%+,~-]+$ && $word != '~'* ]]; then
      printf '%s%s%s' "$gap" "$name" "$word"
    else
      printf "%s%s'%s'" "$gap" "$name" "${word//\'/\'\\\'\'}"
    fi
    gap=' '
  done
}

# show WORDS...: prints a command, an option a line where it is long.
show() {
  local line
  line=$(quoted "$@")
  if [ "${#line}" -gt 100 ]; then
    local word out=''
    for word in "$@"; do
      case $word in
        --*) out+=" \\"$'\n'"  $(quoted "$word")" ;;
        *) out+=${out:+ }$(quoted "$word") ;;
      esac
    done
    line=$out
  fi
  printf '%s\n' "$line"
}

# step TEXT: says what comes next.
step() {
  if [ -n "$opt_dry_run" ]; then printf '\n# %s\n' "$*"; else printf '%s\n' "== $*" >&2; fi
}

# note TEXT: a remark; a comment in a dry run.
note() {
  if [ -n "$opt_dry_run" ]; then printf '# %s\n' "$*"; else printf '%s\n' "$*" >&2; fi
}

# run WORDS...: runs a command, or prints it.
run() {
  if [ -n "$opt_dry_run" ]; then
    show "$@"
  else
    show "$@" >&2
    "$@"
  fi
}

# ask ASSUMED WORDS...: puts what a command prints into `answer`; in a dry run what is assumed.
ask() {
  local assumed=$1
  shift
  if [ -n "$opt_dry_run" ]; then
    show "$@"
    printf '# assumed: %s\n' "$assumed"
    answer=$assumed
  else
    answer=$("$@")
  fi
}

# stage: names the commit that runs in `commit` and packs its files into `archive`. Every start
# again then runs the same files, whatever happens in the checkout.
stage() {
  local revision=${opt_commit:-HEAD}
  commit=$(git -C "$root" rev-parse --verify --quiet "$revision^{commit}") ||
    die "--commit $revision: no such commit in $root"
  if [ -z "$opt_commit" ] && [ -n "$(git -C "$root" status --porcelain)" ]; then
    die "$root has changes that are not committed, and hosts get a commit; commit them, or name" \
      'the one that is to run with --commit, e.g. --commit HEAD'
  fi
  commit=${commit:0:12}
  archive=${TMPDIR:-/tmp}/regionjax-$(id -un)-$commit.tar.gz
  step "The files of commit $commit"
  run git -C "$root" archive --format=tar.gz "--output=$archive" "$commit"
}

# accelerator TYPE: fills `chips` (of a slice), `topology` and `runtime` (the TPU VM's image).
accelerator() {
  local number=${1##*-} family=${1%-*}
  [[ $number =~ ^[1-9][0-9]*$ ]] || number=0
  case $family in
    v5litepod) family=v5e runtime=v2-alpha-tpuv5-lite ;;
    v6e) runtime=v2-alpha-tpuv6e ;;
    v5p) runtime=v2-alpha-tpuv5 number=$((number / 2)) ;; # named by cores, two a chip
    v5e) die "--accelerator $1: Cloud TPU calls it v5litepod-$number" ;;
    *) number=0 ;;
  esac
  chips=$number
  topology=$(torus "$family" "$chips")
  [ -n "$topology" ] || die "--accelerator $1: expected v5litepod-N or v6e-N with N chips (8, 16," \
    '32, 64, 128, 256), or v5p-N with N cores, two a chip (8, 16, 32, 64, 128, 256, 512, 1024)'
}

# torus FAMILY CHIPS: prints how the chips of a slice are joined, in the notation of
# `regionjax compile --topology`; nothing for a number that isn't offered.
torus() {
  case $1:$2 in
    v5p:4) echo v5p:2x2x1 ;; v5p:8) echo v5p:2x2x2 ;; v5p:16) echo v5p:2x2x4 ;;
    v5p:32) echo v5p:2x4x4 ;; v5p:64) echo v5p:4x4x4 ;; v5p:128) echo v5p:4x4x8 ;;
    v5p:256) echo v5p:4x8x8 ;; v5p:512) echo v5p:8x8x8 ;;
    v5p:*) ;;
    *:8) echo "$1:2x4" ;; *:16) echo "$1:4x4" ;; *:32) echo "$1:4x8" ;;
    *:64) echo "$1:8x8" ;; *:128) echo "$1:8x16" ;; *:256) echo "$1:16x16" ;;
  esac
}

# tpu_environment CACHE: puts the variables of a run on TPUs into `variables`.
tpu_environment() {
  local flags=$LIBTPU_FLAGS
  [ "$opt_slices" -eq 1 ] || flags+=" $LIBTPU_SLICES_FLAGS"
  variables=(
    "JAX_COMPILATION_CACHE_DIR=$1"
    "LIBTPU_INIT_ARGS=${opt_libtpu_flags:-$flags}"
    "REGIONJAX_COMMIT=$commit"
  )
}

# train_words WORKDIR [SLICES]: puts what follows `regionjax` into `training`. Over several slices the
# parameters are split inside each, unless a setting of the caller's, which comes later, wins.
train_words() {
  training=(train "${words[0]}" --workdir "$1" --distributed auto)
  [ "${2:-1}" -eq 1 ] ||
    training+=("--train.mesh.slices=$2" "--train.mesh.data=$2" --train.mesh.fsdp=-1)
  [ "${#overrides[@]}" -eq 0 ] || training+=("${overrides[@]}")
}
