#!/bin/sh
# balance.sh makes nginx's upstream follow the cluster. It is an event handler of
# the agent on the balancer:
#
#   hamlet agent -role lb -event-handler \
#     member-join,member-leave,member-failed,member-update=/etc/hamlet/balance.sh
#
# It asks for the living members instead of reading the event. So it does no harm
# to run it again, late, for many events at once, or by hand.
#
# On a web node "hamlet tags -set state=drain" takes it out of the list, and
# "hamlet tags -delete state" brings it back.
set -eu

list=${BALANCE_LIST:-/etc/nginx/web.servers} # what it writes
port=${BALANCE_PORT:-8080}                   # of members that have no tag port=...

exec 9>"$list.lock" # one at a time
flock 9

members=$(hamlet members -format text -status alive -tag role=web)

# Names and tags come from other machines: only an address and a number get
# through. Where all that live are draining they serve on, all of them.
printf '%s\n' "$members" | LC_ALL=C awk -v usual="$port" '{
	address = $2; sub(/:[0-9]+$/, "", address)
	tags = $0; sub(/^[^ ]+ +[^ ]+ +alive */, "", tags); tags = "," tags ","
	port = usual
	if (match(tags, /,port=[^,]*/))
		port = substr(tags, RSTART + 6, RLENGTH - 6)
	if (address !~ /^[][0-9a-f.:]+$/ || port !~ /^[0-9]+$/ || port + 0 < 1 || port + 0 > 65535)
		next
	line = "server " address ":" port + 0 ";\n"
	if (tags ~ /,state=drain,/)
		draining = draining line
	else
		serving = serving line
}
END { printf "%s", serving != "" ? serving : draining }' | LC_ALL=C sort -u >"$list.new"

# An agent that has just started, or was cut off, sees nobody. The last list
# serves better than none, and nginx refuses an empty one.
if ! [ -s "$list.new" ]; then
	echo "no member with role=web is alive: the list stays as it is"
	exit 0
fi

# .live is what nginx was last told to read, so that a reload that failed is
# tried again at the next event.
if cmp -s "$list.new" "$list.live"; then
	exit 0
fi
mv "$list.new" "$list"
eval "${BALANCE_RELOAD:-nginx -s reload}" 9>&- # what it starts must not keep the lock
cp "$list" "$list.live"
echo "nginx reloads: $(grep -c . "$list") servers"
sleep 0.2 # so that a burst of events makes a few reloads and not one each
