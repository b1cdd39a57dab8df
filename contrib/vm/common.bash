# What the scripts beside this file have in common: they set `work` (where things are kept), `arch`
# and `apt_dir`, and source it.

say() { printf 'vm: %s\n' "$*" >&2; }
fail() {
  say "$*"
  exit 2
}

# Fails unless these programs are there. $1 names the packages that have them.
need() {
  local packages=$1 program
  shift
  for program in "$@"; do
    command -v "$program" >/dev/null || fail "$program is missing; apt-get install $packages"
  done
}

# Leaves apt set to Debian's packages of every suite (APT_CONFIG).
read_package_lists() {
  mkdir -p "$apt_dir"/{lists/partial,cache/archives/partial,etc}
  if [ ! -e "$apt_dir/etc/sources.list" ]; then
    local keys=/usr/share/keyrings/debian-archive-keyring.gpg
    local mirror=${VM_MIRROR:-http://deb.debian.org} suite
    for suite in bullseye bookworm trixie sid; do
      echo "deb [signed-by=$keys] $mirror/debian $suite main"
      [ $suite = sid ] || echo "deb [signed-by=$keys] $mirror/debian-security $suite-security main"
    done >"$apt_dir/etc/sources.list"
  fi
  # In one step, since other machines may start at the same time.
  cat >"$apt_dir/apt.conf.$$" <<CONF
Dir::Etc::sourcelist "$apt_dir/etc/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State::lists "$apt_dir/lists";
Dir::State::status "/dev/null";
Dir::Cache "$apt_dir/cache";
APT::Architecture "$arch";
APT::Architectures { "$arch"; };
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Check-Valid-Until "false";
CONF
  mv "$apt_dir/apt.conf.$$" "$apt_dir/apt.conf"
  export APT_CONFIG=$apt_dir/apt.conf
  if [ -z "$(find "$apt_dir/lists" -name '*_Packages*' -mtime -7 -print -quit)" ]; then
    say "reading Debian's package lists"
    apt-get -qq update || say "some list could not be read; going on with the others"
  fi
}

# The path of the namespace tests: the latest that cargo has left in $1, or else built here.
namespace_tests() {
  local binary
  if [ -n "$1" ]; then
    binary=$(find "$(realpath "$1")/deps" -name 'netns-*' -executable -type f -printf '%T@ %p\n' |
      sort -n | sed -n '$s/^[^ ]* //p')
    [ -n "$binary" ] || fail "there are no namespace tests in $1: cargo test --no-run"
  else
    say "building the namespace tests"
    binary=$(cargo test --test netns --locked --no-run --message-format=json |
      sed -nE '/"name":"netns"/s/.*"executable":"([^"]+)".*/\1/p' | tail -1)
  fi
  echo "$binary"
}

# What a machine mounts once /dev, /proc and /sys are there.
mounts='mkdir -p /dev/pts /dev/shm /run/lock
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf'

# Ends as what ran in the machine has, by the log in $1.
end_as_told() {
  local result
  result=$(sed -nE 's/.*vm: result ([0-9]+).*/\1/p' "$1" | tail -1)
  [ -n "$result" ] || fail "the machine ended without a result; see $1"
  exit "$result"
}
