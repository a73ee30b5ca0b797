#!/bin/sh
# follow.sh prints the living members, at the start and after each change.
#
# "hamlet watch" says when to look, and "hamlet members" what there is: so no
# change is missed, and it does not matter how much happened meanwhile.
events=member,member-join,member-leave,member-failed,member-update,member-reap

changed() { # put your own work here
	printf 'alive:%s\n' "$1"
}

follow() { # until the agent ends
	last=
	hamlet watch -event "$events" | while read -r _ _ event _; do
		# A watch begins with a line for each known member: the first one will do.
		[ "$event" = member: ] && [ -n "$last" ] && continue
		now=$(hamlet members -status alive | awk '{ printf " %s=%s", $1, $2 }')
		[ -z "$now" ] || [ "$now" = "$last" ] || changed "$now"
		last=${now:-$last}
	done
}

while :; do
	follow
	sleep 1
done
