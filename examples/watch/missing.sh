#!/bin/sh
# missing.sh runs COMMAND MESSAGE for each member that has failed and is not back
# SECONDS later, so that a restart or a short cut wakes nobody up:
#
#   missing.sh 30 logger -t hamlet -p daemon.err
#
# It follows "hamlet watch", for which the agent needs no option. A handler that
# waited so long would hold up what happens meanwhile.
set -u
[ $# -ge 2 ] || { echo "usage: $0 SECONDS COMMAND..." >&2 && exit 2; }
after=$1
shift
running() { kill -0 $$ 2>/dev/null; } # this script, whose parts shall not outlive it
awk=awk
case $(awk -W version 2>&1 </dev/null) in mawk*) awk="awk -W interactive" ;; esac # or it waits for whole pages

{
	while running; do # a watch ends with its agent, and the next one begins with who is there
		hamlet watch -event member,member-join,member-leave,member-failed,member-update,member-reap
		sleep 1
	done | while IFS= read -r line; do
		case $line in "("*) hamlet members | sed 's/^/- - member: /' ;; esac # "(9 lines are missing here: ..."
		printf '%s\n' "$line" # one write each, so that no tick gets into a line
	done &
	while running && sleep 1; do echo tick; done
	kill $!
} | $awk -v after="$after" '
	$1 == "tick" {
		now++
		for (name in since)
			if (now - since[name] == after) {
				print "failed " after " s ago and is not back: " name " " address[name]
				fflush()
			}
	}
	$6 != "failed" || $3 == "member-reap:" { if ($3 ~ /^member/) delete since[$4]; next }
	{ if (!($4 in since)) since[$4] = now; address[$4] = $5 }
' | while IFS= read -r message; do "$@" "$message" </dev/null; done
