#!/bin/sh
# route.sh is one event handler for everything. It runs the script beside it
# that is named after the event, with the event's environment and input:
#
#   hamlet agent -event-handler /etc/hamlet/handlers/route.sh
#
# member-join runs ./member-join, the user event deploy runs ./user-deploy.
# An event that has no script is passed over.
event=$SERF_EVENT
if [ "$event" = user ]; then
	event=user-$SERF_USER_EVENT
fi

# Whoever may send events chooses the name, but not a file elsewhere.
case $event in
*/*) exit 0 ;;
esac

script=$(dirname "$0")/$event
if [ -e "$script" ]; then
	exec "$script"
fi
