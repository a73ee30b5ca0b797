#!/bin/sh
# demo.sh: three agents on this machine, one of them with an event handler.
# One is killed, and the handler hears of it. Run it with "make demo"; it ends
# by itself, leaves nothing behind, and fails if any step did not happen.
set -eu
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
pids=
cleanup() {
	status=$?
	trap - EXIT
	for pid in $pids; do kill -9 "$pid" 2>/dev/null || :; done
	wait 2>/dev/null || :
	if [ $status -ne 0 ]; then
		echo "demo: FAILED after the last step shown. The log of alice:"
		cat "$dir/alice.log" 2>/dev/null || :
	fi
	rm -rf "$dir"
	exit $status
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

say() { printf '\n# %s\n' "$*"; }

# run shows a command and runs it.
run() {
	echo "\$ $*"
	"$@"
}

# start shows an agent's command line and runs it in the background.
start() {
	name=$1
	shift
	echo "\$ hamlet agent -node $name $* &"
	hamlet agent -node "$name" "$@" >"$dir/$name.out" 2>"$dir/$name.log" &
	pids="$pids $!"
	eval "$name=$!"
}

# expect waits until the log of alice holds a line, and shows it with those after it.
expect() {
	tries=0
	until grep -q "$1" "$dir/alice.log"; do
		tries=$((tries + 1))
		[ $tries -lt 100 ] || { echo "demo: no '$1' in the log of alice"; exit 1; }
		sleep 0.1
	done
	grep -A "$2" "$1" "$dir/alice.log"
}

say "Build it: one static binary."
run make -s build
PATH=$PWD:$PATH

# Each demo takes its own ports, so that two can run at the same time. Where another
# program has them, the agent that tries them ends at once.
port=$((20000 + $$ % 1000 * 10))
for _ in 1 2 3 4 5 6 7 8 9; do
	free=yes
	for p in $port $((port + 2)) $((port + 4)); do
		: >"$dir/try"
		hamlet agent -bind 127.0.0.1:$p -rpc-addr 127.0.0.1:$((p + 1)) >"$dir/try" 2>&1 &
		until grep -qE 'running!|error:' "$dir/try"; do sleep 0.02; done
		grep -q 'running!' "$dir/try" || free=
		kill -9 $! 2>/dev/null || :
		wait $! 2>/dev/null || :
	done
	[ -z "$free" ] || break
	port=$((20000 + (port + 1010) % 10000))
done
gossip=127.0.0.1:$port
SERF_RPC_ADDR=127.0.0.1:$((port + 1)) # of alice; "hamlet members" asks there
export SERF_RPC_ADDR

say "A handler: a script that is told the event and the members that it is about."
cat >"$dir/handler.sh" <<'END'
#!/bin/sh
echo "handler: $SERF_EVENT"
while read -r name address rest; do
	echo "handler:   $name at $address"
done
END
chmod +x "$dir/handler.sh"
run cat "$dir/handler.sh"

say "Alice runs the handler; bob and carol join her."
start alice -bind "$gossip" -rpc-addr "$SERF_RPC_ADDR" -log-level=debug -event-handler="$dir/handler.sh"
start bob -bind 127.0.0.1:$((port + 2)) -rpc-addr 127.0.0.1:$((port + 3)) -join "$gossip"
start carol -bind 127.0.0.1:$((port + 4)) -rpc-addr 127.0.0.1:$((port + 5)) -join "$gossip" -role web
run hamlet members -wait 3 -timeout 10s

say "The handler told of carol, in the log of alice:"
expect "handler:   carol" 0

say "Kill carol, as a crash would."
run kill -9 "$carol"
wait "$carol" 2>/dev/null || : # or the shell would remark on it
expect "handler: member-failed" 1
run hamlet members
hamlet members -name carol -status failed | grep -q carol

say "Bob leaves in good order."
run hamlet leave -rpc-addr 127.0.0.1:$((port + 3))
expect "handler: member-leave" 1
run hamlet members
hamlet members -name bob -status left | grep -q bob

say "Join, list, handle, fail, leave: that is all."
