#!/bin/sh
# Runs examples/haproxy on loopback, with the real HAProxy: three web nodes, a
# balancer and clients. Nodes join, one is killed, one leaves; it prints how many
# requests failed and for how long, and fails if more did than may.
# Without HAProxy it installs Debian's package, if it is root.
set -eu
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin

command -v haproxy >/dev/null || .ci/install haproxy
if ! command -v haproxy >/dev/null; then
	echo "SKIPPED: haproxy is not installed, and could not be (that takes root and apt-get)"
	if [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ]; then
		exit 1
	fi
	exit 0
fi

haproxy -v | head -n 1
HAPROXY_TEST=1 go test -count=1 -v -run '^TestHAProxyFollowsTheCluster$' ./test
