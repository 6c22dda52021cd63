#!/bin/sh
# Make the Redis users of one installation: a password file each, and the ACL file with their hashes for Redis.
#
#   sh deploy/redis/users.sh DIRECTORY
#
# Passwords that are there already are kept, so running it again only renews users.acl. The directory is its
# owner's alone; the files in it are readable, because a container's user is another one than yours.
set -eu
directory=${1:?usage: users.sh DIRECTORY}
mkdir -p "$directory"
chmod 700 "$directory"
umask 022

# A key's name is prefix:{pool}:kind; this covers every pool under the prefix hg.
keys() { for kind in "$@"; do printf ' ~hg:{*}:%s' "$kind"; done; }
sum=sha256sum
command -v $sum >/dev/null || sum='shasum -a 256' # macOS
hash() { printf %s "$1" | $sum | cut -d ' ' -f 1; }

password() { [ -s "$directory/$1" ] || od -An -N24 -tx1 /dev/urandom | tr -d ' \n' >"$directory/$1"; }

user() { # name, rules
  password "$1"
  printf 'user %s on #%s resetchannels -@all %s\n' "$1" "$(hash "$(cat "$directory/$1")")" "$2"
}

# Talk to the server, but not of others' connections: CLIENT KILL and its like are dangerous and stay out.
speak='+@connection -@dangerous +info +time +cluster|slots +cluster|shards +cluster|nodes +fcall'
work='+@stream +@hash +@sortedset +@string +@keyspace +@read -@dangerous -@blocking'

{
  echo 'user default off nopass resetchannels -@all'
  # The only one that may load functions: they run with their caller's rights, so who loads them is trusted.
  user dispatcher "~hg:{*}:* $work $speak +xread +xreadgroup +function|load"
  user worker "$(keys 'jobs:*' 'request:*' 'endpoint:*' 'body:*' 'kv:*' 'tokens:*' requests waiting results 'results:*' dead rewards beats) $work $speak +xread +xreadgroup"
  asks=$(keys requests 'request:*' 'body:*' 'tokens:*' waiting controls results 'results:*')
  # `submit` and `batch` say it when nobody leads.
  asks="$asks %R~hg:{*}:leader"
  user client "$asks $work $speak +xread"
  # A client for others, that also hears from the endpoints which models are served.
  user door "$asks %R~hg:{*}:beats $work $speak +xread"
  # People who look after a pool: status, explain, cancel, drain, dead requeue.
  user operator "%R~hg:{*}:*$(keys requests 'request:*' 'tokens:*' controls dead) $work $speak +xread"
  # Probes and autoscalers: they count, change nothing and read no prompt and no answer. KEDA counts by a script, whose
  # key must be writable, though none of the commands that this user has could write it.
  count='+type +exists +ttl +xlen +xpending +xinfo|groups +zcard +zcount +zscore +zrange +llen +scard +hlen +hget +hmget +hgetall'
  user viewer "%R~hg:{*}:* ~hg:{*}:waiting +@connection -@dangerous +info +time +eval $count"
} >"$directory/users.acl.new"
mv "$directory/users.acl.new" "$directory/users.acl"
password grafana # the administrator of the dashboard; no user of Redis
