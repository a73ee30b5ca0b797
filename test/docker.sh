#!/bin/sh
# A cluster of the host and its containers, as users see it: seven containers
# join an agent on the host and are stopped, killed, paused, unplugged and
# restarted. Then the compose file. Needs a Docker engine on Linux, pulls
# nothing and removes all that it makes.
set -eu
cd "$(dirname "$0")/.."

skip() { echo "docker-test: skipped: $1"; exit 0; }
command -v docker >/dev/null || skip "there is no docker command"
docker info >/dev/null 2>&1 || skip "no Docker engine answers"
[ "$(uname)" = Linux ] || skip "the host of containers is not this machine"

id=hamlet-test-$$
dir=$(mktemp -d)
host= compose=

compose() { (cd "$dir" && HAMLET_IMAGE=$id $compose -p "$id" -f compose.yaml "$@"); }

cleanup() {
	status=$?
	trap - EXIT
	if [ $status -ne 0 ] && [ -f "$dir/log" ]; then
		echo "--- the host's log ends:" && tail -n 40 "$dir/log"
	fi
	[ -z "$host" ] || kill "$host" 2>/dev/null || true
	[ -z "$compose" ] || compose down -t 1 >/dev/null 2>&1 || true
	docker ps -aq --filter "label=$id" | xargs -r docker rm -f >/dev/null 2>&1 || true
	docker network rm "$id" "$id-2" "$id-readme" >/dev/null 2>&1 || true
	docker rmi -f "$id" >/dev/null 2>&1 || true
	rm -rf "$dir"
	exit $status
}
trap cleanup EXIT
trap 'exit 1' INT TERM

fail() { echo "docker-test: FAILED: $1" >&2; exit 1; }
ok() { echo "docker-test: $1"; }
now() { echo $(($(date +%s%N) / 1000000)); }

# within MS WHAT COMMAND...: the command succeeds in time.
within() {
	until=$(($(now) + $1)) what="$2 within $1 ms"
	shift 2
	until "$@"; do
		[ "$(now)" -lt $until ] || fail "not so: $what"
		sleep 0.02
	done
}

run() { docker run -d --network "$id" --label "$id" "$@" | cut -c1-12; }
members() { "$dir/hamlet" members -rpc-addr "$rpc" "$@"; }
is() { [ "$(members -name "$1" | awk '{ print $3 }')" = "$2" ]; }
# event KIND NAME: the host's handler has been told so; at is when.
event() { at=$(awk -v k="$1" -v n="$2" '$2 == k && $3 == n { t = $1 } END { print t }' "$dir/events"); [ -n "$at" ]; }
forget() { : >"$dir/events"; }
address() { docker inspect -f "{{(index .NetworkSettings.Networks \"$id\").IPAddress}}" "$1"; }
# since_end NAME: how many ms after the container's end the handler ran.
since_end() { echo $((at - $(date -d "$(docker inspect -f '{{.State.FinishedAt}}' "$1")" +%s%N) / 1000000)); }

# powerless CONTAINER LINE...: what the kernel says of each of its processes: init, agent, health checks.
powerless() {
	for pid in $(docker top "$1" -o pid | tail -n +2); do
		status=$(cat "/proc/$pid/status" 2>/dev/null) || continue # it has ended
		case $status in Name:?hamlet*) echo "$status" ;; esac      # or it is Docker's still
	done | tr -s '\t' ' ' >"$dir/status"
	count=$(grep -c '^Name:' "$dir/status") who=$1
	[ "$count" -ge 2 ] || fail "$who has $count processes"
	shift
	for line in "Uid: 65534 65534 65534 65534" "Gid: 65534 65534 65534 65534" "CapInh: 0*" "CapPrm: 0*" "CapEff: 0*" "CapAmb: 0*" "$@"; do
		[ "$(grep -cx "$line" "$dir/status")" = "$count" ] || fail "of $who, not so for each process: $line: $(cat "$dir/status")"
	done
}

# --- the image and the agent on the host

make image IMAGE="$id" >"$dir/build" 2>&1 || fail "make image: $(cat "$dir/build")"
cp examples/docker/hamlet examples/docker/Dockerfile examples/docker/compose.yaml "$dir"
size=$(docker inspect -f '{{.Size}}' "$id")
grep -qx "the image $id has $size bytes" "$dir/build" || fail "make image says: $(cat "$dir/build")"
for net in 10.203.45 10.217.86 172.27.133 192.168.247 none; do # one that nobody has
	! docker network create --subnet "$net.0/24" --gateway "$net.1" "$id" >/dev/null 2>&1 || break
done
[ $net != none ] || fail "all networks that it would use are taken"
bridge=$net.1
[ "$size" = "$(wc -c <"$dir/hamlet")" ] || fail "the image holds more than the binary: $size bytes"
ok "the image holds $size bytes"

cat >"$dir/handler.sh" <<'END'
#!/bin/sh
now=$(date +%s%3N)
echo
echo "New event: ${SERF_EVENT}. Data follows..."
while read -r name rest; do
	echo "$name    $rest"
	echo "$now $SERF_EVENT $name" >>"$DIR/events"
done
echo "current members..."
"$DIR/hamlet" members
END
chmod +x "$dir/handler.sh"
forget
DIR=$dir "$dir/hamlet" agent -node precise64 -bind "$bridge:7946" -rpc-addr 127.0.0.1:0 -log-level=debug \
	-event-handler="$dir/handler.sh" >"$dir/banner" 2>"$dir/log" &
host=$!
within 3000 "the agent on the host runs" grep -q 'RPC addr' "$dir/banner"
rpc=$(sed -n "s/.*RPC addr: '\(.*\)'/\1/p" "$dir/banner")

# --- seven containers join at the bridge's address

names=
for _ in 1 2 3 4 5 6 7; do
	names="$names $(run "$id" agent -join "$bridge:7946")"
done
members -wait 8 -timeout 10s >/dev/null || fail "seven containers did not join: $(members)"
for n in $names; do
	is "$n" alive || fail "$n is not called by its container id: $(members)"
	[ "$(docker exec "$n" /hamlet members -status alive | wc -l)" = 8 ] || fail "$n sees: $(docker exec "$n" /hamlet members)"
done
within 2000 "the handler prints what it sees" grep -q "^.New event: member-join" "$dir/log"
grep -q "\[DEBUG\] Event 'member-join' script output:" "$dir/log" || fail "the log lacks the handler's output"
members
ok "the host and seven containers are one cluster"

# shellcheck disable=SC2086
set -- $names

# --- how containers end

start=$(now)
docker stop "$1" >/dev/null
within 2000 "docker stop is member-failed" event member-failed "$1"
ok "docker stop: failed $((at - start)) ms after the command, $(since_end "$1") ms after the container's end"
start=$(now)
docker kill "$2" >/dev/null
within 2000 "docker kill is member-failed" event member-failed "$2"
ok "docker kill: failed $((at - start)) ms after the command, $(since_end "$2") ms after the container's end"
docker kill -s INT "$3" >/dev/null
within 2000 "SIGINT is member-leave" event member-leave "$3"
[ "$(docker wait "$3")" = 0 ] || fail "SIGINT to the agent as PID 1 did not end it well"
ok "docker kill -s INT: left, exit status 0"

# --- a pause is no failure

forget
docker pause "$4" >/dev/null
sleep 5
docker unpause "$4" >/dev/null
sleep 1
[ ! -s "$dir/events" ] || fail "a pause of 5 s is noticed: $(cat "$dir/events")"
ok "docker pause for 5 s: nothing happens"

# --- the network goes and comes back, with the same address and with another

for back in "$(address "$5")" "$net.200"; do
	forget
	start=$(now)
	docker network disconnect "$id" "$5"
	within 6000 "a disconnected container fails" event member-failed "$5"
	failed=$((at - start))
	[ "$(grep -c member-failed "$dir/events")" = 1 ] || fail "others failed, too: $(cat "$dir/events")"
	within 6000 "it knows that it is cut off" sh -c "[ \$(docker exec $5 /hamlet members -status alive | wc -l) = 1 ]"
	start=$(now)
	docker network connect --ip "$back" "$id" "$5"
	within 6000 "a container that is connected as $back returns" event member-join "$5"
	ok "docker network disconnect: failed after $failed ms; connect: back as $back after $((at - start)) ms"
	sleep 3
	is "$5" alive && members -name "$5" | grep -q " $back:7946 " || fail "after it came back: $(members)"
	[ "$(grep -c . "$dir/events")" = 2 ] || fail "wrong events: $(cat "$dir/events")"
done

# --- restarts

forget
old=$(address "$6")
docker stop "$6" >/dev/null
within 2000 "it fails" event member-failed "$6"
run "$id" agent -join "$bridge" >/dev/null # takes the address, if it is given away again
start=$(now)
docker start "$6" >/dev/null
within 5000 "a restarted container returns" event member-join "$6"
[ "$(address "$6")" != "$old" ] || ok "(the engine gave the same address again)"
members -name "$6" | grep -q " $(address "$6"):7946 " || fail "the old address is still shown: $(members)"
[ "$(members -name "$6" | wc -l)" = 1 ] || fail "two entries: $(members)"
ok "docker start: back $((at - start)) ms after the command, from $old to $(address "$6")"

# --- two networks, and a seed whose name nobody knows yet

docker network create "$id-2" >/dev/null
early=$(docker create --network "$id-2" --label "$id" "$id" agent -join late:7946 | cut -c1-12)
docker network connect "$id" "$early"
docker start "$early" >/dev/null
sleep 1
late=$(run --network-alias late "$id" agent)
sees() { docker exec "$late" /hamlet members -name "$early" | grep -q " $(address "$early"):7946 .*alive"; }
within 8000 "the late seed knows the early member by the address that they share" sees
sleep 3
sees || fail "the late seed lost the early member: $(docker exec "$late" /hamlet members)"
ok "a member of two networks and a seed that started later"

# --- the first process of a container

docker top "$7" | grep -c '/hamlet agent' | grep -qx 2 || fail "PID 1 is not an init for the agent: $(docker top "$7")"
powerless "$7"
n=$(run --health-interval 1s "$id" agent -join "$bridge" -log-level debug -event-handler '/hamlet members')
within 15000 "the health check passes" sh -c "docker inspect -f '{{.State.Health.Status}}' $n | grep -qx healthy"
within 3000 "a handler runs without a shell" sh -c "docker logs $n 2>&1 | grep -A9 'script output:' | grep -q '^.precise64 .* alive'"
set +e
err=$(docker run --rm --network none --label "$id" "$id" agent -event-handler '/hamlet members | /hamlet version' 2>&1)
status=$?
set -e
[ $status -ne 0 ] && [ "$(echo "$err" | grep -c 'error:')" = 1 ] && echo "$err" | grep -q 'needs a shell' || fail "shell syntax without a shell, status $status: $err"
ok "an init, a health check and handlers in an image without a shell"

# --- what the README shows, with other names

readme=$(sed -e ':a' -e '/\\$/{N;s/ *\\\n */ /;ba' -e '}' README.md | sed -n 's/^\$ \(docker .*\)/\1/p' | grep -v ' logs ' |
	sed -e "s/--name \([a-z0-9]*\)/--name $id-\1/; s/exec seed/exec $id-seed/; s/ create cluster/ create $id-readme/; s/ cluster / $id-readme /" \
		-e "s/-d --network/-d --label $id --network/; s/ hamlet\$/ $id/")
[ "$(echo "$readme" | wc -l)" = 5 ] || fail "the README shows other commands of Docker: $readme"
sh -ec "$readme" >"$dir/readme" 2>&1 || fail "the README's commands: $readme: $(cat "$dir/readme")"
[ "$(awk '$3 == "alive" { printf "%s ", $1 }' "$dir/readme")" = "seed web1 web2 " ] || fail "the README's three containers: $(cat "$dir/readme")"
handled() { docker logs "$id-seed" 2>&1 | grep -A9 'script output:' | grep -q '^.web2 .* alive'; }
within 3000 "the handler of the README runs" handled
ok "three containers with a handler, as the README has them"

# --- compose

if docker compose version >/dev/null 2>&1; then
	compose="docker compose"
elif command -v docker-compose >/dev/null; then
	compose=docker-compose
elif [ "${CI:-}" = true ]; then
	fail "there is no docker compose"
else
	skip "the compose file: there is no docker compose"
fi
compose up -d >"$dir/compose.log" 2>&1 || fail "compose up: $(cat "$dir/compose.log")"
inseed() { compose exec -T seed /hamlet members "$@"; }
count() { [ "$(inseed -status alive -tag "role=$1" | wc -l)" = "$2" ]; }
inseed -wait 4 -timeout 15s >/dev/null || fail "compose: $(inseed)"
count web 3 || fail "compose: $(inseed)"
[ "$(inseed | awk '{ printf "%s ", $1 }')" = "seed web1 web2 web3 " ] || fail "compose: these names are not readable: $(inseed)"
healthy() { [ "$(compose ps -q | xargs docker inspect -f '{{.State.Health.Status}}' | grep -cx healthy)" = 4 ]; }
within 20000 "all are healthy" healthy
for n in $(compose ps -q); do
	powerless "$n" "CapBnd: 0*" "NoNewPrivs: 1"
	root=$(awk '$5 == "/" { print $6 }' "/proc/$(docker inspect -f '{{.State.Pid}}' "$n")/mountinfo")
	case $root in ro,*) ;; *) fail "the root of $n is mounted $root" ;; esac
	docker inspect -f '{{.HostConfig.Memory}} {{.HostConfig.PidsLimit}}' "$n" | grep -qx '67108864 128' || fail "$n has no limits"
done
ok "compose: the agents are nobody, with no capability to get, on a read-only root"
ran() { compose logs web1 | grep -q "Event 'member-join' script output"; }
within 5000 "handlers from the environment run" ran
compose stop web2 web3 >"$dir/compose.log" 2>&1 || fail "compose stop: $(cat "$dir/compose.log")"
stopped() { count web 1 && [ "$(inseed -status left | awk '{ printf "%s ", $1 }')" = "web2 web3 " ]; }
within 5000 "two that are stopped leave" stopped
compose restart -t 1 seed >"$dir/compose.log" 2>&1 || fail "compose restart: $(cat "$dir/compose.log")"
inseed -wait 2 -timeout 10s >/dev/null || fail "the seed does not come back: $(inseed)"
ok "compose: four by name, healthy; two that were stopped have left; the seed was restarted"

kill "$host"
wait "$host" || fail "the agent on the host ends with status $?"
host=
grep -E 'panic|goroutine|DATA RACE' "$dir/log" && fail "the host's agent panicked"
ok "passed"
