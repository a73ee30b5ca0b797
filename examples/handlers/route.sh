#!/bin/sh
# route.sh is one event handler for everything. It runs the script beside it
# that is named after the event, with the event's environment and input:
#
#   hamlet agent -event-handler /etc/hamlet/handlers/route.sh
#
# member-join runs ./member-join, the user event deploy runs ./user-deploy, and
# the query load runs ./query-load, whose output is the answer. An event that has
# no script is passed over.
case $SERF_EVENT in
user) name=user-$SERF_USER_EVENT ;;
query) name=query-$SERF_QUERY_NAME ;;
*) name=$SERF_EVENT ;;
esac

# The sender of an event chooses its name, but neither a file elsewhere nor an
# editor's copy such as user-old.bak. (No range such as a-z, which means other
# letters in some languages.)
case $name in
*[!ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-]*) exit 0 ;;
esac

script=$(dirname -- "$0")/$name
if [ -f "$script" ]; then
	exec "$script"
fi
