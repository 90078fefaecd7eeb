# shellcheck shell=bash
# number_of NAME [OTHER]: an address of this machine, whose name is NAME, that other nodes (OTHER is one) can reach.
#
# A name may be unknown inside a container or on another node, and Debian gives a machine's own name to 127.0.1.1, which
# every node takes for itself. So: NAME if it is a number; what it is known as, but not a loopback's; else the address
# from which OTHER, or the world, is reached; else NAME.
number_of() {
  local name=$1 other=${2:-} found
  if [[ $name =~ ^[0-9.]+$ || $name == *:* ]]; then echo "$name"; return; fi
  found=$(_known_as "$name")
  [ -n "$found" ] || found=$(_source_towards "$(_known_as "$other")")
  # nobody's address (RFC 5737) stands for the default route; nothing is sent
  [ -n "$found" ] || found=$(_source_towards 192.0.2.1)
  echo "${found:-$name}"
}

_known_as() { { getent ahostsv4 "$1" || getent ahosts "$1" || true; } | awk '$1 !~ /^(127\.|::1$)/ {print $1; exit}'; }

_source_towards() { { ip -o route get "$1" 2>/dev/null || true; } | sed -n 's/.* src \([^ ]*\).*/\1/p'; }
