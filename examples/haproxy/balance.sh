#!/bin/sh
# balance.sh makes HAProxy's backend follow the cluster. It is an event handler
# of the agent on the balancer:
#
#   hamlet agent -role lb -event-handler \
#     member-join,member-leave,member-failed,member-update=/etc/hamlet/balance.sh
#
# It asks who is alive instead of reading the event. So it does no harm to run
# it again, late, for many events at once, or by hand.
#
# On a web node "hamlet tags -set state=drain" takes it out of the list, and
# "hamlet tags -delete state" brings it back.
set -eu

list=${BALANCE_LIST:-/etc/haproxy/web.cfg} # what it writes
pid=${BALANCE_PID:-/run/haproxy.pid}       # of HAProxy's master process
port=${BALANCE_PORT:-8080}                 # of members that have no tag port=...

# HAProxy's master loses a signal that comes while it still loads, at its start
# or for the reload before. It is ready when it catches SIGUSR2 (/proc shows it).
reload() {
	for _ in $(seq 200); do
		if master=$(cat "$pid") && [ "$(cat "/proc/$master/comm")" = haproxy ] &&
			grep -q '^SigCgt:.*[89a-f]..$' "/proc/$master/status"; then
			kill -USR2 "$master"
			return
		fi
		sleep 0.05
	done 2>/dev/null
	echo "HAProxy is not there to be reloaded ($pid)"
	return 1
}

exec 9>"$list.lock" # runs one at a time, whoever starts them
flock 9

members=$(hamlet members -format text -status alive -tag role=web)

# Names and tags come from other machines: only what cannot mean anything to
# HAProxy gets through. Not echo, which makes a newline of \n.
#
# Draining means: serve elsewhere. Where all that live are draining there is no
# elsewhere, and they serve on, all of them: the list that was may name the dead.
{
	echo "backend web"
	printf '%s\n' "$members" | LC_ALL=C awk -v usual="$port" '{
		address = $2; sub(/:[0-9]+$/, "", address)
		tags = $0; sub(/^[^ ]+ +[^ ]+ +alive */, "", tags); tags = "," tags ","
		port = usual
		if (match(tags, /,port=[^,]*/))
			port = substr(tags, RSTART + 6, RLENGTH - 6)
		if (address !~ /^[][0-9a-f.:]+$/ || port !~ /^[0-9]+$/ || port + 0 < 1 || port + 0 > 65535)
			next
		address = address ":" port + 0
		name = $1 "-" address; gsub(/[^A-Za-z0-9_.:-]/, "_", name)
		line = "    server " name " " address "\n"
		if (tags ~ /,state=drain,/)
			draining = draining line
		else
			serving = serving line
	}
	END {
		if (serving == "" && draining != "")
			print "all members with role=web are draining: they serve on" >"/dev/stderr"
		printf "%s", serving != "" ? serving : draining
	}' | LC_ALL=C sort -u
} >"$list.new"

# An agent that has just started, or was cut off, sees nobody. The last list
# serves better than none: HAProxy finds out by itself which servers answer.
if ! grep -q ' server ' "$list.new"; then
	echo "no member with role=web is alive: the list stays as it is"
	exit 0
fi

# .live is what HAProxy was last told to read, so that a reload that failed is
# tried again at the next event.
if cmp -s "$list.new" "$list.live"; then
	exit 0
fi
mv "$list.new" "$list"
eval "${BALANCE_RELOAD:-reload}" 9>&- # what it starts must not keep the lock
cp "$list" "$list.live"
echo "HAProxy reloads: $(grep -c ' server ' "$list") servers"
sleep 0.2 # so that a burst of events makes a few reloads and not one each
