#!/bin/sh
# web.sh runs a web server and an agent that offers it to the balancers:
#
#   HAMLET_JOIN=lb1,lb2 web.sh 8080 ./server -listen :8080
#
# Told to stop (TERM or INT), it first leaves the cluster, lets the server go on
# until the balancers have noticed and their last requests are answered, and
# then stops it. If the server or the agent ends, so does the other. In a systemd
# unit it takes KillMode=mixed, so that only this script is told.
set -u

port=$1
shift
"$@" &
server=$!
hamlet agent -role web -tag "port=$port" &
agent=$!

status=1
trap 'status=0' TERM INT
while [ $status = 1 ] && kill -0 $server && kill -0 $agent; do
	sleep 1 &
	wait $! # unlike sleep, it lets a signal in
done 2>/dev/null

trap '' TERM INT
kill -0 $agent 2>/dev/null && hamlet leave
kill -0 $server 2>/dev/null && sleep "${DRAIN:-5}"
kill $server $agent 2>/dev/null
wait
exit $status
