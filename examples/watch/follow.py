#!/usr/bin/env python3
"""follow.py prints the living members, at the start and after each change.

"hamlet watch" says when to look, and "hamlet members" what there is: so no
change is missed, and it does not matter how much happened meanwhile.
"""
import json
import subprocess
import time

EVENTS = "member,member-join,member-leave,member-failed,member-update,member-reap"


def changed(members):  # put your own work here
    print("alive:", *(f"{m['name']}={m['addr']}" for m in members), flush=True)


def living():
    command = ["hamlet", "members", "-status", "alive", "-format", "json"]
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return json.loads(out)["members"] or []


def follow():  # until the agent ends
    last = None
    command = ["hamlet", "watch", "-event", EVENTS, "-format", "json"]
    watch = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        for line in watch.stdout:
            # A watch begins with a line for each known member: the first one will do.
            if json.loads(line).get("event") == "member" and last:
                continue
            now = living()
            if now != last:
                changed(now)
            last = now
    finally:
        watch.kill()
        watch.wait()


while True:
    try:
        follow()
    except subprocess.CalledProcessError:
        pass  # the agent ended in between
    time.sleep(1)
